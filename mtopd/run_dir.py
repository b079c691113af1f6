"""A run directory: the names in it, the lock, the number of the start, seals.

What is promised:
* A sealed folder was complete when it was sealed, by the newest start of this run: every start
  takes the next generation number, and a process of an older generation can no longer seal.
* Only one launcher works in a run directory (flock; the kernel drops it when the launcher dies,
  however it dies).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mtopd.files import UNSUPPORTED, read_json, sweep, write_json
from mtopd.types import MtopdError

SCHEMA = 1
SEAL = "SEALED"
SERVERS_LOCK = "servers/lock"  # of whoever keeps servers up for the run
_TAKEN = {SERVERS_LOCK: "served"}
_FOLDERS = (
    "iterations",
    "checkpoints",
    "evaluations",
    "export",
    "noise_floors",
    "probes",
    "weights",
)


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

    def token_logs(self, iteration: int) -> Path:
        return self.iteration(iteration) / "rollout"

    def hidden_cache(self, iteration: int) -> Path:
        return self.iteration(iteration) / "hidden_cache"

    def evaluation(self, iteration: int) -> Path:
        return self.path / "evaluations" / f"{iteration:06d}.json"

    def answers(self, rank: int) -> Path:
        """What a rank saw answered in the newest evaluation of the student."""
        return self.path / "evaluations" / "answers" / f"{rank:06d}.jsonl"

    def checkpoint(self, iteration: int) -> Path:
        return self.path / "checkpoints" / f"{iteration:06d}"

    def sealed_checkpoints(self) -> list[int]:
        """Iterations that a start can begin with, ascending."""
        found = numbered(self.path / "checkpoints")
        return [number for number, path in found.items() if is_sealed(path)]

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
    def servers(self) -> Path:
        """Where the servers that are started for the run are known: addresses, logs."""
        return self.path / "servers"

    @property
    def weights(self) -> Path:
        """What servers are given by way of files, while they are."""
        return self.path / "weights"

    @property
    def weights_group(self) -> Path:
        """Where servers were told to join a broadcast of weights, while they do."""
        return self.path / "weights_group.json"

    @property
    def probe_bound(self) -> Path:
        """How far log-probs of servers and trainer may differ, once it was measured."""
        return self.path / "weights_probe.json"

    @property
    def serving(self) -> Path:
        """What SGLang servers of the run start with."""
        return self.path / "serving"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def _generation(self) -> Path:
        return self.path / "generation.json"

    @property
    def first_files(self) -> list[Path]:
        """What a start writes before its ranks exist."""
        return [self.config, self.manifest, self._generation, self.prompts]

    # -- start -------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def lock(self, name: str = "lock") -> Iterator[None]:
        """Hold ``run/lock``, or another of the run's locks, while the block runs.  Raises MtopdError
        when another process holds it.
        """
        path = self.path / name
        # Without the fallback: a marker file would stay when the launcher is killed.
        lock = FileLock(path, timeout=0, fallback_to_soft=False)
        try:
            self._refuse_foreign()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError as error:
            raise MtopdError(
                f"cannot write to the run directory {self.path}: {_why(error)}; choose another "
                "run_dir or change its permissions"
            ) from error
        try:
            lock.acquire()
            path.write_text(f"host {socket.gethostname()} pid {os.getpid()}\n")
        except Timeout:
            holder = path.read_text(errors="replace").strip() or "another process"
            raise MtopdError(
                f"run directory {self.path} is {_TAKEN.get(name, 'in use')} by {holder}; wait for it "
                "to end, or choose another run_dir"
            ) from None
        except OSError as error:
            lock.release()
            said = f"its file system has no locks (flock: {error.strerror})"
            raise MtopdError(
                f"cannot use the run directory {self.path}: "
                f"{said if error.errno in UNSUPPORTED else _why(error)}; choose a run_dir on "
                "another file system"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def holder(self, name: str) -> str | None:
        """Who holds one of the run's locks: host and pid.  None: nobody."""
        path = self.path / name
        if not path.exists():
            return None
        try:
            with FileLock(path, timeout=0, fallback_to_soft=False):
                return None
        except Timeout:
            return path.read_text(errors="replace").strip() or "another process"

    def is_ours(self) -> bool:
        """A start of ours has marked this folder: what lies in it is a run's."""
        try:
            manifest = json.loads(self.manifest.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return self._generation.is_file()  # a manifest that is damaged
        return isinstance(manifest, dict) and {"schema", "config"} <= manifest.keys()

    def _refuse_foreign(self) -> None:
        """Raise MtopdError for a folder of somebody else: a run writes, sweeps and removes files."""
        if not self.path.is_dir() or self.is_ours():
            return
        # Of a start that was refused, of a new disk, of servers that were started first.
        before = {"lock", "failure.txt", "lost+found", self.servers.name, self.serving.name}
        foreign = sorted(
            path.name
            for path in self.path.iterdir()
            if path.name not in before and not path.name.startswith(".")
        )
        if foreign:
            raise MtopdError(
                f"{self.path} is no run directory and not empty (it holds "
                f"{', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''}); choose a run_dir "
                "that is empty or does not exist"
            )

    def sweep(self) -> None:
        """Clean up what killed starts of this run left.  Other folders that lie in this one are not
        looked at: they may be a run that is going.
        """
        sweep(self.path, deep=False)
        for name in _FOLDERS:
            sweep(self.path / name)

    def take_generation(self) -> None:
        """Become the newest start of the run.  The caller holds the lock."""
        unstarted = not self._generation.exists() or self.is_unstarted()
        self.generation = self.current_generation() + 1
        self._note_generation(ranks_started=not unstarted)

    def note_ranks(self) -> None:
        """Ranks start now: from here on the run keeps its settings.  The caller holds the lock."""
        self._note_generation(ranks_started=True)

    def _note_generation(self, *, ranks_started: bool) -> None:
        name = self._note().get("id") or uuid.uuid4().hex  # a run that began without
        note = {"generation": self.generation, "id": name, "ranks_started": ranks_started}
        write_json(self._generation, note)

    def is_unstarted(self) -> bool:
        """Starts have only checked and prepared here, as they noted themselves: no rank has run."""
        if not self._generation.exists():
            return False
        return (
            self._note().get("ranks_started") is False
            and not self.metrics.exists()
            and not any((self.path / name).exists() for name in _FOLDERS)
        )

    def forget_first_files(self) -> None:
        """Make room for those of another start.  ``generation.json`` stays: it marks the folder."""
        for path in (self.prompts, self.config, self.manifest):
            path.unlink(missing_ok=True)

    @property
    def id(self) -> str:
        """The run's own name, wherever its folder lies."""
        return str(self._note().get("id", ""))

    def _note(self) -> dict[str, Any]:
        found = read_json(self._generation) if self._generation.exists() else {}
        return found if isinstance(found, dict) else {}

    def current_generation(self) -> int:
        if not self._generation.exists():
            return 0
        generation = self._note().get("generation")
        if not isinstance(generation, int):
            raise MtopdError(f"{self._generation} holds no number of a start; put it back")
        return generation

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


def _why(error: OSError) -> str:
    if isinstance(error, FileExistsError):
        return "it is a file"
    return error.strerror or str(error)


def existing_run(run_dir: Path) -> RunDir:
    """The run of a folder in which nothing is created.  Raises MtopdError where it is no run's."""
    run = RunDir(run_dir)
    for path in (run.config, run.manifest):
        if not path.is_file():
            raise MtopdError(
                f"{run_dir} is not a run directory (no {path.name}); give the run_dir of a "
                "consolidation"
            )
    return run


def numbered(folder: Path, ending: str = "") -> dict[int, Path]:
    """What a run has named by a number, ascending.  A copy that the user made beside it, such as
    000010.bak, has another name and is not looked at.
    """
    form = re.compile("[0-9]{6,}" + re.escape(ending))
    found = (path for path in folder.glob(f"[0-9]*{ending}") if form.fullmatch(path.name))
    by_number = {int(path.name.removesuffix(ending)): path for path in found}
    return dict(sorted(by_number.items()))


def is_sealed(folder: Path) -> bool:
    return (folder / SEAL).is_file()


def read_seal(folder: Path) -> dict[str, Any]:
    seal = read_json(folder / SEAL)
    found = seal.get("schema") if isinstance(seal, dict) else None
    if not isinstance(seal, dict) or found != SCHEMA:
        raise MtopdError(f"{folder / SEAL} has schema {found!r}, this version reads {SCHEMA}")
    return seal
