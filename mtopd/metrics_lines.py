"""The lines of metrics.jsonl, one class for each kind: phases write them, the report reads them.

The fields of a class are the keys of its line, so that no key is spelled in two places. A field
that is None was not measured and is not written. A line of an older version may lack keys: it is
read with None for a number, whatever the field's type says, and with an empty table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, TypeVar

# In a field's metadata, how it is read: a dataclass whose fields stand among those of the line, or
# a table by name.
_GROUP, _TABLE = "group", "table"
T = TypeVar("T")


def _table(kind: type) -> Any:
    """A field that maps names of teachers or of sources to ``kind``, a dataclass or a number."""
    return field(metadata={_TABLE: kind})


def to_values(item: Any) -> dict[str, Any]:
    """A line, or a part of one, as keys and values for JSON."""
    values: dict[str, Any] = {}
    for key in (f.name for f in fields(item)):
        value = getattr(item, key)
        if is_dataclass(value):
            values |= to_values(value)
        elif isinstance(value, Mapping):
            values[key] = {k: to_values(v) if is_dataclass(v) else v for k, v in value.items()}
        elif value is not None:
            values[key] = value
    return values


def from_values(kind: type[T], values: Mapping[str, Any]) -> T:
    """The reverse of ``to_values``. Keys that ``kind`` does not have are passed over."""
    if not is_dataclass(kind):
        return values  # type: ignore[return-value]  # a number in a table
    found: dict[str, Any] = {}
    for f in fields(kind):
        if _GROUP in f.metadata:
            found[f.name] = from_values(f.metadata[_GROUP], values)
        elif _TABLE in f.metadata:
            rows = (values.get(f.name) or {}).items()
            found[f.name] = {name: from_values(f.metadata[_TABLE], row) for name, row in rows}
        else:
            found[f.name] = values.get(f.name)
    return kind(**found)


# -- the lines -------------------------------------------------------------------------------------
class Line:
    """What every line has in common."""

    KIND: ClassVar[str]

    @property
    def kind(self) -> str:
        return self.KIND

    def values(self) -> dict[str, Any]:
        return to_values(self)


@dataclass(frozen=True)
class PhaseLine(Line):
    """Wall seconds of one phase of an iteration. Its kind is phase/<name>; each start of a run has
    a line of its own.
    """

    KIND = "phase/"
    name: str
    wall_s: float

    @property
    def kind(self) -> str:
        return self.KIND + self.name

    def values(self) -> dict[str, Any]:
        return {key: value for key, value in super().values().items() if key != "name"}


@dataclass(frozen=True, kw_only=True)
class RolloutLine(Line):
    """What the student answered in an iteration."""

    KIND = "rollout"
    tokens: int  # that the student sampled
    samples: int
    stopped: int  # samples that ended by themselves; the others have all the tokens they may
    continued_tokens: int = 0  # of tokens, sampled by starts that were killed
    log_bytes: int = 0  # of this start's token logs
    # With rollout.carry_over
    carried_samples: int | None = None  # that the iteration before had left open
    carried_tokens: int | None = None  # that they had then
    open_samples: int | None = None  # that the next iteration goes on with
    open_tokens: int | None = None  # that they have now
    # Of sources with an environment, where there are any
    environment_tokens: int | None = None  # replies between the student's turns, beside tokens
    environment_errors: int | None = None  # samples that ended because it failed
    environment_calls: int | None = (
        None  # in this start: turns of the student that it was asked about
    )
    environment_s: float | None = None  # of those calls together, they run side by side


@dataclass(frozen=True, kw_only=True)
class StalenessLine(Line):
    """How old the weights were that sampled an iteration's loss tokens, in iterations: 0 are those that
    it begins with.  Of iterations that have older ones.
    """

    KIND = "staleness"
    tokens: Mapping[str, int] = _table(int)  # by age
    mean: float
    oldest: int
    tokens_masked: int  # older than rollout.max_staleness: not trained


@dataclass(frozen=True, kw_only=True)
class WeightUpdateLine(Line):
    """The student's weights on their way to servers, before they answer an iteration."""

    KIND = "weight_update"
    seconds: Mapping[str, float] = _table(float)  # by step: begin, buckets, load, checksums, probe
    bytes_sent: int  # to each server
    servers: int  # that have them, proven
    servers_out: int  # that have not, and are asked nothing until the next update
    probe_difference: float  # largest of a log-prob of server and trainer, in nats


@dataclass(frozen=True, kw_only=True)
class SequenceFilterLine(Line):
    """What train.sequence_filter left out of an iteration."""

    KIND = "sequence_filter"
    samples: int  # of the iteration
    samples_filtered: int
    tokens_filtered: int  # trained ones, of those samples
    wall_s: float  # of the forward pass


@dataclass(frozen=True, kw_only=True)
class PassMetrics:
    """A teacher's visit in one iteration: sums over ranks; seconds and peaks of the slowest or largest
    rank.
    """

    bytes_read: int
    bytes_kept: int  # found in host memory instead
    stored_bytes: int  # of one pass over the whole teacher
    tokens: int
    samples: int  # of which the hidden cache lacked the rows
    waves: int
    stall_s: float
    peak_device_bytes: int
    peak_host_bytes: int
    relayouts: int
    hidden_s: float | None = None  # of its wall seconds, those beside a rollout that still went on
    # Only in the first pass of a start, which checks that this is the right teacher.
    probe: str | None = None  # who made the reference
    probe_difference: float | None = None
    kl_noise_floor: float | None = None  # nats, from rounding hidden states to the cache's dtype


