"""The config file: unknown keys, overrides, cross-field checks with both numbers, numbers as YAML
writes them.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtopd.config import ConsolidateConfig, SpecialistConfig, load_config, to_yaml, validate
from mtopd.types import MtopdError
from tests.conftest import REPOSITORY

GOOD: dict[str, Any] = {
    "run_dir": "run",
    "student": {"model": "hf", "parallel": {"tp": 2, "pp": 2}},
    "teachers": [
        {"name": "a", "store": "a", "route": {"domain": "a"}},
        {"name": "b", "store": "b", "route": {}},
    ],
    "data": {
        "sources": [{"name": "s", "path": "s.jsonl"}],
        "context_length": 64,
        "max_response": 16,
    },
    "rollout": {"prompts_per_iteration": 8},
    "train": {"num_iterations": 2, "micro_batch_size": 4, "optimizer": {"lr": 1e-3}},
}


PACKED = {**GOOD["train"], "micro_batch_size": None, "token_budget": 60}


def spoiled(path: str, value: object) -> dict[str, Any]:
    values: Any = copy.deepcopy(GOOD)
    *parents, leaf = path.split(".")
    table = values
    for part in parents:
        table = table[int(part)] if part.isdigit() else table.setdefault(part, {})
    table[leaf] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (
            "train.num_iteration",
            3,
            "unknown key 'train.num_iteration'; did you mean 'num_iterations'",
        ),
        ("teachers.1.stroe", "x", "unknown key 'teachers.1.stroe'; did you mean 'store'"),
        ("train.clip_ratio", 0.2, "unknown key 'train.clip_ratio'"),  # no policy-gradient options
        ("train.num_iterations", 0, "train.num_iterations is 0"),
        (
            "data.max_response",
            64,
            "max_response 64 leaves no room for a prompt in context_length 64",
        ),
        ("teachers.1.name", "a", "teacher names must differ"),
        ("train.train_steps_per_iteration", 9, "8 samples for 9 train steps"),
        ("teachers.0.parallel.ep", 3, "teachers.0.parallel.ep 3 does not divide the world size 4"),
        ("data.sources.0.reasoning_gym", "spell_backward", "exactly one of path and reasoning_gym"),
        ("evaluation.weight_average", ["z"], "names ['z']"),
        ("teachers.0.name", "../x", "teachers.0.name is '../x'"),
        ("teachers", [], "teachers"),
        (
            "train.token_budget",
            512,
            "exactly one of micro_batch_size (samples, padded) and token_budget",
        ),
        ("train", {**GOOD["train"], "micro_batch_size": None}, "exactly one of micro_batch_size"),
        ("train", PACKED, "token_budget 60 does not hold a sample of data.context_length 64"),
        ("student.mtp", "train", "student.mtp is 'train'"),
        ("teachers.0.store", "s3://user:secret@host/t", "teachers.0.store: a store's URL is"),
    ],
)
def test_what_cannot_work_is_refused(path: str, value: object, said: str) -> None:
    with pytest.raises(MtopdError) as error:
        validate(spoiled(path, value), ConsolidateConfig, "c.yaml")
    assert (
        said in str(error.value)
        and "\n" not in str(error.value)
        and "secret" not in str(error.value)
    )


def test_packed_samples_are_not_split_over_context_parallel_ranks() -> None:
    values = spoiled("train", {**PACKED, "token_budget": 128})
    validate(values, ConsolidateConfig, "c")
    values["student"]["parallel"]["cp"] = 2
    with pytest.raises(
        MtopdError, match=r"packs samples, which student\.parallel\.cp 2 does not split yet"
    ):
        validate(values, ConsolidateConfig, "c")


def test_teacher_weights_default_to_one_over_n() -> None:
    assert validate(copy.deepcopy(GOOD), ConsolidateConfig, "c").teacher_weights == [0.5, 0.5]
    assert validate(spoiled("teachers.0.weight", 0.9), ConsolidateConfig, "c").teacher_weights == [
        0.9,
        0.5,
    ]


def test_overrides_reach_into_tables_and_lists(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    config = load_config(
        path,
        ["train.optimizer.lr=2e-3", "teachers.1.route={domain: b}", "seed=7"],
        ConsolidateConfig,
    )
    assert (config.train.optimizer.lr, config.teachers[1].route, config.seed) == (
        2e-3,
        {"domain": "b"},
        7,
    )
    for bad in ("seed", "teachers.5.name=x", "train.num_iterations.x=1", "seed=[1"):
        with pytest.raises(MtopdError, match="override"):
            load_config(path, [bad], ConsolidateConfig)


def test_exponents_without_a_dot_are_numbers_and_tags_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(GOOD).replace("lr: 0.001", "lr: 1e-3"))
    assert load_config(path, [], ConsolidateConfig).train.optimizer.lr == 1e-3
    path.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(MtopdError, match="not valid YAML"):
        load_config(path, [], ConsolidateConfig)


def test_a_resolved_config_loads_to_itself(tmp_path: Path) -> None:
    config = validate(spoiled("teachers.1.store", "s3://bucket/teachers/b"), ConsolidateConfig, "c")
    assert [t.store for t in config.teachers] == ["a", "s3://bucket/teachers/b"]
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "c.yaml", [], ConsolidateConfig) == config


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "launch" / "configs").glob("*.yaml")), ids=lambda p: p.name
)
def test_the_shipped_configs_are_valid(path: Path) -> None:
    load_config(path, [], ConsolidateConfig if path.name == "demo.yaml" else SpecialistConfig)
