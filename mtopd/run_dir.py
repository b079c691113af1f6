"""A run directory: the names in it, the lock, the number of the start, seals.

What is promised:
* A sealed folder was complete when it was sealed, by the newest start of this run: every start
  takes the next generation number, and a process of an older generation can no longer seal.
* Only one launcher works in a run directory (flock; the kernel drops it when the launcher dies,
  however it dies).
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mtopd.files import read_json, write_json
from mtopd.types import MtopdError

SCHEMA = 1
SEAL = "SEALED"


class RunDir:
    """Paths and seals of one run.  ``generation`` is the number of the start this process belongs
    to.
    """

    def __init__(self, path: Path, generation: int = 0) -> None:
        self.path = path
        self.generation = generation

    # -- names -------------------------------------------------------------------------------------
    def iteration(self, iteration: int) -> Path:
        return self.path / "iterations" / f"{iteration:06d}"

    def trajectories(self, iteration: int) -> Path:
        return self.iteration(iteration) / "trajectories"

    def hidden_cache(self, iteration: int) -> Path:
        return self.iteration(iteration) / "hidden_cache"

    def evaluation(self, iteration: int) -> Path:
        return self.path / "evaluations" / f"{iteration:06d}.json"

    def checkpoint(self, iteration: int) -> Path:
        return self.path / "checkpoints" / f"{iteration:06d}"

    def sealed_checkpoints(self) -> list[int]:
        """Iterations that a start can begin with, ascending."""
        found = (self.path / "checkpoints").glob("[0-9]*")
        return sorted(int(path.name) for path in found if is_sealed(path))

    def export(self, iteration: int) -> Path:
        return self.path / "export" / f"{iteration:06d}"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def prompts(self) -> Path:
        return self.path / "prompts.arrow"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    # -- start -------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold ``run/lock`` while the block runs.  Raises MtopdError when another launcher holds
        it.
        """
        path = self.path / "lock"
        # Without the fallback: a marker file would stay when the launcher is killed.
        lock = FileLock(path, timeout=0, fallback_to_soft=False)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            holder = path.read_text(errors="replace").strip() or "another process"
            raise MtopdError(
                f"run directory {self.path} is in use by {holder}; wait for it to end, or "
                "choose another run_dir"
            ) from None
        except OSError as error:
            raise MtopdError(
                f"cannot write to the run directory {self.path}: {error.strerror}; choose another "
                "run_dir or change its permissions"
            ) from None
        try:
            path.write_text(f"host {socket.gethostname()} pid {os.getpid()}\n")
            yield
        finally:
            lock.release()

    def take_generation(self) -> None:
        """Become the newest start of the run.  The caller holds the lock."""
        self.generation = self.current_generation() + 1
        write_json(self.path / "generation.json", {"generation": self.generation})

    def current_generation(self) -> int:
        path = self.path / "generation.json"
        return int(read_json(path)["generation"]) if path.exists() else 0

    # -- seals -------------------------------------------------------------------------------------
    def seal(self, folder: Path, contents: Mapping[str, Any] | None = None) -> None:
        """Mark ``folder`` complete.  Raises MtopdError when a newer start of the run has taken
        over.
        """
        newest = self.current_generation()
        if newest != self.generation:
            raise MtopdError(
                f"this process belongs to start {self.generation} of {self.path}, but start "
                f"{newest} has taken over; "
                "it may not seal anything any more"
            )
        write_json(
            folder / SEAL, {"schema": SCHEMA, "generation": self.generation, **(contents or {})}
        )


def is_sealed(folder: Path) -> bool:
    return (folder / SEAL).is_file()


def read_seal(folder: Path) -> dict[str, Any]:
    seal = read_json(folder / SEAL)
    if not isinstance(seal, dict) or seal.get("schema") != SCHEMA:
        raise MtopdError(
            f"{folder / SEAL} has schema {seal.get('schema')!r}, this version reads {SCHEMA}"
        )
    return seal
