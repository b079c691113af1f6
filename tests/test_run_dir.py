"""Run directories: atomic files, seals by generation, the lock, what is refused."""

from __future__ import annotations

import copy
import multiprocessing
import multiprocessing.synchronize
import os
import signal
from pathlib import Path

import pytest

from mtopd.run_dir import (
    SEAL,
    RunDir,
    differences,
    is_sealed,
    read_json,
    read_seal,
    remove_tree,
    replace_tree,
    sweep,
    write_atomic,
)
from mtopd.types import MtopdError


def test_a_failed_write_leaves_the_old_file_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    write_atomic(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_an_older_start_cannot_seal(tmp_path: Path) -> None:
    old, new = RunDir(tmp_path / "run"), RunDir(tmp_path / "run")
    with old.lock():
        old.start({"a": 1}, {}, "a: 1\n")
    with new.lock():
        new.start({"a": 1}, {}, "a: 1\n")
    assert (old.generation, new.generation) == (1, 2)
    folder = tmp_path / "run" / "part"
    folder.mkdir()
    with pytest.raises(MtopdError, match=r"start 1 .* start 2 has taken over"):
        old.seal(folder)
    assert not is_sealed(folder)
    new.seal(folder, {"files": 3})
    assert read_seal(folder) == {"schema": 1, "generation": 2, "files": 3}


def test_another_config_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with run.lock():
        run.start({"train": {"lr": 1e-3}, "teachers": ["a"]}, {"tokenizer_hash": "x"}, "text")
        before = run.manifest.read_bytes()
        with pytest.raises(MtopdError, match=r"config\.train\.lr is 0\.001 there and 0\.005 here"):
            run.start({"train": {"lr": 5e-3}, "teachers": ["a"]}, {"tokenizer_hash": "x"}, "text")
        with pytest.raises(MtopdError, match="tokenizer_hash"):
            run.start({"train": {"lr": 1e-3}, "teachers": ["a"]}, {"tokenizer_hash": "y"}, "text")
    assert run.manifest.read_bytes() == before and run.current_generation() == 1


def _hold(path: Path, held: multiprocessing.synchronize.Event) -> None:
    with RunDir(path).lock():
        held.set()
        signal.pause()


def test_the_lock_dies_with_its_holder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "run", held))
    holder.start()
    assert held.wait(30)
    with (
        pytest.raises(MtopdError, match=f"in use by host .* pid {holder.pid}"),
        RunDir(tmp_path / "run").lock(),
    ):
        pass
    holder.kill()
    holder.join(10)
    with RunDir(tmp_path / "run").lock():
        pass


def test_sweep_takes_leftovers_only(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for name in (
        ".a.json.12-ab.tmp",
        "kept.json",
        "iterations/.000001.abcd.removed/x",
        "checkpoints/.000002.tmp/y",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    sweep(run)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == [
        "kept.json"
    ]


def test_remove_tree_goes_in_one_visible_step(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    remove_tree(tmp_path / "folder")
    remove_tree(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def _kill_at_rename(number: int) -> None:
    """SIGKILL instead of this process's rename number ``number``, from 0."""
    rename, done = os.replace, iter(range(number))

    def replace(*paths: Path) -> None:
        if next(done, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*paths)

    os.replace = replace


@pytest.mark.parametrize(("number", "survives"), [(0, "old"), (1, "old"), (2, "new"), (3, "new")])
def test_a_checkpoint_that_is_replaced_survives_a_kill_or_its_successor_does(
    tmp_path: Path, number: int, survives: str
) -> None:
    run = RunDir(tmp_path, generation=1)
    target, partial = run.checkpoint(3), run.checkpoint(3).with_name(".000003.tmp")
    for folder, text in ((target, "old"), (partial, "new")):
        folder.mkdir(parents=True)
        (folder / SEAL).write_text(text)
    child = os.fork()
    if not child:
        try:
            _kill_at_rename(number)
            replace_tree(partial, target)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) == (number < 3), "three renames: aside, into place, out of sight"
    for _ in range(2):
        sweep(run)
        assert [path.name for path in target.parent.iterdir()] == ["000003"] and (
            target / SEAL
        ).read_text() == survives


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
    assert run.start(CONFIG, MANIFEST, "old") == []
    assert run.start(*changed(path, 1), "new") == []
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
    run.start(CONFIG, MANIFEST, "old")
    with pytest.raises(MtopdError, match=r"have changed: .* --accept-changed"):
        run.start(*changed(path, value), "new", drop_unfinished=lambda: dropped.append(1))
    assert not dropped and run.config.read_text() == "old"
    found = run.start(
        *changed(path, value),
        "new",
        accept_changed=True,
        drop_unfinished=lambda: dropped.append(read_json(run.manifest)),
    )
    assert len(found) == 1 and len(dropped) == 1 and dropped[0]["config"] == CONFIG, (
        "dropped before it is written down"
    )
    assert read_json(run.manifest)["accepted_changes"] == [{"start": 2, "change": found[0]}]
    assert run.start(*changed(path, value), "new") == [], "known from now on"


def test_a_checkpoint_of_other_teachers_needs_a_word_given_after_it(tmp_path: Path) -> None:
    run, folder = RunDir(tmp_path), tmp_path / "000001"
    folder.mkdir()
    run.start(CONFIG, MANIFEST, "old")
    run.seal(folder)
    run.check_accepted(folder, {"teachers": ["a"]}, {"teachers": ["a"]})
    with pytest.raises(
        MtopdError, match=r"000001 .* teachers\[0\] is 'a' there and 'b' here, no start accepted"
    ):
        run.check_accepted(folder, {"teachers": ["a"]}, {"teachers": ["b"]})
    run.start(*changed(["tokenizer_hash"], "other"), "new", accept_changed=True)
    run.check_accepted(folder, {"teachers": ["a"]}, {"teachers": ["b"]})
    run.seal(folder)  # a checkpoint made after the word was given
    with pytest.raises(MtopdError, match="no start accepted"):
        run.check_accepted(folder, {"teachers": ["a"]}, {"teachers": ["b"]})


@pytest.mark.parametrize(
    "path",
    [
        ["config", "student", "model"],
        ["config", "student", "megatron", "adam_eps"],
        ["config", "student", "megatron", "hidden_dropout"],
        ["config", "student", "megatron", "moe_router_dtype"],
        ["config", "train", "normalization"],
    ],
)
def test_another_run_is_refused_with_or_without_a_word(tmp_path: Path, path: list) -> None:
    run = RunDir(tmp_path)
    run.start(CONFIG, MANIFEST, "old")
    for accept in (False, True):
        with pytest.raises(MtopdError, match=rf"belongs to another run: config\..*{path[-1]}"):
            run.start(*changed(path, "other"), "new", accept_changed=accept)
