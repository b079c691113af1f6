"""The YAML file of a run as pydantic models.  An unknown key is an error that names the nearest
known one, and whether it stands in the file or on the command line.

Two roots: ``ConsolidateConfig`` (many teachers into one student) and ``SpecialistConfig``
(supervised training of one model, which may end as a teacher store).  A path is what a shell user
means: ~ and $NAME are expanded, a relative one begins at the current folder.  After loading nothing
changes a config.  Objectives, clips and weights of policy-gradient methods do not exist here: the
loss is exact.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import reprlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from mtopd.types import MtopdError, plain_text
from mtopd.yaml_file import dump_yaml, parse_yaml, read_yaml

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]

_MOST_SAMPLES = 1 << 24  # of an iteration
_MOST_RANKS = 1 << 20
_SHOWN_ERRORS = 20


def _whole(value: object) -> object:
    # 1e4 is a float to YAML and a count to everybody else.
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
# A bound is far above what anybody needs and far below what would hang a start, or fill its memory.
Count = Annotated[Whole, Field(ge=1, le=1 << 53)]  # of bytes, or of what is never counted up to
Items = Annotated[Whole, Field(ge=1, le=1 << 24)]  # that are held one by one: prompts, tokens
Ranks = Annotated[Whole, Field(ge=1, le=_MOST_RANKS)]
Turns = Annotated[Whole, Field(ge=1, le=10**9)]  # of a loop: iterations, train steps
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


def _server_url(value: object) -> str:
    # The message does not repeat the value: it may carry a password.
    refusal = ValueError("a server's URL is http://host:port or https://host:port, and no more")
    if not isinstance(value, str) or not value.isprintable():
        raise refusal
    try:
        parts = urlsplit(value)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise refusal from None
    alone = f"{parts.scheme}://{parts.netloc}"
    if parts.scheme not in ("http", "https") or not host or not port or "@" in alone:
        raise refusal
    if value.rstrip("/") != alone or any(mark.isspace() for mark in alone):
        raise refusal
    return alone


def _field_text(value: Any) -> Any:
    # A prompt's field from a file is text; YAML makes numbers and booleans of what looks like them.
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no value of a field")
    if isinstance(value, bool | int | float):
        return plain_text(value)
    if not isinstance(value, str):
        kind = "empty" if value is None else type(value).__name__
        raise ValueError(f"is {kind}; it must be text, a number, or true or false")
    return value


FieldText = Annotated[str, BeforeValidator(_field_text)]


# a folder, or a URL: s3://bucket/teachers/code
StoreLocation = Annotated[str, BeforeValidator(_store_location)]
ServerUrl = Annotated[str, BeforeValidator(_server_url)]
_SERVERS = "addresses", "word"  # how pydantic tells the two forms apart
Servers = Annotated[
    Annotated[list[ServerUrl], Tag(_SERVERS[0])] | Annotated[Literal["auto"], Tag(_SERVERS[1])],
    Discriminator(lambda value: _SERVERS[not isinstance(value, list)]),
]


class Model(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,  # docs/config.md is made of them
    )


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
        if self.world_size > _MOST_RANKS:
            raise ValueError(f"tp x pp x cp x dp is {self.world_size} ranks; {_MOST_RANKS} at most")
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


class ExampleConfig(Model):
    """A question and its answer, shown as two chat turns in front of every prompt."""

    question: FieldText
    """What the user says."""
    answer: FieldText
    """What the assistant answers."""


def _answer_from(value: Any) -> Any:
    if value in ("last_number", "boxed", None):
        return value
    if (
        isinstance(value, dict)
        and len(value) == 1
        and set(value) <= {"tag", "regex"}
        and all(isinstance(text, str) and text for text in value.values())
    ):
        if not re.fullmatch(r"[\w-]+", value.get("tag", "_")):
            raise ValueError(f"tag {value['tag']!r} is given without brackets: {{tag: answer}}")
        return value
    raise ValueError(
        f"is {value!r}; it must be last_number, boxed, {{tag: NAME}} or {{regex: PATTERN}}"
    )


AnswerFrom = Annotated[str | dict[str, str], BeforeValidator(_answer_from)]


class EnvironmentConfig(Model):
    """What replies to the student between its turns; docs/data.md has the callable's contract."""

    python: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")]
    """An installed Python callable, module:function, called with each turn that the student ends."""
    max_turns: Annotated[Whole, Field(ge=2, le=1 << 16)] = 8
    """Turns of the student in a response; nobody replies to the last."""
    timeout_s: Annotated[float, Field(gt=0, le=1e6)] = 60.0
    """Seconds of one call; one that takes longer ends the response, as an exception does."""
    threads: Annotated[Whole, Field(ge=1, le=1024)] = 16
    """Calls at once, on each rank."""


