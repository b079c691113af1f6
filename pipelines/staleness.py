"""Staleness: tokens of a student that is too old keep their place in their response with loss mask 0.

A response that went on over an update of weights has tokens of several students; the trajectory says
which sampled which.  Iteration n trains on the tokens of students n - ``rollout.max_staleness`` and
younger; a response is trained whole in the iteration in which it ends.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pyarrow.compute as pc

from mtopd.megatron.agreement import gather
from mtopd.metrics_lines import StalenessLine
from mtopd.types import MtopdError, SampleMetadata

from .iteration import Iteration
from .session import Session


def fresh_samples(session: Session, iteration: Iteration) -> list[SampleMetadata]:
    """The iteration's samples; tokens that are too old are none of their loss tokens.  Raises
    MtopdError where no token is left to train.  Collective.
    """
    samples, oldest = iteration.samples, iteration.tokens.metadata["oldest_version"]
    if pc.min(oldest).as_py() >= iteration.number:  # all of the student that is trained
        return samples
    ranks = session.ranks
    shards = [*iteration.tokens.shards.values()][ranks.rank :: ranks.world_size]
    shares = gather(ranks, lambda: look_through(iteration, itertools.chain(*shards)))
    by_age = sum((ages for ages, _ in shares), Counter[int]())
    cut = {sample_id: count for _, counts in shares for sample_id, count in counts.items()}
    fresh = [
        replace(sample, num_loss_tokens=cut[sample.sample_id])
        if sample.sample_id in cut
        else sample
        for sample in samples
    ]
    before, left = (sum(s.num_loss_tokens for s in part) for part in (samples, fresh))
    if before and not left:
        raise MtopdError(
            f"rollout.max_staleness {session.config.rollout.max_staleness} leaves none of {before:,} "
            f"tokens to train in iteration {iteration.number}: students before "
            f"{iteration.oldest_trained} sampled them all; raise it, or roll the iteration out again"
        )
    if ranks.rank == 0:
        line = StalenessLine(
            tokens={str(age): count for age, count in sorted(by_age.items())},
            mean=sum(age * count for age, count in by_age.items()) / before if before else 0.0,
            oldest=max(by_age, default=0),
            tokens_masked=before - left,
        )
        session.metrics.write(line, iteration.number)
    return fresh


def look_through(
    iteration: Iteration, sample_ids: Iterable[int]
) -> tuple[Counter[int], dict[int, int]]:
    """How many loss tokens of these samples were sampled by weights that are so many iterations older
    than those that the iteration begins with; and how many are left of each that has older ones than
    are trained.
    """
    by_age, left = Counter[int](), dict[int, int]()
    for sample_id in sample_ids:
        fields = iteration.tokens.tokens(sample_id)
        ages = iteration.number - fields.versions()[fields.loss_mask != 0]
        by_age.update(ages.tolist())
        num_fresh = int(np.count_nonzero(iteration.number - ages >= iteration.oldest_trained))
        if num_fresh < len(ages):
            left[sample_id] = num_fresh
    return by_age, left
