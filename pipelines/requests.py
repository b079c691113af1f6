"""What an iteration asks the student, and how it samples: a function of config, prompts and iteration."""

from __future__ import annotations

import numpy as np

from mtopd.planning import number_samples, select_prompts
from mtopd.rollout.asked import Asked
from mtopd.rollout.engine import Sampling

from .iteration import Iteration
from .session import Session


def plan_requests(session: Session, iteration: Iteration) -> Asked:
    """The iteration's requests: a function of config, prompts and iteration alone."""
    config, sources = session.config.rollout, session.prompts.train
    per_source = config.prompts_per_iteration // len(sources)
    planned: list[tuple[int, int, int]] = []  # table, row, sample
    for number, prompts in enumerate(sources):
        seed = session.config.seed * len(sources) + number
        rows = select_prompts(len(prompts), per_source, iteration.number, seed)
        numbers = number_samples(rows, config.samples_per_prompt)
        planned += [(number, row, sample) for row, sample in numbers]
    table_N, row_N, sample_N = np.array(planned).T
    number_N = np.full(len(planned), iteration.number)
    return Asked(sources, np.arange(len(planned)), table_N, row_N, sample_N, number_N)


def sampling(session: Session) -> Sampling:
    """The student's own distribution, as it is."""
    return Sampling(
        session.config.data.max_response,
        min_response=session.config.rollout.min_response,
        seed=session.config.seed,
    )
