"""Responses become trajectories: each shard is sealed as soon as all of its responses are there."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mtopd.rollout.engine import Request
from mtopd.rollout.memory_log import Response
from mtopd.trajectories import write_shard
from mtopd.types import Prompt, Trajectory


def shard_name(sample_id: int, shard_size: int) -> str:
    """The shard that a sample belongs to, whoever answers it."""
    return f"batch-{sample_id // shard_size:05d}"


@dataclass(frozen=True)
class Counts:
    """What sealed shards hold."""

    samples: int = 0
    tokens: int = 0  # that the student sampled
    stopped: int = 0  # samples that ended by themselves
    replied_tokens: int = 0  # of an environment
    errors: int = 0  # samples that ended because it failed

    @staticmethod
    def of(lengths: Sequence[int], loss_tokens: Sequence[int], reasons: Sequence[str]) -> Counts:
        tokens = sum(loss_tokens)
        errors = reasons.count("environment_error")
        return Counts(len(lengths), tokens, reasons.count("stop"), sum(lengths) - tokens, errors)

    def __add__(self, other: Counts) -> Counts:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Counts(*(a + b for a, b in pairs))


class ShardWriter:
    """Collects an iteration's responses on this rank and seals shards of ``shard_size`` samples with
    neighbouring ids.

    ``planned``: what is asked, by sample id, whole shards of it.
    """

    def __init__(
        self,
        folder: Path,
        planned: Mapping[int, tuple[Prompt, Request]],
        shard_size: int,
        generation: int,
    ) -> None:
        self.sealed = Counts()
        self.num_missing = len(planned)  # responses that were not added here
        self._folder = folder
        self._shard_size = shard_size
        self._generation = generation
        self._planned = planned
        # Of shards that are not sealed, in their order
        self._sizes: dict[str, int] = Counter(shard_name(i, shard_size) for i in planned)
        self._arrived: dict[str, dict[int, Response]] = {}

    def add(self, response: Response) -> Sequence[int]:
        """Take a response.  Returns the ids of samples that are sealed by it: a whole shard's, or
        none.
        """
        name = self._shard_of(response.sample_id)
        arrived = self._arrived.setdefault(name, {})
        assert response.sample_id not in arrived, f"sample {response.sample_id} came twice"
        arrived[response.sample_id] = response
        self.num_missing -= 1
        if len(arrived) < self._sizes[name]:
            return ()
        samples = [trajectory(*self._planned[i], arrived[i]) for i in sorted(arrived)]
        write_shard(self._folder, name, samples, self._generation)
        self.sealed += Counts.of(
            [len(sample.response_ids) for sample in samples],
            [int(np.count_nonzero(np.asarray(sample.loss_mask))) for sample in samples],
            [sample.finish_reason for sample in samples],
        )
        del self._sizes[name]
        return [*self._arrived.pop(name)]

    def _shard_of(self, sample_id: int) -> str:
        return shard_name(sample_id, self._shard_size)


class EndedFirst(ShardWriter):
    """Collects the ``count`` responses that end first, of more that are ``planned``: shards are filled
    in the order in which responses are added, ``sealed`` are left out.  No other rank may have any.
    """

    def __init__(
        self,
        folder: Path,
        planned: Mapping[int, tuple[Prompt, Request]],
        shard_size: int,
        generation: int,
        *,
        count: int,
        sealed: Container[str],
    ) -> None:
        super().__init__(folder, planned, shard_size, generation)
        names = (shard_name(first, shard_size) for first in itertools.count(0, shard_size))
        free = (name for name in names if name not in sealed)
        firsts = range(0, count, shard_size)
        self._sizes = {next(free): min(shard_size, count - first) for first in firsts}
        self.num_missing = count

    def _shard_of(self, sample_id: int) -> str:
        return next(iter(self._sizes))


def trajectory(prompt: Prompt, request: Request, response: Response) -> Trajectory:
    """The sample of a response: all that the student sampled is trained, nothing else."""
    mask = response.loss_mask
    return Trajectory(
        sample_id=request.sample_id,
        prompt_id=prompt.prompt_id,
        route=prompt.route,
        teacher_index=prompt.teacher_index,
        prompt_ids=prompt.prompt_ids,
        response_ids=response.response_ids,
        loss_mask=np.ones(len(response.response_ids), np.uint8) if mask is None else mask,
        rollout_log_probs=response.log_probs,
        student_version=response.version_spans[-1][1],
        version_spans=response.version_spans,
        finish_reason=response.finish_reason,
    )