_DRAWS = {"train_size": 20_000, "eval_size": 256, "seed": 1, "eval_seed": 10_000_019}
_LEAVE = "leave it out"
_INSTEAD = {
    "eval_size": f"{_LEAVE}, or give held-out prompts as eval_path",
    "num_examples": "write them down as examples",
}


class SourceConfig(Model):
    """Prompts of one origin: a file, or a reasoning-gym dataset.  docs/data.md has examples."""

    name: Name
    """Names the source in prompt ids, metrics and the report."""
    path: LocalPath | None = None
    """File of training prompts (.jsonl, .jsonl.gz, .jsonl.zst, .json or .parquet); or give
    reasoning_gym.
    """
    eval_path: LocalPath | None = None
    """File of held-out prompts."""
    reasoning_gym: str | None = None
    """Name of a reasoning-gym dataset, which draws training and held-out prompts."""
    config: dict[str, Any] = {}
    """Options of the reasoning-gym dataset."""
    fields: dict[str, FieldText] = {}
    """Fields that every prompt of the source has for routing, where its row has none of that name.
    """
    train_size: Items | None = None
    """Training prompts drawn from a reasoning-gym dataset; default 20000."""
    eval_size: Items | None = None
    """Held-out prompts drawn from a reasoning-gym dataset; default 256."""
    seed: Seed | None = None
    """Of the training prompts that a reasoning-gym dataset draws; default 1."""
    eval_seed: Seed | None = None
    """Of its held-out prompts; default 10000019."""
    system: Annotated[str, Field(min_length=1)] | None = None
    """System message in front of every prompt."""
    examples: list[ExampleConfig] = []
    """Worked examples in front of every prompt, each as two chat turns."""
    num_examples: Items | None = None
    """Or: so many worked examples, drawn from the reasoning-gym dataset."""
    answer_from: AnswerFrom | None = None
    """Where a response has its answer: last_number, boxed, {tag: NAME} or {regex: PATTERN}; default
    all of it.
    """
    normalize: list[Literal["latex", "punctuation", "space", "case", "number"]] = []
    """What the comparison with a file's answers overlooks."""
    environment: EnvironmentConfig | None = None
    """Replies to the student between its turns; without it a response is one turn."""

    @model_validator(mode="before")
    @classmethod
    def _fill_draws(cls, values: Any) -> Any:
        """Defaults are written down where they say something: of a dataset."""
        if isinstance(values, dict) and values.get("reasoning_gym") is not None:
            given = {key: value for key, value in values.items() if value is not None}
            return {**_DRAWS, **given}
        return values

    @property
    def has_held_out(self) -> bool:
        return self.reasoning_gym is not None or self.eval_path is not None

    @model_validator(mode="after")
    def _one_origin(self) -> SourceConfig:
        if (self.path is None) == (self.reasoning_gym is None):
            raise ValueError("needs exactly one of path and reasoning_gym")
        if self.path is not None:
            for key in ("config", *_DRAWS, "num_examples"):
                if getattr(self, key) not in (None, {}):
                    raise ValueError(f"{key} has no effect on a file; {_INSTEAD.get(key, _LEAVE)}")
            for key in ("answer_from", "normalize"):
                if getattr(self, key) and self.eval_path is None:
                    raise ValueError(
                        f"{key} has no effect without held-out prompts; give eval_path, or {_LEAVE}"
                    )
        elif self.eval_path is not None or self.normalize:
            key = "normalize" if self.normalize else "eval_path"
            raise ValueError(
                f"{key} has no effect on a reasoning_gym dataset, which "
                f"{'scores answers itself' if self.normalize else 'draws its held-out prompts'}; "
                f"{_LEAVE}"
            )
        elif taken := {"size", "seed"} & self.config.keys():
            raise ValueError(
                f"config.{min(taken)} is set by the source: use train_size and eval_size, seed and "
                "eval_seed beside config"
            )
        if self.examples and self.num_examples:
            raise ValueError("needs at most one of examples and num_examples")
        return self

    def draw(self, key: str) -> int:
        """train_size, eval_size, seed or eval_seed of a dataset."""
        value = getattr(self, key)
        assert isinstance(value, int), f"{key} of a file"
        return value


