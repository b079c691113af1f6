"""Plain data that crosses module borders.  Imports nothing from mtopd and no torch.

Terms: a *prompt* carries the fields that route it and the index of its teacher; a *trajectory* is a
prompt with one response sampled by the student; a *train step* is one optimizer update over one
mini-batch of trajectories; an *iteration* is rollout + teacher pass + train + update weights and
may hold several train steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Protocol


class MtopdError(ValueError):
    """An error a user can cause and mend.  The message says what was found, what was needed, what
    to do.
    """


def plain_text(value: str | bool | int | float | Decimal) -> str:
    """The text that routes and answers are compared by, of a value in a data file or a config.

    A whole number has no point, whatever column it comes from; true and false are lower case.
    0.00001 stays as people write it: Python calls it 1e-05.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and (value == 0 or 1e-21 < abs(value) < 1e21):
        value = Decimal(repr(value))
    if isinstance(value, Decimal):
        text = format(value, "f")
        text = text.rstrip("0").rstrip(".") if "." in text else text
        return "0" if text == "-0" else text
    return str(value)


# -- a sample's row arithmetic ---------------------------------------------------------------------
def first_loss_position(prompt_len: int) -> int:
    """The position whose hidden state predicts the first response token; response token k is
    predicted k positions later.  Positions run from 0.
    """
    return prompt_len - 1


def num_input_tokens(prompt_len: int, response_len: int) -> int:
    """Tokens that a model reads of a sample: the last response token is predicted, not read."""
    return prompt_len + response_len - 1


class Numbers(Protocol):
    """One number a token: a tuple, or an array."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...


# -- a sample on its way ---------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, tokenized.  ``prompt_ids`` ends where the response begins (template included)."""

    prompt_id: str  # "<source name>/<row>", unique in a run
    # The metadata fields that ``route`` of a teacher may match, e.g. {"domain": "rot"}
    route: Mapping[str, str]
    prompt_ids: tuple[int, ...]
    teacher_index: int
    # What the source's verifier needs besides the response text
    verify: Mapping[str, Any] = field(default_factory=dict)
    # Where an environment replies to the response: "environment" (the source's name), "messages",
    # "tools" and "answer" as the file has them
    conversation: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A prompt and one sampled response.

    ``response_ids`` holds what ended it when ``finish_reason == "stop"``: an end token, or the
    tokens of a stop string; they are trained.
    """

    sample_id: int  # unique in an iteration
    prompt_id: str
    route: Mapping[str, str]
    teacher_index: int
    prompt_ids: tuple[int, ...]
    response_ids: Numbers
    loss_mask: Numbers  # one 0/1 for each response token; 0: somebody else said it
    # Log-prob of each response token under the sampling student; of what it did not sample 0
    rollout_log_probs: Numbers
    student_version: int  # the iteration whose weights sampled its last token
    # "stop" (an end token or a stop string) | "length" | "environment_error"
    finish_reason: str
    reward: float | None = None  # the verifier's score where the prompt has a verifier
    # What the teacher reads before the response; None: the student's own prompt
    teacher_prompt_ids: tuple[int, ...] | None = None
    # (first token, student version) of each run of tokens; (): student_version sampled them all
    version_spans: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class SampleMetadata:
    """What planning knows of a trajectory: no tokens."""

    sample_id: int
    teacher_index: int
    prompt_len: int
    response_len: int
    num_loss_tokens: int
    token_hash: str = ""  # of prompt, response and loss mask: names the sample's cached rows
    # What the teacher reads before the response; 0 and "": the student's own prompt
    teacher_prompt_len: int = 0
    teacher_prompt_hash: str = ""

    @property
    def num_teacher_tokens(self) -> int:
        """Tokens that the teacher reads."""
        return num_input_tokens(self.teacher_prompt_len or self.prompt_len, self.response_len)


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
    # Tokens per row of every micro-batch: prompt + response without the last token, padded
    seq_length: int
    # A micro-batch is one row, its samples one behind the other; else one row for each sample
    packed: bool
    num_tokens: Mapping[int, int]  # loss tokens of each teacher in the whole mini-batch (N_i)
    waste: float  # share of all rows that is padding


@dataclass(frozen=True, slots=True)
class SampleRows:
    """Loss rows [first, stop) of a sample, in its teacher's cached hidden states under ``key``."""

    sample_id: int
    teacher_index: int
    key: bytes
    first: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class TeacherRun:
    """Consecutive loss rows [start, stop) of a micro-batch that belong to one teacher.

    A run is itself, whatever it holds: it names its rows while a train step lasts.
    """

    teacher_index: int
    start: int
    stop: int
    samples: Sequence[SampleRows]


# -- a teacher's head ------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class HeadTransform:
    """What a model does to its logits after the output layer."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, product: Any) -> Any:
        """softcap * tanh(scale * product / softcap) of a tensor of products, any shape."""
        logits = product * self.scale
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap
