"""The YAML file of a run as pydantic models.  An unknown key is an error that names the nearest
known one.

Two roots: ``ConsolidateConfig`` (many teachers into one student) and ``SpecialistConfig``
(supervised training of one model, which may end as a teacher store).  A path is what a shell user
means: ~ and $NAME are expanded, a relative one begins at the current folder.  After loading nothing
changes a config.  Objectives, clips and weights of policy-gradient methods do not exist here: the
loss is exact.
"""

from __future__ import annotations

import difflib
import os
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mtopd.types import MtopdError
from mtopd.yaml_file import dump_yaml, parse_yaml, read_yaml

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]


def _whole(value: object) -> object:
    # 1e4 is a float to YAML and a count to everybody else.
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
Count = Annotated[Whole, Field(ge=1, le=1 << 53)]
Seed = Annotated[Whole, Field(ge=0, lt=1 << 32)]  # a word of the generator that draws tokens


def local_path(value: object) -> Path:
    """The absolute path that a shell user means.  The current folder is that of the start: a run
    keeps what it was, for commands given in other folders.
    """
    if not isinstance(value, str | Path):
        raise ValueError(f"a path is a text, found {type(value).__name__}")
    text = str(value)
    # The message does not repeat the value: a URL may carry a password.
    if "://" in text:
        raise ValueError("a URL is not read here; give a local path")
    if not text or text != text.strip() or not text.isprintable():
        raise ValueError(
            f"path {text!r:.80} is empty, or has spaces around it or characters that do not print"
        )
    expanded = os.path.expanduser(os.path.expandvars(text))
    if unset := re.search(r"\$(\w+|\{[^}]*\})", expanded):
        raise ValueError(f"path {text!r}: the variable {unset[0]} is not set")
    if expanded.startswith("~"):
        raise ValueError(f"path {text!r}: there is no such user")
    absolute = os.path.join(os.getcwd(), expanded)
    short = os.path.normpath(absolute)
    # After a link, .. leads elsewhere than the text says.
    return Path(short if os.path.realpath(short) == os.path.realpath(absolute) else absolute)


def _store_location(value: object) -> str:
    if not (isinstance(value, str) and "://" in value):
        return str(local_path(value))
    # The whole config is kept in the run directory: a URL with a password must not even reach it.
    if any(mark in value for mark in "@?#") or not value.isprintable():
        raise ValueError(
            "a store's URL is scheme://bucket/path alone; credentials come from the environment"
        )
    return value


LocalPath = Annotated[Path, BeforeValidator(local_path)]


# a folder, or a URL: s3://bucket/teachers/code
StoreLocation = Annotated[str, BeforeValidator(_store_location)]


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ParallelConfig(Model):
    """Ranks of the student.  The world size is tp x pp x cp x dp; sequence parallelism is
    ``megatron``'s own option.
    """

    tp: Count = 1
    pp: Count = 1
    vpp: Count = (
        1  # model chunks on a pipeline rank: more than one is Megatron's interleaved schedule
    )
    cp: Count = 1
    dp: Count = 1
    ep: Count = 1  # experts of a layer are split over this many ranks of a stage
    etp: Count | None = (
        None  # tensor parallelism of an expert; default tp, and 1 where ep splits the experts
    )

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def expert_tp(self) -> int:
        return self.etp or (self.tp if self.ep == 1 else 1)


class StudentConfig(Model):
    model: LocalPath  # HF folder: initial weights and tokenizer
    dtype: Literal["float32", "bfloat16"] = "float32"
    parallel: ParallelConfig = ParallelConfig()
    # experts are chosen as before; their bias moves only at a moe_router_bias_update_rate
    freeze_router: bool = False
    # Heads that predict further tokens: carried unchanged into every export, or left out.  They are
    # not trained.
    mtp: Literal["freeze", "drop"] = "freeze"
    # Fields of Megatron's TransformerConfig, DistributedDataParallelConfig and OptimizerConfig,
    # verbatim
    megatron: dict[str, Any] = {}


class SourceConfig(Model):
    """Prompts of one origin: a JSONL or Parquet file, or a reasoning-gym dataset.  ``fields`` are
    added for routing.
    """

    name: Name
    path: LocalPath | None = None
    eval_path: LocalPath | None = None
    reasoning_gym: str | None = None
    config: dict[str, Any] = {}
    fields: dict[str, str] = {}
    train_size: Count = 20000
    eval_size: Count = 256
    seed: Seed = 1
    eval_seed: Seed = 10_000_019

    @property
    def has_held_out(self) -> bool:
        return self.reasoning_gym is not None or self.eval_path is not None

    @model_validator(mode="after")
    def _one_origin(self) -> SourceConfig:
        if (self.path is None) == (self.reasoning_gym is None):
            raise ValueError("needs exactly one of path and reasoning_gym")
        return self


