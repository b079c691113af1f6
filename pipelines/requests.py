"""What an iteration asks the student, and how it samples: a function of config, prompts and iteration."""

from __future__ import annotations

import functools

from mtopd.planning import number_samples, select_prompts
from mtopd.rollout.engine import Request, Sampling
from mtopd.types import Prompt

from .iteration import Iteration
from .session import Session


def plan_requests(session: Session, iteration: Iteration) -> list[tuple[Prompt, Request]]:
    """The iteration's requests in the order of their sample ids: a function of config, prompts and
    iteration alone.
    """
    config, sources = session.config.rollout, session.prompts.train
    per_source = config.prompts_per_iteration // len(sources)
    planned: list[tuple[Prompt, Request]] = []
    for number, prompts in enumerate(sources):
        seed = session.config.seed * len(sources) + number
        rows = select_prompts(len(prompts), per_source, iteration.number, seed)
        prompt_of = functools.cache(prompts.__getitem__)  # one object for all samples of a row
        for row, sample in number_samples(rows, config.samples_per_prompt):
            prompt = prompt_of(row)
            request = Request(len(planned), prompt.prompt_id, prompt.prompt_ids, sample)
            planned.append((prompt, request))
    return planned


def sampling(session: Session, iteration: Iteration) -> Sampling:
    """The student's own distribution, as it is."""
    return Sampling(
        session.config.data.max_response,
        min_response=session.config.rollout.min_response,
        seed=session.config.seed,
        iteration=iteration.number,
    )
