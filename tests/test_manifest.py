"""The manifest of a run: which changes a later start may bring, which make it another run."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from mtopd.files import read_json
from mtopd.manifest import check_accepted, check_schema, differences, start_run
from mtopd.megatron.options import FREE_MEGATRON
from mtopd.run_dir import RunDir
from mtopd.types import MtopdError


def test_another_config_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with run.lock():
        start_run(run, {"train": {"lr": 1e-3}, "teachers": ["a"]}, {"tokenizer_hash": "x"}, "text")
        before = run.manifest.read_bytes()
        with pytest.raises(MtopdError, match=r"config\.train\.lr is 0\.001 there and 0\.005 here"):
            start_run(
                run, {"train": {"lr": 5e-3}, "teachers": ["a"]}, {"tokenizer_hash": "x"}, "text"
            )
        with pytest.raises(MtopdError, match="tokenizer_hash"):
            start_run(
                run, {"train": {"lr": 1e-3}, "teachers": ["a"]}, {"tokenizer_hash": "y"}, "text"
            )
    assert run.manifest.read_bytes() == before and run.current_generation() == 1


def test_differences_name_their_places() -> None:
    def texts(found: object, wanted: object) -> list[str]:
        return [text for _, text in differences(found, wanted)]

    assert texts({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}) == []
    assert texts({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}) == ["a[1].b is 2 there and 3 here"]
    assert texts({"a": 1}, {}) == ["a is only in the run directory"]
    assert texts({"c": 1}, {"a": 1, "c": 2}) == [
        "a is only in this config",
        "c is 1 there and 2 here",
    ]


CONFIG = {
    "student": {
        "model": "base",
        "parallel": {"tp": 2},
        "megatron": {"bucket_size": 7, "adam_eps": 1e-5},
    },
    "teachers": [{"name": "t", "store": "s", "route": {"domain": "a"}, "parallel": {"tp": 2}}],
    "train": {"micro_batch_size": 8, "normalization": "token_mean"},
}
MANIFEST = {"tokenizer_hash": "h", "teachers": [{"name": "t", "fingerprint": "f"}]}
MEGATRON = [("config", "student", "megatron", option) for option in FREE_MEGATRON]


def changed(path: list, value: object) -> tuple[dict, dict]:
    both = {"config": copy.deepcopy(CONFIG), **copy.deepcopy(MANIFEST)}
    inner = both
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = value
    return both.pop("config"), both


@pytest.mark.parametrize(
    "path",
    [
        ["config", "student", "model"],  # known by its content
        ["config", "student", "parallel", "tp"],
        ["config", "student", "megatron", "bucket_size"],
        ["config", "student", "megatron", "recompute_modules"],
        ["config", "student", "megatron", "num_layers_in_last_pipeline_stage"],
        ["config", "teachers", 0, "parallel", "tp"],
        ["config", "teachers", 0, "store"],
        ["config", "train", "micro_batch_size"],
    ],
)
def test_a_later_start_may_have_another_layout(tmp_path: Path, path: list) -> None:
    run = RunDir(tmp_path)
    assert start_run(run, CONFIG, MANIFEST, "old") == []
    assert start_run(run, *changed(path, 1), "new", free=MEGATRON) == []
    assert run.config.read_text() == "new" and run.generation == 2
    assert read_json(run.manifest)["config"] == changed(path, 1)[0]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["tokenizer_hash"], "other"),
        (["teachers", 0, "fingerprint"], "other"),
        (["config", "teachers", 0, "route"], {"domain": "b"}),
        (["config", "teachers"], []),
    ],
)
def test_other_teachers_routes_or_tokenizers_need_a_word(
    tmp_path: Path, path: list, value: object
) -> None:
    run, dropped = RunDir(tmp_path), []
    start_run(run, CONFIG, MANIFEST, "old")
    with pytest.raises(MtopdError, match=r"have changed: .* --accept-changed"):
        start_run(run, *changed(path, value), "new", drop_unfinished=lambda: dropped.append(1))
    assert not dropped and run.config.read_text() == "old"
    found = start_run(
        run,
        *changed(path, value),
        "new",
        accept_changed=True,
        drop_unfinished=lambda: dropped.append(read_json(run.manifest)),
    )
    assert len(found) == 1 and len(dropped) == 1 and dropped[0]["config"] == CONFIG, (
        "dropped before it is written down"
    )
    assert read_json(run.manifest)["accepted_changes"] == [{"start": 2, "change": found[0]}]
    assert start_run(run, *changed(path, value), "new") == [], "known from now on"


def test_a_checkpoint_of_other_teachers_needs_a_word_given_after_it(tmp_path: Path) -> None:
    run, folder = RunDir(tmp_path), tmp_path / "000001"
    folder.mkdir()
    start_run(run, CONFIG, MANIFEST, "old")
    run.seal(folder)
    check_accepted(run, folder, {"teachers": ["a"]}, {"teachers": ["a"]})
    with pytest.raises(
        MtopdError, match=r"000001 .* teachers\[0\] is 'a' there and 'b' here, no start accepted"
    ):
        check_accepted(run, folder, {"teachers": ["a"]}, {"teachers": ["b"]})
    start_run(run, *changed(["tokenizer_hash"], "other"), "new", accept_changed=True)
    check_accepted(run, folder, {"teachers": ["a"]}, {"teachers": ["b"]})
    run.seal(folder)  # a checkpoint made after the word was given
    with pytest.raises(MtopdError, match="no start accepted"):
        check_accepted(run, folder, {"teachers": ["a"]}, {"teachers": ["b"]})


@pytest.mark.parametrize(
    "path",
    [
        ["config", "student", "megatron", "adam_eps"],
        ["config", "student", "megatron", "hidden_dropout"],
        ["config", "student", "megatron", "moe_router_dtype"],
        ["config", "train", "normalization"],
    ],
)
def test_another_run_is_refused_with_or_without_a_word(tmp_path: Path, path: list) -> None:
    run = RunDir(tmp_path)
    start_run(run, CONFIG, MANIFEST, "old")
    for accept in (False, True):
        with pytest.raises(MtopdError, match=rf"belongs to another run: config\..*{path[-1]}"):
            start_run(run, *changed(path, "other"), "new", free=MEGATRON, accept_changed=accept)


def test_options_of_megatron_are_free_only_as_the_caller_says(tmp_path: Path) -> None:
    run, option = RunDir(tmp_path), ["config", "student", "megatron", "bucket_size"]
    start_run(run, CONFIG, MANIFEST, "old")
    with pytest.raises(MtopdError, match=r"another run: config\.student\.megatron\.bucket_size"):
        start_run(run, *changed(option, 8), "new")


def inputs(**sha256: str) -> dict:
    return {name: {"path": f"/{name}", "sha256": text} for name, text in sha256.items()}


def test_changed_inputs_are_named_and_moved_ones_are_the_same(tmp_path: Path) -> None:
    run, before = RunDir(tmp_path), inputs(prompts="aa", student="bb", tokenizer="cc")
    start_run(run, CONFIG, {"inputs": before}, "old")
    moved = {name: {**entry, "path": f"/new{entry['path']}"} for name, entry in before.items()}
    assert start_run(run, CONFIG, {"inputs": moved}, "new") == []
    for now, said in (
        (
            {**before, **inputs(prompts="xx")},
            r"^/prompts \(prompts\) is not what .*/new/prompts: .*aa",
        ),
        ({**before, **inputs(extra="xx")}, r"^/extra \(extra\) is new"),
        (inputs(prompts="aa", tokenizer="cc"), r"^/new/student \(student\) is gone"),
    ):
        with pytest.raises(MtopdError, match=f"{said}.*; put it back, or choose another run_dir"):
            start_run(run, CONFIG, {"inputs": now}, "other", accept_changed=True)
    assert run.config.read_text() == "new"
    other = {**moved, **inputs(tokenizer="xx")}
    with pytest.raises(MtopdError, match=r"changed: /tokenizer \(tokenizer\).*--accept-changed"):
        start_run(run, CONFIG, {"inputs": other}, "other")
    assert len(start_run(run, CONFIG, {"inputs": other}, "other", accept_changed=True)) == 1


def test_a_run_of_another_version_is_not_gone_on_with(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    start_run(run, CONFIG, MANIFEST, "old")
    check_schema(run)
    for text, said in (
        (json.dumps({"schema": 1, "config": {}}), "schema 1, .* writes 2"),
        ("3", "None"),
    ):
        run.manifest.write_text(text)
        for begin in (check_schema, lambda run: start_run(run, CONFIG, MANIFEST, "new")):
            with pytest.raises(MtopdError, match=said):
                begin(run)
    run.note_ranks()
    run.manifest.unlink()
    with pytest.raises(MtopdError, match=r"has lost its manifest\.json"):
        check_schema(run)


@pytest.mark.parametrize(
    "edit",
    [
        {"config": 3},
        {"inputs": []},
        {"inputs": {"x": 3}},
        {"inputs": {"x": {"path": "/x"}}},
        {"accepted_changes": {}},
        {"accepted_changes": [{"start": "2"}]},
    ],
)
def test_an_edited_manifest_is_refused(tmp_path: Path, edit: dict) -> None:
    run = RunDir(tmp_path)
    start_run(run, CONFIG, MANIFEST, "old")
    run.manifest.write_text(json.dumps(read_json(run.manifest) | edit))
    with pytest.raises(MtopdError, match="was edited"):
        start_run(run, CONFIG, MANIFEST, "new")