class DataConfig(Model):
    sources: Annotated[list[SourceConfig], Field(min_length=1)]
    """Where prompts come from; each iteration takes equally many of each."""
    context_length: Items
    """Prompt + response tokens of a sample."""
    max_response: Items
    """Tokens that a response may have."""
    overlong: Literal["error", "drop"] = "error"
    """Prompts that leave no room for the response: all named in one error, or left out and counted.
    """

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
        # Prompts are told apart by these names: a-eval/0 is the first held-out prompt of a.
        held_out = {f"{s.name}-eval" for s in self.sources if s.has_held_out}
        if taken := held_out & {*names}:
            name = min(taken)
            raise ValueError(
                f"the source name {name!r} is that of the held-out prompts of source "
                f"{name.removesuffix('-eval')!r}; choose another"
            )
        return self


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


# of rollouts: for servers that a run starts; all that only SGLang servers know
STARTED_KEYS = ("python", "num_servers", "server_tp", "server_args")
SERVER_KEYS = ("servers", "seeded", "open_per_server", "silence_s", "patience_s", *STARTED_KEYS)


class RolloutConfig(Model):
    engine: Literal["embedded", "sglang"] = "embedded"
    """What samples responses: a transformers model on each rank, or SGLang servers."""
    servers: Servers = []
    """Addresses of the SGLang servers; auto: those that `mtopd serve` keeps up for this run directory
    or, where it does not, servers that the run starts on its first host and ends with itself.
    """
    python: LocalPath | None = None
    """For servers auto: the Python of the environment that has SGLang."""
    num_servers: Ranks = 1
    """For servers auto: how many are started."""
    server_tp: Ranks = 1
    """For servers auto: GPUs that share a server's model (tensor parallelism)."""
    server_args: dict[str, Any] = {}
    """For servers auto: further flags of SGLang's launch_server, without the dashes in front; true for
    a flag without a value.
    """
    seeded: bool = True
    """A draw of the SGLang servers follows from seed and position, so that a response that is
    continued is the one it would have been; false for servers without
    --enable-deterministic-inference: then it is one of the same distribution.
    """
    open_per_server: Items = 128
    """Responses that one SGLang server answers at a time."""
    silence_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds without a token after which a response is asked for again, of any server."""
    patience_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds to wait for SGLang servers at a start, and while none answers."""
    prompts_per_iteration: Items
    """A multiple of the number of sources."""
    samples_per_prompt: Items = 1
    """Responses to each prompt."""
    batch_size: Items = 96
    """Samples that are sealed together, and that the embedded engine answers together: its unit of
    replay.
    """
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """A response also ends once its text holds one of these (evaluation cuts it before).  Its
    tokens are what the student sampled: they stay in the response and are trained, no EOS is added.
    """
    stop_ids: list[Annotated[Whole, Field(ge=0, lt=1 << 31)]] = []
    """Further tokens that end a response, beside those that the student's folder names."""
    min_response: Annotated[Whole, Field(ge=0, le=1 << 31)] = 0
    """A response does not end before so many tokens: an end token or stop string before is a token
    like any other, no distribution is changed for it.
    """

    def _refuse(self, keys: Sequence[str], why: str) -> None:
        """Raise ValueError for one of ``keys`` that has been set: it would do nothing."""
        for key in keys:
            if getattr(self, key) != RolloutConfig.model_fields[key].default:
                raise ValueError(f"{key} has no effect {why}")

    @model_validator(mode="after")
    def _servers_have_effect(self) -> RolloutConfig:
        if self.engine == "sglang":
            if not self.servers:
                raise ValueError(
                    "engine sglang needs servers: auto, or a list of addresses like "
                    "http://host:30000"
                )
            if self.servers == "auto":
                if self.python is None:
                    raise ValueError(
                        "servers: auto needs python: the Python of the environment that has SGLang, "
                        "e.g. /opt/sglang/bin/python"
                    )
                return self
            self._refuse(
                STARTED_KEYS,
                "on servers that are there already; leave it out, or set servers: auto",
            )
            if twice := {url for url in self.servers if self.servers.count(url) > 1}:
                raise ValueError(f"servers names {min(twice)} twice; name each server once")
            return self
        self._refuse(SERVER_KEYS, f"with engine {self.engine}; leave it out, or set engine sglang")
        return self

    @model_validator(mode="before")
    @classmethod
    def _is_exact(cls, values: object) -> object:
        changing = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"}
        changing |= {"frequency_penalty", "presence_penalty", "logit_bias"}
        found = sorted(changing & {*values}) if isinstance(values, dict) else []
        if found:
            raise ValueError(
                f"{found[0]} would change the distribution that responses are drawn from: exact "
                "distillation trains on the student's own tokens, drawn at temperature 1 without a "
                "filter; leave it out (evaluation.temperature and evaluation.top_p are for held-out "
                "prompts)"
            )
        return values


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


