"""Staleness: tokens of a student that is too old keep their place in their response with loss mask 0.

A response that went on over an update of weights has tokens of several students; the trajectory says
which sampled which.  Iteration n trains on the tokens of students n - ``rollout.max_staleness`` and
younger; a response is trained whole in the iteration in which it ends.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow.compute as pc

from mtopd.metrics_lines import StalenessLine
from mtopd.types import MtopdError, SampleMetadata

from .iteration import Iteration
from .session import Session


def fresh_samples(session: Session, iteration: Iteration) -> list[SampleMetadata]:
    """The iteration's samples; tokens that are too old are none of their loss tokens.  Raises
    MtopdError where no token is left to train.
    """
    samples, oldest = iteration.samples, iteration.tokens.metadata["oldest_version"]
    if pc.min(oldest).as_py() >= iteration.number:  # all of the student that is trained
        return samples
    fresh = [
        replace(sample, num_loss_tokens=count_fresh(iteration, sample))
        if version < iteration.oldest_trained
        else sample
        for sample, version in zip(samples, oldest.to_pylist(), strict=True)
    ]
    before, left = (sum(s.num_loss_tokens for s in part) for part in (samples, fresh))
    if before and not left:
        raise MtopdError(
            f"rollout.max_staleness {session.config.rollout.max_staleness} leaves none of {before:,} "
            f"tokens to train in iteration {iteration.number}: students before "
            f"{iteration.oldest_trained} sampled them all; raise it, or roll the iteration out again"
        )
    if session.ranks.rank == 0:
        by_age = tokens_by_age(iteration)
        line = StalenessLine(
            tokens={str(age): count for age, count in sorted(by_age.items())},
            mean=sum(age * count for age, count in by_age.items()) / before if before else 0.0,
            oldest=max(by_age, default=0),
            tokens_masked=before - left,
        )
        session.metrics.write(line, iteration.number)
    return fresh


def count_fresh(iteration: Iteration, sample: SampleMetadata) -> int:
    mask = iteration.tokens.tokens(sample.sample_id).loss_mask_since(iteration.oldest_trained)
    return int(np.count_nonzero(mask))


def tokens_by_age(iteration: Iteration) -> Counter[int]:
    """How many loss tokens were sampled by weights that are so many iterations older than those that
    the iteration begins with.
    """
    found: Counter[int] = Counter()
    for sample_id in iteration.tokens.samples:
        fields = iteration.tokens.tokens(sample_id)
        versions = fields.versions()[fields.loss_mask != 0]
        found.update((iteration.number - versions).tolist())
    return found
