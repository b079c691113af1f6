"""Run directories: the lock, seals by generation."""

from __future__ import annotations

import multiprocessing
import multiprocessing.synchronize
import signal
from pathlib import Path

import pytest

from mtopd.manifest import start_run
from mtopd.run_dir import RunDir, is_sealed, read_seal
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