class DataConfig(Model):
    sources: Annotated[list[SourceConfig], Field(min_length=1)]
    context_length: Count  # prompt + response tokens of a sample
    max_response: Count
    # prompts that leave no room for the response: all named in one error, or left out and counted
    overlong: Literal["error", "drop"] = "error"

    @model_validator(mode="after")
    def _room(self) -> DataConfig:
        if self.max_response >= self.context_length:
            raise ValueError(
                f"max_response {self.max_response} leaves no room for a prompt in context_length "
                f"{self.context_length}"
            )
        names = [s.name for s in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"source names must differ, found {names}")
        return self


class TeacherParallel(Model):
    """A teacher's own mesh over all ranks; what tp does not take are replicas."""

    tp: Count | None = None  # default the student's
    ep: Count = 1  # experts of a layer are split over this many consecutive ranks


class TeacherConfig(Model):
    name: Name
    store: StoreLocation
    route: dict[str, str]  # fields of a prompt that must all match
    weight: Annotated[float, Field(gt=0)] | None = None  # w_i; default 1 / number of teachers
    parallel: TeacherParallel = TeacherParallel()


class RolloutConfig(Model):
    engine: Literal["embedded"] = "embedded"
    prompts_per_iteration: Count
    samples_per_prompt: Count = 1
    batch_size: Count = 96  # the unit of replay
    # A response also ends once its text holds one of these (evaluation cuts it before).  Its tokens
    # are what the student sampled: they stay in the response and are trained, no EOS is added
    stop: list[Annotated[str, Field(min_length=1)]] = []


class OffloadConfig(Model):
    host_budget: Count = 4 << 30  # bytes per process for shares read ahead and kept between passes
    # bytes per process for activations between two layers; more waves beyond it
    activation_budget: Count = 4 << 30
    batch_tokens: Count = 16384  # of one forward through a layer
    reader_threads: Count = 4
    # The student's gradients and optimizer state in host memory during a pass; auto: when the pass
    # does not fit beside
    offload_student: Literal["auto", "always", "never"] = "auto"


class CacheConfig(Model):
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: the teacher's stored dtype


class OptimizerConfig(Model):
    lr: Annotated[float, Field(gt=0)]
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    warmup_steps: Annotated[Whole, Field(ge=0)] = 10
    decay: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.98
    clip_grad: Annotated[float, Field(ge=0)] = 1.0


class TrainConfig(Model):
    num_iterations: Count  # a later start of the run may have more
    train_steps_per_iteration: Count = 1
    micro_batch_size: Count | None = None  # samples, padded to the longest of the train step
    token_budget: Count | None = None  # or: tokens of a pack, samples one behind the other
    normalization: Literal["teacher_balanced", "token_mean", "sequence_mean"] = "teacher_balanced"
    optimizer: OptimizerConfig
    max_bad_steps: Annotated[Whole, Field(ge=0)] = (
        0  # train steps with NaN or inf that are left out before the run stops
    )

    @model_validator(mode="after")
    def _one_size(self) -> TrainConfig:
        if (self.micro_batch_size is None) == (self.token_budget is None):
            raise ValueError(
                "needs exactly one of micro_batch_size (samples, padded) and token_budget (tokens, "
                "packed)"
            )
        return self


class SamplingConfig(Model):
    """How held-out prompts are answered: by default the most likely token.  Rollouts are always the
    student's own distribution.
    """

    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0  # 0: greedy
    # drawn from the fewest most likely tokens that hold this probability together
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _takes_effect(self) -> SamplingConfig:
        if self.temperature == 0 and self.top_p < 1:
            raise ValueError(
                f"top_p {self.top_p} does nothing at temperature 0, which takes the most likely "
                "token; set a temperature above 0, or leave top_p out"
            )
        return self


class EvaluationConfig(SamplingConfig):
    every: Annotated[Whole, Field(ge=0)] = (
        0  # iterations; 0: only before the first and after the last
    )
    # HF folders evaluated beside the student, by name; "base" and the teachers' names give the
    # recovery
    baselines: dict[str, LocalPath] = {}
    # after the last iteration; false: only `mtopd evaluate RUN --baselines` evaluates them
    baselines_at_end: bool = True
    weight_average: list[str] = []  # names of baselines whose plain average is evaluated too


