"""The config file: unknown keys, overrides, cross-field checks with both numbers, numbers as YAML
writes them.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from mtopd.config import ConsolidateConfig
from mtopd.config_file import _models_in, load_config, resolved, to_yaml, validate
from mtopd.config_specialist import SpecialistConfig
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
    if not path:
        return {**values, **value}  # type: ignore[dict-item]
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
            "unknown key 'train.num_iteration' (did you mean 'num_iterations'?)",
        ),
        ("teachers.1.stroe", "x", "unknown key 'teachers.1.stroe' (did you mean 'store'?)"),
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
        ("evaluation.baselines", {"student": "x"}, "the report calls another row so"),
        (
            "",
            {
                "evaluation": {"baselines": {"base": "hf"}},
                "teachers": [{"name": "base", "store": "a", "route": {}}],
            },
            "call the teacher otherwise",
        ),
        (
            "data.sources",
            [
                {"name": "x", "path": "x.jsonl", "eval_path": "y.jsonl"},
                {"name": "x-eval", "path": "y.jsonl"},
            ],
            "name 'x-eval' is that of the held-out prompts of source 'x'; choose another",
        ),
        ("train.optimizer", {"lr": 1e-5, "min_lr": 1e-3}, "min_lr 0.001 is above lr 1e-05"),
        (
            "evaluation",
            {"baselines": {"p": "hf", "q": "hg"}, "weight_average": ["p", "q", "p"]},
            "weight_average names one twice, which would not be the plain average",
        ),
        ("evaluation.baselines", {" ": "x"}, "evaluation.baselines: the name ' ' is empty"),
        ("teachers.0.name", "../x", "teachers.0.name is '../x'"),
        ("teachers", [], "teachers"),
        (
            "train.token_budget",
            512,
            "exactly one of micro_batch_size (samples, padded) and token_budget",
        ),
        ("train", {**GOOD["train"], "micro_batch_size": None}, "exactly one of micro_batch_size"),
        ("train", PACKED, "token_budget 60 does not hold a sample of data.context_length 64"),
        ("evaluation.temperature", -1, "evaluation.temperature is -1"),
        ("evaluation.temperature", float("nan"), "evaluation.temperature is nan"),
        ("evaluation", {"temperature": 1.0, "top_p": 0}, "evaluation.top_p is 0"),
        ("evaluation", {"temperature": 1.0, "top_p": 1.01}, "evaluation.top_p is 1.01"),
        ("evaluation.top_p", 0.9, "evaluation: top_p 0.9 does nothing at temperature 0"),
        ("evaluation.every", 5, "evaluation.every needs held-out prompts, but no source has any"),
        ("evaluation.temperature", 0.5, "evaluation.temperature needs held-out prompts"),
        ("student.mtp", "train", "student.mtp is 'train'"),
        ("teachers.0.store", "s3://user:secret@host/t", "teachers.0.store: a store's URL is"),
        ("teachers.0.store", ["s3://user:secret@host/t"], "teachers.0.store: a path is a text"),
        ("rollout", ["s3://user:secret@host/t"], "rollout is list"),
        # what is no number, count or truth value is none, however it could be read
        ("data.max_response", "8", "data.max_response is '8': Input should be a valid integer"),
        ("data.max_response", True, "data.max_response is True"),
        ("data.max_response", 8.5, "data.max_response is 8.5"),
        ("data.max_response", 1 << 60, f"data.max_response is {1 << 60}"),
        ("seed", 1 << 32, "seed is 4294967296"),
        ("seed", -1, "seed is -1"),
        ("deterministic", 1, "deterministic is 1"),
        ("deterministic", "false", "deterministic is 'false'"),
        ("train.optimizer.lr", "1e-3", "train.optimizer.lr is '1e-3'"),
        ("train.optimizer.lr", True, "train.optimizer.lr is True"),
        ("train.optimizer.lr", math.nan, "train.optimizer.lr is nan"),
        ("train.optimizer.adam_beta2", 1.0, "train.optimizer.adam_beta2 is 1.0"),
        ("teachers.0.route", {"domain": [7]}, "teachers.0.route.domain: is list"),
        ("evaluation", None, "evaluation is None: it must be a table of settings"),
        ("run_dir", "", "run_dir: path '' is empty"),
        ("run_dir", "run ", "run_dir: path 'run ' is empty, or has spaces around it"),
        ("student.model", "a\nb", "student.model: path 'a\\nb'"),
        ("student.model", "a\0b", "student.model: path 'a\\x00b'"),
        ("student.model", "$no_such_variable/x", "variable $no_such_variable is not set"),
        ("student.model", "~no-such-user/x", "there is no such user"),
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


SUPERVISED: dict[str, Any] = {
    "run_dir": "run",
    "student": {"model": "hf"},
    "data": {
        "sources": [
            {"name": "drawn", "reasoning_gym": "chain_sum"},
            {"name": "filed", "path": "f.jsonl"},
        ],
        "context_length": 64,
        "max_response": 16,
    },
    "train": {
        "num_steps": 100,
        "global_batch_size": 4,
        "micro_batch_size": 4,
        "optimizer": {"lr": 1e-3},
    },
}


def stopping(eval_path: str | None, **stop: Any) -> dict[str, Any]:
    values = copy.deepcopy(SUPERVISED)
    values["data"]["sources"][1]["eval_path"] = eval_path
    values["train"]["stop"] = {"accuracy": 0.5, **stop}
    return values


def test_a_store_and_a_run_stand_beside_each_other() -> None:
    for path in ("run", "run/export", "."):
        with pytest.raises(MtopdError, match="a store is no part of a run, nor a run of a store"):
            validate({**SUPERVISED, "store": {"name": "s", "path": path}}, SpecialistConfig, "c")
    validate({**SUPERVISED, "store": {"name": "s", "path": "run2"}}, SpecialistConfig, "c")


def test_a_stop_that_cannot_come_is_refused() -> None:
    for values, said in (
        (
            stopping(None),
            "train.stop looks at held-out prompts of every source, but data.sources.1 ('filed')",
        ),
        (
            stopping("e.jsonl", first=100, every=11),
            "first looked at after step 110, but train.num_steps is 100",
        ),
    ):
        with pytest.raises(MtopdError) as error:
            validate(values, SpecialistConfig, "c.yaml")
        assert said in str(error.value) and "\n" not in str(error.value)
    for steps in ({"first": 95}, {"first": 95, "every": 11}):  # at step 100, at step 99
        validate(stopping("e.jsonl", **steps), SpecialistConfig, "c.yaml")


def test_checkpoints_of_a_specialist_count_train_steps() -> None:
    def checkpoint(**values: int) -> tuple[int, int]:
        config = validate({**SUPERVISED, "checkpoint": values}, SpecialistConfig, "c")
        return config.checkpoint.every, config.checkpoint.keep

    assert checkpoint() == (100, 2) and checkpoint(keep=3) == (100, 3)
    assert checkpoint(every=5) == (5, 2)


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
    bad_ones = ("seed", "teachers.5.name=x", "teachers.\u00b2.name=x", "train.num_iterations.x=1")
    for bad in (*bad_ones, "seed=[1", "seed={a: 1, a: 2}"):
        with pytest.raises(MtopdError, match="override"):
            load_config(path, [bad], ConsolidateConfig)


def test_every_unknown_key_is_named_with_where_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    values = {**spoiled("train.num_iteration", 9), "sede": 1, "log_json": 3}
    path.write_text(yaml.safe_dump(values))
    overrides = ["rollout.samples=3", "evaluation.evry=2", "teachers.1={stroe: x}", "seed=1"]
    with pytest.raises(MtopdError) as error:
        load_config(path, overrides, ConsolidateConfig)
    given, in_file = str(error.value).split(f"; {path}: ")
    for key in ("teachers.1.stroe", "rollout.samples", "evaluation.evry"):
        assert f"unknown key {key!r} (" in given
    for key in ("train.num_iteration", "sede"):
        assert f"unknown key {key!r} (did you mean" in in_file
    assert given.startswith("the command line: ")
    assert in_file.endswith(" (and 4 more)")  # log_json, and what the second teacher lacks

    path.write_text(yaml.safe_dump(GOOD))
    with pytest.raises(MtopdError, match=r"^the command line: train\.num_iterations is 'x': "):
        load_config(path, ["train.num_iterations=x"], ConsolidateConfig)
    many = [f"student.parallel.k{i}=1" for i in range(1000)]
    with pytest.raises(MtopdError) as error:
        load_config(path, many, ConsolidateConfig)
    assert len(str(error.value)) < 5000 and str(error.value).endswith("(and 980 more)")


def test_an_override_of_a_list_names_its_entries(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    for count, said in ((0, "0 entries;"), (1, "1 entry: 0;"), (2, "2 entries: 0 and 1;")):
        path.write_text(yaml.safe_dump({**GOOD, "teachers": GOOD["teachers"][:count]}))
        for key in (f"teachers.{count}.name", f"teachers.{count}"):
            with pytest.raises(MtopdError, match=f"teachers has {said} '{count}' is none of them"):
                load_config(path, [f"{key}=x"], ConsolidateConfig)
    path.write_text(yaml.safe_dump({**GOOD, "teachers": GOOD["teachers"] * 2}))
    with pytest.raises(MtopdError, match="teachers has 4 entries: 0 to 3; 'x' is none of them"):
        load_config(path, ["teachers.x=1"], ConsolidateConfig)


def test_an_override_undoes_no_other(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(GOOD) + "evaluation:\n")
    load_config(path, ["seed=1", "seed=1", "evaluation.weight_average=[]"], ConsolidateConfig)
    teacher = "teachers.0={name: c, store: c, route: {}}"
    load_config(path, ["evaluation={}", teacher, "teachers.0.name=d"], ConsolidateConfig)
    for pair in (["seed=1", "seed=2"], ["teachers.0.name=d", teacher]):
        with pytest.raises(MtopdError, match="undoes"):
            load_config(path, pair, ConsolidateConfig)


def test_whole_numbers_may_be_written_as_floats_and_errors_are_counted() -> None:
    config = validate(spoiled("data.context_length", 1e4), ConsolidateConfig, "c")
    assert config.data.context_length == 10000 and isinstance(config.data.context_length, int)
    values = spoiled("seed", "x")
    values["deterministic"] = values["log_json"] = 3
    with pytest.raises(MtopdError, match=r"^c: seed is 'x': .* \(and 2 more\)$"):
        validate(values, ConsolidateConfig, "c")


def test_paths_mean_what_a_shell_user_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "far" / "work").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "work")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MODELS", "models")
    for text, meant in {
        "hf": tmp_path / "hf",
        "./a/../hf": tmp_path / "hf",
        "~/hf": tmp_path / "home" / "hf",
        "a~/hf": tmp_path / "a~" / "hf",
        "$MODELS/${MODELS}": tmp_path / "models" / "models",
        "/hf": Path("/hf"),
    }.items():
        values = spoiled("student.model", text)
        values["teachers"][0]["store"] = text
        config = validate(values, ConsolidateConfig, "c")
        assert config.student.model == meant and config.teachers[0].store == str(meant)
    linked = validate(spoiled("student.model", "link/../hf"), ConsolidateConfig, "c").student.model
    assert os.path.realpath(linked) == str(tmp_path / "far" / "hf"), ".. of where a link leads"


def test_exponents_without_a_dot_are_numbers_and_tags_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(GOOD).replace("lr: 0.001", "lr: 1e-3"))
    assert load_config(path, [], ConsolidateConfig).train.optimizer.lr == 1e-3
    path.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(MtopdError, match=r"line 1: not valid YAML: tag .*os\.system"):
        load_config(path, [], ConsolidateConfig)


def test_a_resolved_config_loads_to_itself(tmp_path: Path) -> None:
    config = validate(spoiled("teachers.1.store", "s3://bucket/teachers/b"), ConsolidateConfig, "c")
    assert [t.store for t in config.teachers] == [str(Path.cwd() / "a"), "s3://bucket/teachers/b"]
    config.teachers[1].route.update({"domain": "1e3", "level": "012", "day": "2026-01-02"})
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "c.yaml", [], ConsolidateConfig) == config


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "launch" / "configs").glob("*.yaml")), ids=lambda p: p.name
)
def test_the_shipped_configs_are_valid(path: Path) -> None:
    load_config(
        path, [], ConsolidateConfig if "teachers:" in path.read_text() else SpecialistConfig
    )


def counts_of(kind: type[BaseModel], path: str = "") -> Iterator[str]:
    """Every setting of a root that takes a whole number, by its path in ROOTS."""
    for name, field in kind.model_fields.items():
        where = f"{path}{name}"
        for inner in _models_in(field.annotation):
            place = f"{where}.0." if get_origin(field.annotation) is list else f"{where}."
            yield from counts_of(inner, place)
        kinds = {field.annotation}
        if get_origin(field.annotation) in (Union, UnionType):  # Items | None
            kinds |= {*get_args(field.annotation)}
        if int in {get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in kinds}:
            yield where


# What may be any number: a bound of memory, or of what is compared with a counter.
FREE = {
    "seed",
    "data.sources.0.seed",
    "data.sources.0.eval_seed",
    "teacher_offload.host_budget",
    "teacher_offload.activation_budget",
    "train.optimizer.warmup_steps",
    "train.max_bad_steps",
    "evaluation.every",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.export_every",
    "student.bucket_bytes",
    "train.stop.every",
    "train.stop.first",
}
DRAWN = {"name": "s", "reasoning_gym": "leg_counting"}
SPECIALIST: dict[str, Any] = {
    "run_dir": "run",
    "student": {"model": "hf"},
    "data": {"sources": [DRAWN], "context_length": 64, "max_response": 16},
    "train": {
        "num_steps": 4,
        "global_batch_size": 4,
        "micro_batch_size": 4,
        "optimizer": {"lr": 1e-3},
    },
    "store": {"name": "t", "path": "t"},
}
COUNTS = [
    *(("consolidate", path) for path in counts_of(ConsolidateConfig)),
    *(("specialist", path) for path in counts_of(SpecialistConfig)),
]


@pytest.mark.parametrize(("root", "path"), COUNTS)
def test_an_absurd_count_is_refused_when_the_config_is_read(root: str, path: str) -> None:
    """Nothing is drawn, planned or started for it: that would hang, or fill the memory."""
    if path in FREE:
        return
    is_specialist = root == "specialist"
    values = copy.deepcopy(SPECIALIST if is_specialist else GOOD)
    values["data"]["sources"] = [dict(DRAWN)]
    if ".environment." in path:
        values["data"]["sources"][0]["environment"] = {"python": "module:function"}
    kind: Any = SpecialistConfig if is_specialist else ConsolidateConfig
    *parents, leaf = path.split(".")
    for absurd in (10**12, 10**15):
        table = values
        for part in parents:
            table = table[int(part)] if part.isdigit() else table.setdefault(part, {})
        table[leaf] = absurd
        with pytest.raises(
            MtopdError, match=rf"^file: .*{leaf} is {absurd}: .* less than or equal"
        ):
            validate(values, kind, "file")


def test_servers_are_named_as_they_are_reached() -> None:
    two = ["http://host-1:30000", "https://[::1]:8443/"]
    rollout = {**GOOD["rollout"], "engine": "sglang", "servers": two}
    config = validate(spoiled("rollout", rollout), ConsolidateConfig, "file")
    assert config.rollout.servers == ["http://host-1:30000", "https://[::1]:8443"]
    for url in ("host:1", "ftp://h:1", "http://h", "http://h:0", "http://h:99999", "http://h:1/v1"):
        one = {**rollout, "servers": [url]}
        with pytest.raises(
            MtopdError, match=r"rollout\.servers\.0: a server's URL is http://host:p"
        ):
            validate(spoiled("rollout", one), ConsolidateConfig, "file")
    with pytest.raises(MtopdError) as refused:
        one = {**rollout, "servers": ["http://me:secret@h:1"]}
        validate(spoiled("rollout", one), ConsolidateConfig, "file")
    assert "secret" not in str(refused.value)
    for servers, said in (([], "sglang needs servers"), ([two[0], f"{two[0]}/"], "-1:30000 twice")):
        with pytest.raises(MtopdError, match=said):
            one = {**rollout, "servers": servers}
            validate(spoiled("rollout", one), ConsolidateConfig, "file")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("servers", ["http://h:1"]),
        ("seeded", False),
        ("open_per_server", 4),
        ("silence_s", 5),
        ("patience_s", 9),
        ("python", "/opt/sglang/bin/python"),
        ("num_servers", 2),
        ("server_tp", 2),
        ("server_args", {"mem-fraction-static": 0.8}),
    ],
)
def test_what_only_servers_know_is_refused_without_them(key: str, value: object) -> None:
    rollout = {**GOOD["rollout"], key: value}
    with pytest.raises(MtopdError, match=f"rollout: {key} has no effect with engine embedded"):
        validate(spoiled("rollout", rollout), ConsolidateConfig, "file")


def test_teachers_read_beside_a_rollout_of_servers_only() -> None:
    asked = {**GOOD["rollout"], "overlap_teacher_pass": True}
    with pytest.raises(MtopdError, match="with engine embedded all ranks answer"):
        validate(spoiled("rollout", asked), ConsolidateConfig, "file")
    servers = {"engine": "sglang", "servers": ["http://h:1"]}
    config = validate(spoiled("rollout", {**asked, **servers}), ConsolidateConfig, "file")
    assert config.rollout.overlap_teacher_pass


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"servers": "auto"}, r"servers: auto needs python: "),
        ({"servers": "atuo"}, r"rollout\.servers is 'atuo': .*'auto'"),
        ({"servers": 3}, r"rollout\.servers is 3: .*'auto'"),
        ({"servers": ["auto"]}, r"rollout\.servers\.0: a server's URL is"),
        (
            {"servers": ["http://h:1"], "num_servers": 2},
            r"num_servers has no effect on servers that",
        ),
        ({"servers": ["http://h:1"], "python": "/p"}, r"python has no effect on servers that"),
    ],
)
def test_servers_that_a_run_starts(changes: dict[str, object], said: str) -> None:
    rollout = {**GOOD["rollout"], "engine": "sglang"}
    auto = {"servers": "auto", "python": "/venv/bin/python", "num_servers": 2}
    config = validate(spoiled("rollout", {**rollout, **auto}), ConsolidateConfig, "file")
    assert config.rollout.servers == "auto" and config.rollout.num_servers == 2
    assert validate(resolved(config), ConsolidateConfig, "file") == config
    with pytest.raises(MtopdError, match=said):
        validate(spoiled("rollout", {**rollout, **changes}), ConsolidateConfig, "file")


def test_overlap_needs_servers_and_staleness() -> None:
    rollout = {**GOOD["rollout"], "overlap": "one_step"}
    servers = {"engine": "sglang", "servers": ["http://h:1"]}
    good = {**rollout, **servers, "max_staleness": 1}
    config = validate(spoiled("rollout", good), ConsolidateConfig, "file")
    assert config.rollout.overlap == "one_step"
    for changed, said in (
        ({**rollout, "max_staleness": 1}, "rollout: overlap one_step needs engine sglang: the emb"),
        (
            {**rollout, **servers},
            "rollout: overlap one_step needs max_staleness 1 or more, found 0",
        ),
        ({**good, "overlap": "two"}, "rollout.overlap is 'two'"),
    ):
        with pytest.raises(MtopdError, match=said):
            validate(spoiled("rollout", changed), ConsolidateConfig, "file")


def test_partial_rollouts_need_servers_staleness_and_an_iteration_that_is_larger() -> None:
    servers = {"engine": "sglang", "servers": ["http://h:1"]}
    good = {**GOOD["rollout"], **servers, "max_staleness": 1, "carry_over": 1}
    samples = good["prompts_per_iteration"] * good.get("samples_per_prompt", 1)
    assert samples > 1
    for count in (1, samples - 1):
        found = validate(
            spoiled("rollout", {**good, "carry_over": count}), ConsolidateConfig, "file"
        )
        assert found.rollout.carry_over == count
    for changes, said in (
        ({"carry_over": samples}, f"carry_over {samples} is not below the {samples} samples of an"),
        ({"max_staleness": 0}, "carry_over 1 needs max_staleness 1 or more, found 0"),
        ({"overlap": "one_step"}, "carry_over 1 is not for overlap one_step"),
        ({"overlap_teacher_pass": True}, "carry_over 1 is not for overlap_teacher_pass"),
    ):
        with pytest.raises(MtopdError, match=f"rollout: {said}"):
            validate(spoiled("rollout", {**good, **changes}), ConsolidateConfig, "file")
    embedded = {**GOOD["rollout"], "max_staleness": 1, "carry_over": 1}
    with pytest.raises(MtopdError, match="rollout: carry_over 1 needs engine sglang: of the ranks"):
        validate(spoiled("rollout", embedded), ConsolidateConfig, "file")
    endless = {**spoiled("rollout", good), "train": {**GOOD["train"], "num_iterations": 10**9}}
    if samples * 10**9 > 1 << 32:
        with pytest.raises(MtopdError, match="more than the 4294967296 that rollout"):
            validate(endless, ConsolidateConfig, "file")


def test_counts_that_are_absurd_together_are_refused() -> None:
    for path, value, said in (
        (
            "rollout",
            {"prompts_per_iteration": 1 << 20, "samples_per_prompt": 1 << 20},
            "1099511627",
        ),
        ("student.parallel", {"tp": 1 << 10, "dp": 1 << 20}, "is 1073741824 ranks; 1048576 at"),
    ):
        with pytest.raises(MtopdError, match=said):
            validate(spoiled(path, value), ConsolidateConfig, "file")
    longest = {**GOOD["data"], "context_length": 1 << 24, "max_response": 1 << 20}
    validate(spoiled("data", longest), ConsolidateConfig, "file")
