"""What an iteration asks the student, and how it samples: a function of config, prompts and iteration."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from mtopd.planning import number_samples, select_prompts
from mtopd.rollout.asked import Asked
from mtopd.rollout.engine import Sampling

from .iteration import Iteration
from .session import Session


def plan_requests(session: Session, iteration: Iteration, carried: Collection[int] = ()) -> Asked:
    """The iteration's requests: a function of config, prompts, iteration and of the samples that it goes
    on with, alone.  With ``rollout.carry_over`` a sample's id is its place among those of all
    iterations, and as many more are asked for as may be left open.
    """
    config, sources = session.config.rollout, session.prompts.train
    count = config.samples_per_iteration
    begin, more = iteration.number * count, 0 if iteration.is_last else config.carry_over
    # What is carried and what is new come one behind the other in the queue, without a gap.
    new = range(begin + len(carried), begin + count + more)
    id_N = np.array([*sorted(carried), *new])
    home_N, place_N = np.divmod(id_N, count)
    planned_N = np.concatenate(
        [plan_samples(session, int(home))[place_N[home_N == home]] for home in np.unique(home_N)]
    )
    table_N, row_N, sample_N = planned_N.T
    id_N = id_N if config.carry_over else place_N
    return Asked(sources, id_N, table_N, row_N, sample_N, home_N)


def plan_samples(session: Session, number: int) -> npt.NDArray[np.int64]:
    """Table, row, sample of each of an iteration's samples."""
    config, sources = session.config.rollout, session.prompts.train
    per_source = config.prompts_per_iteration // len(sources)
    planned: list[tuple[int, int, int]] = []
    for table, prompts in enumerate(sources):
        seed = session.config.seed * len(sources) + table
        rows = select_prompts(len(prompts), per_source, number, seed)
        numbers = number_samples(rows, config.samples_per_prompt)
        planned += [(table, row, sample) for row, sample in numbers]
    return np.array(planned)


def sampling(session: Session) -> Sampling:
    """The student's own distribution, as it is."""
    return Sampling(
        session.config.data.max_response,
        min_response=session.config.rollout.min_response,
        seed=session.config.seed,
    )
