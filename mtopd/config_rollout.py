"""Answers in a config: what samples the student's responses, and how held-out prompts are answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mtopd.config_values import Items, LocalPath, Model, Ranks, Servers, Whole

# of rollouts: for servers that a run starts; all that only SGLang servers know
STARTED_KEYS = ("python", "num_servers", "server_tp", "server_args")
SERVER_KEYS = (
    "servers",
    "weights",
    "seeded",
    "open_per_server",
    "silence_s",
    "patience_s",
    *STARTED_KEYS,
)


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
    weights: Literal["broadcast", "disk"] = "broadcast"
    """How weights get to SGLang servers: broadcast over the network, or disk, files in the run
    directory, where servers cannot connect to the trainer but see its file system.
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
    overlap: Literal["none", "one_step"] = "none"
    """one_step: SGLang servers answer the next iteration's prompts while this one's teacher pass and
    training go on; what is still open when the weights change goes on with the new ones.
    """
    max_staleness: Annotated[Whole, Field(ge=0, le=1 << 31)] = 0
    """Tokens that were sampled by weights more than so many iterations old get loss mask 0 and are
    counted; their response stays.  overlap one_step and carry_over need 1.
    """
    carry_over: Annotated[Whole, Field(ge=0, le=1 << 24)] = 0
    """Partial rollouts: an iteration ends while so many of its responses are still open on SGLang servers.
    They go on in the next one with its weights, and are trained where they end; none is dropped.
    """
    overlap_teacher_pass: bool = False
    """The teacher pass begins while SGLang servers still answer: as soon as a quarter of the iteration's
    samples is sealed, teachers read it.  The trained weights are the same; a teacher may be streamed
    up to four times an iteration.
    """

    @property
    def samples_per_iteration(self) -> int:
        return self.prompts_per_iteration * self.samples_per_prompt

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

    @model_validator(mode="after")
    def _overlaps(self) -> RolloutConfig:
        if self.overlap_teacher_pass and self.engine != "sglang":
            raise ValueError(
                f"overlap_teacher_pass needs engine sglang: with engine {self.engine} all ranks answer, "
                "and none could read meanwhile; leave it out, or set engine sglang"
            )
        if self.overlap == "none":
            return self
        if self.engine != "sglang":
            raise ValueError(
                f"overlap {self.overlap} needs engine sglang: the {self.engine} engine answers on the "
                "ranks that train; leave it out, or set engine sglang"
            )
        if self.max_staleness < 1:
            raise ValueError(
                f"overlap {self.overlap} needs max_staleness 1 or more, found {self.max_staleness}: "
                "responses begin with weights that are one iteration old when they are trained, and "
                "those tokens would all be left out; set max_staleness: 1"
            )
        return self

    @model_validator(mode="after")
    def _carries_over(self) -> RolloutConfig:
        if not self.carry_over:
            return self
        what, samples = f"carry_over {self.carry_over}", self.samples_per_iteration
        if self.engine != "sglang":
            raise ValueError(
                f"{what} needs engine sglang: of the ranks on which the {self.engine} engine answers none "
                "knows when enough responses have ended; leave it out, or set engine sglang"
            )
        if self.max_staleness < 1:
            raise ValueError(
                f"{what} needs max_staleness 1 or more, found {self.max_staleness}: a response that goes "
                "on in the next iteration begins with older weights, and those tokens would all be left "
                "out; set max_staleness: 1"
            )
        if self.carry_over >= samples:
            raise ValueError(
                f"{what} is not below the {samples} samples of an iteration (prompts_per_iteration x "
                "samples_per_prompt): a response could wait for several iterations before it begins; "
                "lower it"
            )
        if self.overlap != "none":
            raise ValueError(
                f"{what} is not for overlap {self.overlap}, where responses that are open when the "
                "weights change go on already; leave one of them out"
            )
        if self.overlap_teacher_pass:
            raise ValueError(
                f"{what} is not for overlap_teacher_pass: it begins with samples that are known "
                "beforehand, here those that end first are an iteration's; leave one of them out"
            )
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
