"""Run directories: the lock, seals by generation."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import multiprocessing.synchronize
import os
import signal
from pathlib import Path

import pytest

from mtopd.manifest import start_run
from mtopd.run_dir import SEAL, RunDir, is_sealed, numbered, read_seal
from mtopd.types import MtopdError


def test_an_older_start_cannot_seal(tmp_path: Path) -> None:
    old, new = RunDir(tmp_path / "run"), RunDir(tmp_path / "run")
    with old.lock():
        start_run(old, {"a": 1}, {}, "a: 1\n")
    with new.lock():
        start_run(new, {"a": 1}, {}, "a: 1\n")
    assert (old.generation, new.generation) == (1, 2)
    folder = tmp_path / "run" / "part"
    folder.mkdir()
    with pytest.raises(MtopdError, match=r"start 1 .* start 2 has taken over"):
        old.seal(folder)
    assert not is_sealed(folder)
    new.seal(folder, {"files": 3})
    assert read_seal(folder) == {"schema": 1, "generation": 2, "files": 3}


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


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(MtopdError, match=r"/run: its file system has no locks .*another file sys"),
        RunDir(tmp_path / "run").lock(),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "said"),
    [("file", "it is a file"), ("file/run", "Not a directory"), ("x" * 300, "long")],
)
def test_what_cannot_be_a_folder_is_named(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(MtopdError, match=f"cannot write to the run directory .*{name}: .*{said}"),
        RunDir(tmp_path / name).lock(),
    ):
        pass


def test_a_folder_of_somebody_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    """A run sweeps temporary files, and writes config.yaml and manifest.json."""
    home = tmp_path / "home"
    home.mkdir()
    for name, text in {
        "config.yaml": "mine",
        "manifest.json": '{"manifest_version": 3}',
        ".thesis.doc.tmp": "unsaved",
    }.items():
        (home / name).write_text(text)
    before = {path.name: path.read_bytes() for path in home.iterdir()}
    with (
        pytest.raises(MtopdError, match=r"home is no run directory .*holds config\.yaml, manifest"),
        RunDir(home).lock(),
    ):
        pass
    assert {path.name: path.read_bytes() for path in home.iterdir()} == before


def test_an_empty_folder_and_what_a_refused_start_left_are_taken(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    (tmp_path / "lost+found").mkdir()
    for _ in range(2):
        with run.lock():
            assert not run.is_ours()
    with run.lock():
        start_run(run, {}, {}, "")
        assert run.is_ours()
    run.manifest.write_text("damaged")
    (tmp_path / "generation.json").write_text('{"generation": "1"}')
    with run.lock(), pytest.raises(MtopdError, match="holds no number"):
        run.current_generation()


def test_copies_beside_what_a_run_has_numbered_are_not_looked_at(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for name in ("000010", "000002", "1234567", "000011", "000010.bak", "10", "000010 (copy)"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        if name != "000011":
            (tmp_path / "checkpoints" / name / SEAL).write_text("{}")
    assert run.sealed_checkpoints() == [2, 10, 1234567]
    for name in ("000003.json", "000003.old.json", "final.json"):
        (tmp_path / name).write_text("{}")
    assert numbered(tmp_path, ".json") == {3: tmp_path / "000003.json"}
    assert numbered(tmp_path / "nothing") == {}


def test_a_sweep_leaves_another_run_alone_that_lies_inside(tmp_path: Path) -> None:
    """It may be writing its checkpoint."""
    names = (
        ".manifest.json.1-a.tmp",
        "checkpoints/.000004.tmp/x",
        "iterations/.000001.a.removed/x",
    )
    kept = ("specialist/checkpoints/.000100.tmp/x", "specialist/.config.yaml.1-a.tmp")
    for name in (*names, *kept):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    RunDir(tmp_path).sweep()
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == set(kept)