class SamplingConfig(Model):
    """How held-out prompts are answered: by default the most likely token.  Rollouts are always the
    student's own distribution.
    """

    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """0 takes the most likely token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Tokens are drawn from the fewest most likely ones that hold this probability together."""

    @model_validator(mode="after")
    def _takes_effect(self) -> SamplingConfig:
        if self.temperature == 0 and self.top_p < 1:
            raise ValueError(
                f"top_p {self.top_p} does nothing at temperature 0, which takes the most likely "
                "token; set a temperature above 0, or leave top_p out"
            )
        return self


class EvaluationConfig(SamplingConfig):
    every: Annotated[Whole, Field(ge=0)] = 0
    """Iterations between evaluations; 0: only before the first and after the last."""
    baselines: dict[str, LocalPath] = {}
    """HF folders evaluated beside the student, by name; "base" and the teachers' names give the
    recovery.
    """
    baselines_at_end: bool = True
    """After the last iteration; false: only `mtopd evaluate RUN --baselines` evaluates them."""
    weight_average: list[str] = []
    """Names of baselines whose plain average is evaluated too."""


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
        samples = self.rollout.prompts_per_iteration * self.rollout.samples_per_prompt
        steps = self.train.train_steps_per_iteration
        if samples > _MOST_SAMPLES:
            raise ValueError(
                f"an iteration has {samples} samples (rollout.prompts_per_iteration x "
                f"samples_per_prompt), each rank plans all of them: {_MOST_SAMPLES} at most; lower "
                "one, and raise train.num_iterations"
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


class StopConfig(Model):
    """Stop when accuracy on the held-out prompts of *every* source lies within ``accuracy``
    +- ``tolerance``.

    A source's share of the mini-batch follows how far it is below ``accuracy``; one that is above
    gets ``min_share`` of it, so that sources which learn at different speeds arrive together.
    """

    accuracy: Annotated[float, Field(gt=0, le=1)]
    """The target."""
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """How far from it still counts."""
    every: Count = 10
    """Train steps between two looks."""
    first: Count = 50
    """Train steps before the first look."""
    min_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of a mini-batch that a source above the target keeps."""


class TeacherStoreConfig(Model):
    name: Name
    """The teacher's name."""
    path: LocalPath
    """Folder of the store."""
    slices: Items | Literal["auto"] = 1
    """Largest tensor-parallel size that can load it without a copy; auto: as many as the model has,
    up to 8.
    """


class SupervisedConfig(Model):
    num_steps: Turns
    """A later start of the run may have more."""
    global_batch_size: Items
    """Samples of a train step."""
    micro_batch_size: Items
    """Samples of one forward pass of a rank."""
    optimizer: OptimizerConfig
    """AdamW and its schedule."""
    stop: StopConfig | None = None
    """End early, by accuracy."""


class SupervisedCheckpointConfig(Model):
    every: Count = 100
    """Train steps between checkpoints."""
    keep: Count = 2
    """Newest checkpoints that are kept."""


class SpecialistConfig(Model):
    run_dir: LocalPath
    """Folder of everything the run writes; a start in it goes on."""
    seed: Seed = 0
    """Of mini-batches and of what is drawn."""
    log_json: bool = False
    """Metrics lines on standard output instead of a progress display."""
    student: StudentConfig
    """The model that is trained."""
    data: DataConfig
    """Examples: prompts with answers."""
    train: SupervisedConfig
    """Train steps."""
    evaluation: SamplingConfig = SamplingConfig()
    """How held-out prompts are answered."""
    checkpoint: SupervisedCheckpointConfig = SupervisedCheckpointConfig()
    """Checkpoints."""
    store: TeacherStoreConfig | None = None
    """Write the result as a teacher, too."""

    @model_validator(mode="after")
    def _answers_are_one_turn(self) -> SpecialistConfig:
        for i, source in enumerate(self.data.sources):
            if source.environment is not None:
                raise ValueError(
                    f"data.sources.{i}.environment has no effect here: a specialist learns the answers "
                    f"in its rows; {_LEAVE}"
                )
        return self

    @model_validator(mode="after")
    def _store_stands_beside(self) -> SpecialistConfig:
        run, store = self.run_dir, self.store
        if store is not None and (store.path.is_relative_to(run) or run.is_relative_to(store.path)):
            raise ValueError(
                f"store.path {store.path} and run_dir {run}: a store is no part of a run, nor a run "
                "of a store; give it a folder of its own"
            )
        return self

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
    given = {place for override in overrides for place in _override(values, override)}
    return validate(values, kind, str(path), given)


def validate(
    values: dict[str, Any], kind: type[Root], where: str, given: Collection[str] = ()
) -> Root:
    """The config of a file's ``values``; ``given`` names those that the command line put there.

    Raises MtopdError that names every unknown key, or else the first error.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as refusal:
        found: list[dict[str, Any]] = [
            {**one, "loc": tuple(part for part in one["loc"] if part not in _SERVERS)}
            for one in refusal.errors()
        ]
    unknown = [error for error in found if error["type"] == "extra_forbidden"]
    shown = (unknown or found)[: _SHOWN_ERRORS if unknown else 1]
    lines: dict[str, list[str]] = {}
    for error in shown:
        lines.setdefault(_origin(error["loc"], where, given), []).append(_explain(error, kind))
    also = f" (and {len(found) - len(shown)} more)" if len(found) > len(shown) else ""
    raise MtopdError("; ".join(f"{o}: {', '.join(said)}" for o, said in lines.items()) + also)


def _origin(loc: Sequence[int | str], where: str, given: Collection[str]) -> str:
    """What a value at ``loc`` came from."""
    places = (".".join(map(str, loc[:end])) for end in range(1, len(loc) + 1))
    return "the command line" if any(place in given for place in places) else where


def _check_overrides(overrides: Sequence[str]) -> None:
    """No override may undo one before it."""
    given: dict[str, str] = {}
    for override in overrides:
        key, _, _ = override.partition("=")
        for before, text in given.items():
            if (before == key or before.startswith(f"{key}.")) and text != override:
                raise MtopdError(f"override {override!r} undoes {text!r}; give one of them")
        given[key] = override


def _override(values: dict[str, Any], override: str) -> list[str]:
    """Put one value into the tables.  The places that were not there before, or hold another value
    now.
    """
    key, separator, text = override.partition("=")
    if not separator:
        raise MtopdError(f"override {override!r} must look like key.sub=value")
    value = parse_yaml(text, f"override {override!r:.200}")
    *parents, leaf = key.split(".")
    table: Any = values
    passed: list[str] = []
    given: list[str] = []
    for part in parents:
        place = _place(part, table, passed, override)
        passed.append(str(place))
        if isinstance(table, dict) and table.get(place) is None:
            table[place] = {}
            given.append(".".join(passed))
        table = table[place]
    place = _place(leaf, table, passed, override)
    table[place] = value
    return [*given, ".".join([*passed, str(place)])]


def _place(part: str, table: Any, passed: Sequence[str], override: str) -> int | str:
    """Where in ``table``, which stands at ``passed``, an override goes on.  Raises MtopdError."""
    if isinstance(table, dict):
        return part
    here = ".".join(passed)
    if not isinstance(table, list):
        raise MtopdError(f"override {override!r}: {here!r} is not a table in the config")
    if re.fullmatch(r"[0-9]{1,9}", part) is None or int(part) >= len(table):
        last = len(table) - 1
        numbers = {0: ": 0", 1: ": 0 and 1"}.get(last, f": 0 to {last}" if table else "")
        entries = "entry" if len(table) == 1 else "entries"
        raise MtopdError(
            f"override {override!r}: {here} has {len(table)} {entries}{numbers}; {part!r} is none "
            "of them"
        )
    return int(part)


def _explain(error: Any, kind: type[BaseModel]) -> str:
    where = ".".join(str(p) for p in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _known_keys(kind, error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = (
            f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(sorted(known))}"
        )
        return f"unknown key {where!r} ({hint})"
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