class CheckpointConfig(Model):
    every: Count = 20  # iterations
    keep: Count = 2


class ConsolidateConfig(Model):
    run_dir: LocalPath
    seed: Seed = 0
    log_json: bool = False  # metrics lines on standard output instead of a progress display
    deterministic: bool = True
    student: StudentConfig
    teachers: Annotated[list[TeacherConfig], Field(min_length=1)]
    data: DataConfig
    rollout: RolloutConfig
    teacher_offload: OffloadConfig = OffloadConfig()
    hidden_cache: CacheConfig = CacheConfig()
    train: TrainConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _cross_checks(self) -> ConsolidateConfig:
        names = [t.name for t in self.teachers]
        if len(set(names)) != len(names):
            raise ValueError(f"teacher names must differ, found {names}")
        samples = self.rollout.prompts_per_iteration * self.rollout.samples_per_prompt
        steps = self.train.train_steps_per_iteration
        if samples < steps:
            raise ValueError(
                f"an iteration has {samples} samples for {steps} train steps; every train step "
                "needs one"
            )
        per_source = self.rollout.prompts_per_iteration, len(self.data.sources)
        if per_source[0] % per_source[1]:
            raise ValueError(
                f"rollout.prompts_per_iteration {per_source[0]} is not a multiple of the "
                f"{per_source[1]} data sources"
            )
        if self.train.token_budget is not None and self.student.parallel.cp > 1:
            raise ValueError(
                "train.token_budget packs samples, which student.parallel.cp "
                f"{self.student.parallel.cp} does not "
                "split yet; use train.micro_batch_size, or cp 1"
            )
        if (
            self.train.token_budget is not None
            and self.train.token_budget < self.data.context_length - 1
        ):
            raise ValueError(
                f"train.token_budget {self.train.token_budget} does not hold a sample of "
                "data.context_length "
                f"{self.data.context_length}; raise it"
            )
        world = self.student.parallel.world_size
        for i, teacher in enumerate(self.teachers):
            for axis, size in (("tp", self.teacher_tp(i)), ("ep", teacher.parallel.ep)):
                if world % size:
                    raise ValueError(
                        f"teachers.{i}.parallel.{axis} {size} does not divide the world size "
                        f"{world}"
                    )
        baselines = self.evaluation.baselines.keys()
        if taken := {"student", "weight average"} & baselines:
            raise ValueError(
                f"evaluation.baselines.{min(taken)}: the report calls another row so; choose "
                "another name"
            )
        if "base" in baselines and "base" in names:
            raise ValueError(
                "'base' names a teacher and, in evaluation.baselines, the student before training; "
                "call the teacher otherwise"
            )
        if not any(source.has_held_out for source in self.data.sources):
            for key in ("every", *SamplingConfig.model_fields):
                if getattr(self.evaluation, key) != EvaluationConfig.model_fields[key].default:
                    raise ValueError(
                        f"evaluation.{key} needs held-out prompts, but no source has any; give "
                        f"data.sources an eval_path, or leave evaluation.{key} out"
                    )
        if unknown := set(self.evaluation.weight_average) - set(self.evaluation.baselines):
            raise ValueError(
                f"evaluation.weight_average names {sorted(unknown)}, baselines are "
                f"{sorted(self.evaluation.baselines)}"
            )
        return self

    def teacher_tp(self, index: int) -> int:
        return self.teachers[index].parallel.tp or self.student.parallel.tp

    @property
    def teacher_weights(self) -> list[float]:
        return [
            t.weight if t.weight is not None else 1.0 / len(self.teachers) for t in self.teachers
        ]


class StopConfig(Model):
    """Stop when accuracy on the held-out prompts of *every* source lies within ``accuracy``
    +- ``tolerance``.

    A source's share of the mini-batch follows how far it is below ``accuracy``; one that is above
    gets ``min_share`` of it, so that sources which learn at different speeds arrive together.
    """

    accuracy: Annotated[float, Field(gt=0, le=1)]
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.1
    every: Count = 10
    first: Count = 50
    min_share: Annotated[float, Field(ge=0, le=1)] = 0.0


class TeacherStoreConfig(Model):
    name: Name
    path: LocalPath
    # largest tensor-parallel size that can load it without a copy; auto: as many as the model has,
    # up to 8
    slices: Count | Literal["auto"] = 1


class SupervisedConfig(Model):
    num_steps: Count  # a later start of the run may have more
    global_batch_size: Count
    micro_batch_size: Count
    optimizer: OptimizerConfig
    stop: StopConfig | None = None


