"""What a train step hands its objective: facts of teachers, their heads and hidden states, and what
the loss rows of a micro-batch are compared with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch

from mtopd.types import HeadTransform, TeacherRun


class TeacherFacts(NamedTuple):
    """What a metrics line says of a teacher."""

    name: str
    noise_floor: float | None  # nats, from rounding its cached states; None: not measured yet


class Head(Protocol):
    """A teacher's output layer on this rank: the same vocabulary rows as the student's shard."""

    @property
    def weight_vE(self) -> torch.Tensor: ...
    @property
    def transform(self) -> HeadTransform: ...


class HeadCounters(Protocol):
    """What the head slot did in a train step; peaks are of its whole life."""

    @property
    def loads(self) -> Mapping[int, int]: ...
    @property
    def bytes_read(self) -> Mapping[int, int]: ...
    @property
    def stall_s(self) -> float: ...
    @property
    def peak_resident(self) -> int: ...
    @property
    def peak_device_bytes(self) -> int: ...


class Heads(Protocol):
    """The slot that holds one head at a time (`teacher_offload.head_slot`)."""

    def lease(self, teacher_index: int) -> AbstractContextManager[Head]: ...
    def drop(self) -> None: ...
    def take_counters(self) -> HeadCounters: ...


class HiddenStates(Protocol):
    """Fetches a run's [T, E] cached states; ``stall_s`` are the seconds that callers waited."""

    stall_s: float

    def __call__(self, run: TeacherRun) -> torch.Tensor: ...


class SampledTokens(NamedTuple):
    """The tokens that loss rows predict, and their log-probs under the student that sampled them."""

    id_T: torch.Tensor  # int64
    rollout_log_prob_T: torch.Tensor  # float32, nats


class TeacherRows(NamedTuple):
    """What the loss rows of a micro-batch are compared with."""

    runs: Sequence[TeacherRun]
    sampled: SampledTokens
