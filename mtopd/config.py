"""The config of a consolidation, many teachers into one student, as pydantic models.

``config_specialist`` has the other root; parts of both stand in ``config_data`` and
``config_rollout``, what a single value may be in ``config_values``, reading in ``config_file``.  After
loading nothing changes a config.  Objectives, clips and weights of policy-gradient methods do not
exist here: the loss is exact.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mtopd.config_data import DataConfig
from mtopd.config_rollout import EvaluationConfig, RolloutConfig, SamplingConfig
from mtopd.config_values import (
    MOST_RANKS,
    Count,
    FieldText,
    Items,
    LocalPath,
    Model,
    Name,
    Ranks,
    Seed,
    StoreLocation,
    Turns,
    Whole,
)

_MOST_SAMPLES = 1 << 24  # of an iteration
_MOST_NUMBERED = 1 << 32  # of a run whose samples are numbered through: ids of token logs


class ParallelConfig(Model):
    """Ranks of the student.  The world size is tp x pp x cp x dp; sequence parallelism is
    ``megatron``'s own option.
    """

    tp: Ranks = 1
    """Tensor parallelism: ranks that share every matrix."""
    pp: Ranks = 1
    """Pipeline stages."""
    vpp: Ranks = 1
    """Model chunks on a pipeline rank: more than one is Megatron's interleaved schedule."""
    cp: Ranks = 1
    """Context parallelism: ranks that share a sample's positions."""
    dp: Ranks = 1
    """Data parallelism: replicas, each with its share of the samples."""
    ep: Ranks = 1
    """Experts of a layer are split over this many ranks of a stage."""
    etp: Ranks | None = None
    """Tensor parallelism of an expert; default tp, and 1 where ep splits the experts."""

    @model_validator(mode="after")
    def _ranks_can_be(self) -> ParallelConfig:
        if self.world_size > MOST_RANKS:
            raise ValueError(f"tp x pp x cp x dp is {self.world_size} ranks; {MOST_RANKS} at most")
        return self

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def expert_tp(self) -> int:
        return self.etp or (self.tp if self.ep == 1 else 1)


class StudentConfig(Model):
    model: LocalPath
    """HF folder: initial weights and tokenizer."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the trained weights and of the export."""
    parallel: ParallelConfig = ParallelConfig()
    """Ranks of the student."""
    freeze_router: bool = False
    """Experts are chosen as before; their bias moves only at a moe_router_bias_update_rate."""
    mtp: Literal["freeze", "drop"] = "freeze"
    """Heads that predict further tokens: carried unchanged into every export, or left out.  They
    are not trained.
    """
    bucket_bytes: Count = 256 << 20
    """Bytes of weights that a rank gathers at a time for the rollout engine and for an export; a larger
    tensor is gathered alone.
    """
    megatron: dict[str, Any] = {}
    """Fields of Megatron's TransformerConfig, DistributedDataParallelConfig and OptimizerConfig,
    verbatim.
    """


class TeacherParallel(Model):
    """A teacher's own mesh over all ranks; what tp does not take are replicas."""

    tp: Ranks | None = None
    """Default the student's."""
    ep: Ranks = 1
    """Experts of a layer are split over this many consecutive ranks."""


class TeacherConfig(Model):
    name: Name
    """Names the teacher in metrics and the report."""
    store: StoreLocation
    """Teacher store: a folder, or a URL like s3://bucket/teachers/code."""
    route: dict[str, FieldText]
    """Fields of a prompt that must all match."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of the loss, w_i; default 1 / number of teachers."""
    parallel: TeacherParallel = TeacherParallel()
    """The teacher's own layout."""


class OffloadConfig(Model):
    host_budget: Count = 4 << 30
    """Bytes per process for shares read ahead and kept between passes."""
    activation_budget: Count = 4 << 30
    """Bytes per process for activations between two layers; more waves beyond it."""
    batch_tokens: Items = 16384
    """Tokens of one forward through a layer."""
    reader_threads: Annotated[Whole, Field(ge=1, le=1024)] = 4
    """Threads per process that read a teacher's layers ahead."""
    offload_student: Literal["auto", "always", "never"] = "auto"
    """The student's gradients and optimizer state in host memory during a pass; auto: when the pass
    does not fit beside.
    """


class CacheConfig(Model):
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: the dtype of the teacher's stored weights."""