class SupervisedCheckpointConfig(CheckpointConfig):
    every: Count = 100  # train steps


class SpecialistConfig(Model):
    run_dir: LocalPath
    seed: Seed = 0
    log_json: bool = False
    student: StudentConfig
    data: DataConfig
    train: SupervisedConfig
    evaluation: SamplingConfig = SamplingConfig()
    checkpoint: SupervisedCheckpointConfig = SupervisedCheckpointConfig()
    store: TeacherStoreConfig | None = None  # write the result as a teacher, too

    @model_validator(mode="after")
    def _stop_can_come(self) -> SpecialistConfig:
        stop = self.train.stop
        if stop is None:
            return self
        for i, source in enumerate(self.data.sources):
            if not source.has_held_out:
                raise ValueError(
                    f"train.stop looks at held-out prompts of every source, but data.sources.{i} "
                    f"({source.name!r}) has none; give it an eval_path, or leave train.stop out"
                )
        due = -(-stop.first // stop.every) * stop.every
        if due > self.train.num_steps:
            raise ValueError(
                f"train.stop (first {stop.first}, every {stop.every}) is first looked at after step "
                f"{due}, but train.num_steps is {self.train.num_steps}; lower first or every, or "
                "leave train.stop out"
            )
        return self


Root = TypeVar("Root", ConsolidateConfig, SpecialistConfig)


def load_config(path: Path, overrides: Sequence[str], kind: type[Root]) -> Root:
    """Read a YAML file, apply ``key.sub=value`` overrides (values are YAML), validate.  Raises
    MtopdError.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise MtopdError(f"{path} must hold a table of settings, found {found}")
    _check_overrides(overrides)
    for override in overrides:
        _override(values, override)
    return validate(values, kind, str(path))


def validate(values: dict[str, Any], kind: type[Root], where: str) -> Root:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first, *more = error.errors()
        also = f" (and {len(more)} more)" if more else ""
        raise MtopdError(f"{where}: {_explain(first, kind)}{also}") from None


def _check_overrides(overrides: Sequence[str]) -> None:
    """No override may undo one before it."""
    given: dict[str, str] = {}
    for override in overrides:
        key, _, _ = override.partition("=")
        for before, text in given.items():
            if (before == key or before.startswith(f"{key}.")) and text != override:
                raise MtopdError(f"override {override!r} undoes {text!r}; give one of them")
        given[key] = override


def _override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator:
        raise MtopdError(f"override {override!r} must look like key.sub=value")
    *parents, leaf = key.split(".")
    table: Any = values
    for part in parents:
        if isinstance(table, dict):
            if table.get(part) is None:
                table[part] = {}
            table = table[part]
        else:
            table = table[int(part)] if _is_place(part, table) else None
        if not isinstance(table, dict | list):
            raise MtopdError(f"override {override!r}: {part!r} is not a table in the config")
    value = parse_yaml(text, f"override {override!r:.200}")
    if isinstance(table, list):
        if not _is_place(leaf, table):
            raise MtopdError(
                f"override {override!r}: the list has {len(table)} entries, {leaf!r} is none of "
                "them"
            )
        table[int(leaf)] = value
    else:
        table[leaf] = value


def _is_place(text: str, table: list[Any]) -> bool:
    return re.fullmatch(r"[0-9]{1,9}", text) is not None and int(text) < len(table)


def _explain(error: Any, kind: type[BaseModel]) -> str:
    where = ".".join(str(p) for p in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _known_keys(kind, error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = (
            f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(sorted(known))}"
        )
        return f"unknown key {where!r}; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{where} is missing"
    if error["type"] == "value_error":
        return f"{where}: {message}" if where else message
    if error["type"] in ("model_type", "dict_type"):
        message = "it must be a table of settings; leave it out for the defaults"
    found = reprlib.repr(error["input"])
    if "://" in found:  # of a URL, which may carry a password, only the kind is told
        found = type(error["input"]).__name__
    return f"{where} is {found}: {message}"


def _known_keys(kind: Any, path: Sequence[Any]) -> list[str]:
    for part in path:
        if isinstance(part, int):
            continue
        annotation = kind.model_fields[part].annotation
        kind = next(iter(_models_in(annotation)))
    return list(kind.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for inner in getattr(annotation, "__args__", ()) for m in _models_in(inner)]


def resolved(config: BaseModel) -> dict[str, Any]:
    """Plain values of a config, as JSON and YAML take them."""
    values = config.model_dump(mode="json")
    assert isinstance(values, dict)
    return values


def to_yaml(config: BaseModel) -> str:
    return dump_yaml(resolved(config))
