"""Plain data that crosses module borders.  Imports nothing from mtopd and no torch.

Terms: a *prompt* carries the fields that route it and the index of its teacher; a *trajectory* is a
prompt with one response sampled by the student; a *train step* is one optimizer update over one
mini-batch of trajectories; an *iteration* is rollout + teacher pass + train + update weights and
may hold several train steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class MtopdError(ValueError):
    """An error a user can cause and mend.  The message says what was found, what was needed, what
    to do.
    """


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, tokenized.  ``prompt_ids`` ends where the response begins (template included)."""

    prompt_id: str  # "<source name>/<row>", unique in a run
    route: Mapping[
        str, str
    ]  # the metadata fields that ``route`` of a teacher may match, e.g. {"domain": "rot"}
    prompt_ids: tuple[int, ...]
    teacher_index: int
    verify: Mapping[str, Any] = field(
        default_factory=dict
    )  # what the source's verifier needs besides the response text


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A prompt and one sampled response.

    Row k of the sample's hidden states is the state at position ``prompt_len - 1 + k``: the one
    that predicts response token k.  ``response_ids`` holds the EOS token when ``finish_reason ==
    "stop"``; EOS is trained.
    """

    sample_id: int  # unique in an iteration, dense from 0
    prompt_id: str
    route: Mapping[str, str]
    teacher_index: int
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]  # one 0/1 for each response token
    rollout_log_probs: tuple[
        float, ...
    ]  # log-prob of each response token under the sampling student
    student_version: int  # the iteration whose weights sampled it
    finish_reason: str  # "stop" (EOS) | "length"
    reward: float | None = None  # the verifier's score where the prompt has a verifier


@dataclass(frozen=True, slots=True)
class SampleMetadata:
    """What planning knows of a trajectory: no tokens."""

    sample_id: int
    teacher_index: int
    prompt_len: int
    response_len: int
    num_loss_tokens: int
    token_hash: str = ""  # of prompt, response and loss mask: names the sample's cached rows


@dataclass(frozen=True, slots=True)
class PlannedSample:
    """One sample inside a micro-batch.  ``token_weight`` already holds 1/N and the teacher's
    weight.
    """

    sample_id: int
    teacher_index: int
    token_weight: float


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Samples of one forward pass; teacher_index never decreases along ``samples``.  May be empty
    (a dummy).
    """

    samples: tuple[PlannedSample, ...]


@dataclass(frozen=True, slots=True)
class TrainStepPlan:
    """One optimizer update.  Every dp rank has the same number of micro-batches."""

    micro_batches: tuple[tuple[MicroBatch, ...], ...]  # [dp rank][micro-batch]
    seq_length: (
        int  # tokens per row of every micro-batch: prompt + response without the last token, padded
    )
    # a micro-batch is one row, its samples one behind the other; else one row for each sample
    packed: bool
    num_tokens: Mapping[int, int]  # loss tokens of each teacher in the whole mini-batch (N_i)
    waste: float  # share of all rows that is padding

    def teachers_of(self, dp_rank: int) -> list[int]:
        """Distinct teacher indices in this dp rank's part, ascending: the head loads this train
        step needs there.
        """
        return sorted({s.teacher_index for mb in self.micro_batches[dp_rank] for s in mb.samples})