class OptimizerConfig(Model):
    lr: Annotated[float, Field(gt=0)]
    """Learning rate after warmup."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Where the decay ends."""
    warmup_steps: Annotated[Whole, Field(ge=0)] = 10
    """Train steps in which the rate rises from 0."""
    decay: Literal["linear", "cosine", "constant"] = "linear"
    """Form of the rate between warmup and the last train step."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW's."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.98
    """AdamW's."""
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the gradients; 0 does not clip."""

    @model_validator(mode="after")
    def _falls(self) -> OptimizerConfig:
        if self.min_lr > self.lr:
            raise ValueError(
                f"min_lr {self.min_lr} is above lr {self.lr}: the rate would rise to its end; lower "
                "it"
            )
        return self


class TrainConfig(Model):
    num_iterations: Turns
    """A later start of the run may have more."""
    train_steps_per_iteration: Items = 1
    """Optimizer updates; the iteration's samples are dealt to them."""
    micro_batch_size: Items | None = None
    """Samples of a micro-batch, padded to the longest of the train step."""
    token_budget: Items | None = None
    """Or tokens of a pack, samples one behind the other."""
    normalization: Literal["teacher_balanced", "token_mean", "sequence_mean"] = "teacher_balanced"
    """What a token's loss is divided by: tokens of its teacher, of all, or of its sample."""
    optimizer: OptimizerConfig
    """AdamW and its schedule."""
    sequence_filter: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    """Samples for which exp(mean |log-prob of trainer minus that of rollout|) is above this are not
    trained, 2 for example; costs a forward pass an iteration.  Default: all are trained.
    """
    max_bad_steps: Annotated[Whole, Field(ge=0)] = 0
    """Train steps with NaN or inf that are left out before the run stops."""

    @model_validator(mode="after")
    def _one_size(self) -> TrainConfig:
        if (self.micro_batch_size is None) == (self.token_budget is None):
            raise ValueError(
                "needs exactly one of micro_batch_size (samples, padded) and token_budget (tokens, "
                "packed)"
            )
        return self


class CheckpointConfig(Model):
    every: Count = 20
    """Iterations between checkpoints."""
    keep: Count = 2
    """Newest checkpoints that are kept."""
    export_every: Annotated[Whole, Field(ge=0)] = 0
    """Iterations between exports of the student as an HF folder, export/000020; 0: at the end only.
    They all stay.
    """


class ConsolidateConfig(Model):
    run_dir: LocalPath
    """Folder of everything the run writes; a start in it goes on."""
    seed: Seed = 0
    """Of sampling, of the order of prompts, of what is drawn."""
    log_json: bool = False
    """Metrics lines on standard output instead of a progress display."""
    deterministic: bool = True
    """Deterministic algorithms, and no option that makes a train step depend on the layout."""
    student: StudentConfig
    """The model that learns."""
    teachers: Annotated[list[TeacherConfig], Field(min_length=1)]
    """The models it learns from."""
    data: DataConfig
    """Prompts."""
    rollout: RolloutConfig
    """How responses are sampled."""
    teacher_offload: OffloadConfig = OffloadConfig()
    """How teachers are streamed."""
    hidden_cache: CacheConfig = CacheConfig()
    """The teachers' last hidden states on disk."""
    train: TrainConfig
    """Train steps."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Accuracy on held-out prompts."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""

    @model_validator(mode="after")
    def _cross_checks(self) -> ConsolidateConfig:
        names = [t.name for t in self.teachers]
        if len(set(names)) != len(names):
            raise ValueError(f"teacher names must differ, found {names}")
        samples = self.rollout.samples_per_iteration
        steps = self.train.train_steps_per_iteration
        if samples > _MOST_SAMPLES:
            raise ValueError(
                f"an iteration has {samples} samples (rollout.prompts_per_iteration x "
                f"samples_per_prompt), each rank plans all of them: {_MOST_SAMPLES} at most; lower "
                "one, and raise train.num_iterations"
            )
        if self.rollout.carry_over and samples * self.train.num_iterations > _MOST_NUMBERED:
            raise ValueError(
                f"train.num_iterations {self.train.num_iterations} x {samples} samples is more than the "
                f"{_MOST_NUMBERED} that rollout.carry_over can number through; lower one, or leave "
                "carry_over out"
            )
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
        if self.rollout.min_response > self.data.max_response:
            raise ValueError(
                f"rollout.min_response {self.rollout.min_response} is above data.max_response "
                f"{self.data.max_response}; no response could end"
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
        if unclear := [
            n for n in baselines if not n.strip() or n != n.strip() or not n.isprintable()
        ]:
            raise ValueError(
                f"evaluation.baselines: the name {unclear[0]!r} is empty, or has spaces around it or "
                "characters that do not print"
            )
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
        averaged = self.evaluation.weight_average
        if len(averaged) != len({*averaged}):
            raise ValueError(
                f"evaluation.weight_average names one twice, which would not be the plain average: "
                f"{averaged}"
            )
        if unknown := set(averaged) - set(self.evaluation.baselines):
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
