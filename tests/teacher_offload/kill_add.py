"""SIGKILL at random instants over ``teachers add``: what is half-written is never a store, what is
finished is reused.

Run ``python -m tests.teacher_offload.kill_add --kills 20``; ``run`` raises on any violation.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

from mtopd.convert.teacher import add_teacher
from mtopd.teacher_offload.store import check_files, damaged_blocks, open_store
from mtopd.teacher_offload.store_writer import adding_folder
from mtopd.types import MtopdError
from tests.small_models import save_model

_LAYERS = 12


def run(kills: int, folder: Path, seed: int) -> str:
    """Kill ``kills`` runs of ``teachers add``, each followed by others until one finishes; one line
    of results.
    """
    chance = random.Random(seed)
    save_model(folder / "hf", seed=1, hidden=128, layers=_LAYERS, tied=False)
    target = folder / "stores" / "t"
    # In this process, so that children need not import the libraries again: most of their time is
    # writing.
    wanted = add_teacher("t", folder / "hf", folder / "undisturbed", slices=2).fingerprint
    started = time.perf_counter()
    assert _add(folder / "hf", folder / "timed", None) == 0
    span = time.perf_counter() - started
    killed = finished = recorded = reused = 0
    expected: dict[str, tuple[int, int]] = {}
    while killed < kills or expected:
        # A clean finish now and then; else a kill at any instant of what an undisturbed run takes.
        delay = chance.uniform(0, 0.9 * span) if killed < kills and chance.random() < 0.8 else None
        status = _add(folder / "hf", target, delay)
        killed += status == -signal.SIGKILL
        assert status in (0, -signal.SIGKILL), f"teachers add ended with {status}"
        if status == 0:
            assert target.is_dir() and not adding_folder(target).exists(), (
                "a finished run left no store"
            )
        place = target if target.exists() else adding_folder(target)
        # Every file that had its record before this run is the very file that is there now.
        for path, identity in expected.items():
            if place.exists():
                assert _identity(place / path) == identity, (
                    f"{path} was finished before the kill and written again"
                )
                reused += 1
        if target.exists():
            store = check_files(open_store(target))
            assert store.fingerprint == wanted, "another store than an undisturbed run's"
            damage = [text for file in store.files.values() for text in damaged_blocks(file)]
            assert not damage, damage
            finished += 1
            expected = {}
            shutil.rmtree(target)
        else:
            try:
                check_files(open_store(target))
            except MtopdError:
                pass
            else:
                raise AssertionError("half a store was opened")
            assert not [path for path in target.parent.glob("*") if not path.name.startswith(".")]
            expected = _recorded(adding_folder(target))
            recorded += len(expected)
    assert finished and (kills < 5 or reused), "no kill hit a run that had finished a file"
    return (
        f"teachers add: {killed} SIGKILLs, {finished} stores finished, all equal to an undisturbed "
        "one and whole; "
        f"{reused} files finished before a kill were reused, none written again"
    )


def _add(source: Path, target: Path, delay: float | None) -> int:
    """One run in a child, killed after ``delay`` seconds; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            add_teacher("t", source, target, slices=2)
            status = 0
        finally:
            os._exit(status)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _recorded(partial: Path) -> dict[str, tuple[int, int]]:
    records = partial / "adding.json"
    files = json.loads(records.read_text())["files"] if records.exists() else {}
    return {path: _identity(partial / path) for path in files}


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mtopd-kill-add-") as folder:
        print(run(arguments.kills, Path(folder), arguments.seed))


if __name__ == "__main__":
    main()
