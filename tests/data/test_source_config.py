"""The config of a source: what has no effect is refused, numbers and booleans are text."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtopd.config import TeacherConfig
from mtopd.config_file import load_config, resolved, to_yaml, validate
from mtopd.config_specialist import SpecialistConfig
from mtopd.types import MtopdError

VALUES = {
    "run_dir": "r",
    "student": {"model": "m"},
    "train": {
        "num_steps": 1,
        "global_batch_size": 1,
        "micro_batch_size": 1,
        "optimizer": {"lr": 1e-3},
    },
}


def config(**source: object) -> SpecialistConfig:
    data = {"sources": [{"name": "x", **source}], "context_length": 8, "max_response": 4}
    return validate({**VALUES, "data": data}, SpecialistConfig, "c.yaml")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "a.jsonl", "eval_size": 256}, "eval_size has no effect on a file; .* eval_path"),
        ({"path": "a.jsonl", "train_size": 9}, "train_size has no effect on a file; leave it out"),
        ({"path": "a.jsonl", "seed": 0}, "seed has no effect on a file"),
        ({"path": "a.jsonl", "eval_seed": 1}, "eval_seed has no effect on a file"),
        ({"path": "a.jsonl", "config": {"n": 1}}, "config has no effect on a file"),
        ({"path": "a.jsonl", "num_examples": 1}, "num_examples has no effect .* as examples"),
        ({"path": "a.jsonl", "answer_from": "boxed"}, "answer_from has no effect without held-out"),
        ({"path": "a.jsonl", "normalize": ["case"]}, "normalize has no effect without held-out"),
        (
            {"reasoning_gym": "chain_sum", "eval_path": "a.jsonl"},
            "eval_path has no effect on a rea",
        ),
        ({"reasoning_gym": "chain_sum", "normalize": ["case"]}, "normalize has no effect on a rea"),
        (
            {"reasoning_gym": "chain_sum", "config": {"seed": 1}},
            r"config\.seed is set by the source",
        ),
        ({"path": "a.jsonl", "reasoning_gym": "b"}, "needs exactly one of path and reasoning_gym"),
        ({}, "needs exactly one of path and reasoning_gym"),
        ({"path": "a.jsonl", "system": ""}, "system"),
        ({"path": "a.jsonl", "answer_from": "last"}, "answer_from: is 'last'; it must be last_num"),
        (
            {"path": "a.jsonl", "answer_from": {"tag": "<a>"}},
            "answer_from: tag '<a>' is given with",
        ),
        ({"path": "a.jsonl", "answer_from": {"tag": "a", "regex": "b"}}, "answer_from: is "),
        ({"path": "a.jsonl", "fields": {"level": None}}, r"fields\.level: is empty"),
        ({"path": "a.jsonl", "fields": {"level": [1]}}, r"fields\.level: is list"),
        ({"path": "a.jsonl", "fields": {"level": float("nan")}}, r"fields\.level: nan is no value"),
        ({"path": "a.jsonl", "examples": [{"question": "q"}]}, r"examples\.0\.answer is missing"),
        (
            {"path": "a.jsonl", "examples": [{"question": "q", "answer": 2.5}]},
            r"examples\.0\.answer: is the number 2\.5, .* \(2\.50\); quote it",
        ),
        (
            {"reasoning_gym": "b", "num_examples": 1, "examples": [{"question": 1, "answer": 2}]},
            "at most one of examples and num_examples",
        ),
    ],
)
def test_what_says_nothing_is_refused(source: dict, message: str) -> None:
    with pytest.raises(MtopdError, match=message):
        config(**source)


def test_numbers_and_booleans_are_the_text_that_files_give() -> None:
    fields = {"level": 3, "share": 3.0, "hard": True, "name": "3.0"}
    (source,) = config(path="a.jsonl", fields=fields).data.sources
    assert source.fields == {"level": "3", "share": "3", "hard": "true", "name": "3.0"}


@pytest.mark.parametrize(
    "source",
    [
        {"path": "a.jsonl"},
        {
            "path": "a.jsonl",
            "eval_path": "b.jsonl",
            "system": "s",
            "examples": [{"question": "2+2?", "answer": 4}],
            "answer_from": {"regex": r"is (\d+)"},
            "normalize": ["number"],
        },
        {"reasoning_gym": "chain_sum", "seed": 0, "num_examples": 2, "answer_from": "last_number"},
    ],
)
def test_a_config_that_was_written_down_is_read_again(source: dict, tmp_path: Path) -> None:
    first = config(**source)
    (tmp_path / "c.yaml").write_text(to_yaml(first))
    again = load_config(tmp_path / "c.yaml", [], SpecialistConfig)
    assert resolved(again)["data"]["sources"][0].keys() == first.data.sources[0].model_dump().keys()
    sizes = ("train_size", "eval_size", "seed", "eval_seed", "examples", "answer_from", "normalize")
    for key in sizes:
        assert getattr(again.data.sources[0], key) == getattr(first.data.sources[0], key)
    drawn = first.data.sources[0]
    if drawn.reasoning_gym:
        assert [drawn.draw(key) for key in sizes[:4]] == [20_000, 256, 0, 10_000_019]


def test_a_teacher_is_routed_by_numbers_and_booleans_too() -> None:
    teacher = TeacherConfig.model_validate(
        {"name": "t", "store": "s", "route": {"level": 3.0, "hard": False}}
    )
    assert teacher.route == {"level": "3", "hard": "false"}