@dataclass(frozen=True)
class TeacherPassLine(Line):
    """A visit of a teacher: one in an iteration, more where the pass begins beside the rollout (older
    runs have all teachers in one line).
    """

    KIND = "teacher_pass"
    teachers: Mapping[str, PassMetrics] = _table(PassMetrics)


@dataclass(frozen=True, kw_only=True)
class SupervisedStepLine(Line):
    """A train step of a supervised run. Read back it is a TrainStepLine that lacks the rest."""

    KIND = "train_step"
    loss: float
    grad_norm: float
    lr: float
    tokens: int  # of answers: those that are trained
    tokens_per_s: float
    # Tokens that the model read: of each sample prompt and answer without the last token, which is
    # predicted alone.  Padding does not count.
    positions: int
    positions_per_s: float
    wall_s: float


@dataclass(frozen=True, kw_only=True)
class HeadMetrics:
    """The teachers' heads in one train step, taken or left out."""

    head_loads: Mapping[str, int] = _table(int)
    head_bytes_read: Mapping[str, int] = _table(int)
    teachers_in_step: int  # over all data-parallel and context-parallel ranks, as head_loads
    peak_resident_heads: int
    peak_head_bytes: int
    stall_s: float
    statistics_s: float


@dataclass(frozen=True, kw_only=True)
class TeacherShare:
    """A teacher's part of a train step, each between 0 and 1."""

    tokens: float
    samples: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class TeacherStatistics:
    """Means over ``tokens`` tokens of a teacher; see `mtopd.kernels.DistributionStatistics`."""

    tokens: float
    student_entropy: float
    teacher_entropy: float
    forward_kl: float
    overlap_ratio: float
    student_overlap_mass: float
    teacher_overlap_mass: float
    entropy_gap: float


@dataclass(frozen=True, kw_only=True)
class MismatchMetrics:
    """Log-probs of the sampled tokens: the trainer's, before the step's update, minus the
    rollout's, in nats.  None in a step that trains no token.
    """

    log_prob_difference: float | None = None  # mean
    log_prob_difference_p99: float | None = None  # of its absolute value
    token_mult_prob_error: float | None = None  # exp(mean absolute value)


@dataclass(frozen=True, kw_only=True)
class DivergenceMetrics:
    """What the objective measured in a train step, in nats a token where nothing else is said."""

    loss: float  # with the teachers' weights
    reverse_kl: float
    reverse_kl_by_teacher: Mapping[str, float] = _table(float)
    share_by_teacher: Mapping[str, TeacherShare] = _table(TeacherShare)
    kl_noise_floor: Mapping[str, float] = _table(float)
    below_10x_noise_floor: list[str]
    entropy: float
    statistics: Mapping[str, TeacherStatistics] = _table(TeacherStatistics)
    mismatch: MismatchMetrics = field(metadata={_GROUP: MismatchMetrics})


@dataclass(frozen=True, kw_only=True)
class TrainStepLine(DivergenceMetrics, SupervisedStepLine):
    """A train step of a consolidation: what the objective measured, and what the trainer did."""

    micro_batches: int
    waste: float  # share of the computed positions that holds padding
    heads: HeadMetrics = field(metadata={_GROUP: HeadMetrics})


@dataclass(frozen=True, kw_only=True)
class BadStepLine(Line):
    """A train step that was left out, for NaN or inf."""

    KIND = "bad_step"
    refused: str  # why
    bad_steps: int  # so far
    heads: HeadMetrics = field(metadata={_GROUP: HeadMetrics})


@dataclass(frozen=True)
class EvaluationLine(Line):
    """Accuracy on held-out prompts by source, the share of answers that ended by themselves, and in
    a supervised run the sources' shares of a mini-batch.
    """

    KIND = "evaluation"
    accuracy: Mapping[str, float] = _table(float)
    shares: Mapping[str, float] | None = None
    stopped: Mapping[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class BaselineLine(Line):
    """A baseline's accuracy; its name is the line's part."""

    KIND = "baseline"
    accuracy: Mapping[str, float] = _table(float)
    stopped: Mapping[str, float] = _table(float)
    kept: bool  # known from before, not evaluated in this start


@dataclass(frozen=True)
class MemoryLine(Line):
    """Peak host memory of the largest rank, at the end of a start."""

    KIND = "memory"
    peak_host_bytes: int


_LINES: Mapping[str, type[Line]] = {
    line.KIND: line
    for line in (
        RolloutLine,
        StalenessLine,
        WeightUpdateLine,
        SequenceFilterLine,
        TeacherPassLine,
        TrainStepLine,
        BadStepLine,
        EvaluationLine,
        BaselineLine,
        MemoryLine,
    )
}


def line_of(kind: str, values: Mapping[str, Any]) -> Line | None:
    """The line of this kind; None where a newer version wrote a kind that is unknown."""
    if kind.startswith(PhaseLine.KIND):
        return from_values(PhaseLine, {**values, "name": kind.removeprefix(PhaseLine.KIND)})
    return from_values(_LINES[kind], values) if kind in _LINES else None
