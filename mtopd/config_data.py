"""Prompts in a config: their sources, and how long a sample may be."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from mtopd.config_values import (
    FieldText,
    Items,
    LocalPath,
    Model,
    Name,
    Seed,
    ShownText,
    Whole,
)


class ExampleConfig(Model):
    """A question and its answer, shown as two chat turns in front of every prompt."""

    question: ShownText
    """What the user says."""
    answer: ShownText
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
