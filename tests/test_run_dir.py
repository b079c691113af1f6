"""Run directories: atomic files, seals by generation, the lock, what is refused."""

from __future__ import annotations

import multiprocessing
import multiprocessing.synchronize
import os
import signal
from pathlib import Path

import pytest

from mtopd.run_dir import RunDir, first_difference, is_sealed, read_seal, remove_tree, sweep, write_atomic
from mtopd.types import MtopdError


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    with pytest.raises(MtopdError, match=f"in use by host .* pid {holder.pid}"), RunDir(tmp_path / "run").lock():
        pass
    holder.kill()
    holder.join(10)
    with RunDir(tmp_path / "run").lock():
        pass


def test_sweep_takes_leftovers_only(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for name in (".a.json.12-ab.tmp", "kept.json", "iterations/.000001.abcd.removed/x", "checkpoints/.000002.tmp/y"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    sweep(run)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == ["kept.json"]


def test_remove_tree_goes_in_one_visible_step(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    remove_tree(tmp_path / "folder")
    remove_tree(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_first_difference_names_the_place() -> None:
    assert first_difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}) is None
    assert first_difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}) == "a[1].b is 2 there and 3 here"
    assert first_difference({"a": 1}, {}) == "a is only in the run directory"
    assert first_difference({}, {"a": 1}) == "a is only in this config"
