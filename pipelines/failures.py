"""Why a rank failed: one line for the user and, where nobody foresaw it, the traceback in the run
directory, ``failure.<rank>.txt``.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import socket
import traceback
from pathlib import Path
from typing import Protocol

from mtopd.files import write_atomic
from mtopd.progress import print_error, under_torchrun
from mtopd.types import MtopdError

_PATIENCE = datetime.timedelta(seconds=10)


class Counters(Protocol):
    """What is used here of the store that all ranks of a job share."""

    def add(self, key: str, amount: int, /) -> int: ...
    def set(self, key: str, value: str, /) -> object: ...
    def get(self, key: str, /) -> bytes: ...


def forget(run_dir: Path) -> None:
    """Remove the tracebacks of former starts."""
    for path in (*run_dir.glob("failure.[0-9]*.txt"), run_dir / "failure.txt"):
        path.unlink(missing_ok=True)


def describe(error: Exception, run_dir: Path, rank: int) -> str:
    """The line for the user; the traceback of an unforeseen error is written down, and of a library's
    that became a line of ours.
    """
    path = run_dir / f"failure.{rank}.txt"
    trace = "".join(traceback.format_exception(error))
    if isinstance(error, MtopdError):
        if error.__cause__ is not None:
            with contextlib.suppress(OSError):
                write_atomic(path, trace.encode(errors="replace"))
        return " ".join(str(error).split())
    summary = " ".join(f"{type(error).__name__}: {error}".split())
    try:
        write_atomic(path, trace.encode(errors="replace"))
    except OSError as problem:
        return f"{summary} (unforeseen; {path} cannot be written: {problem.strerror})"
    return f"{summary} (unforeseen; the traceback is in {path})"


def print_before_start(text: str, rank: int) -> None:
    """Print why the command line of this process ends, whether ranks have begun or not: what rank 0
    does not meet, such as a host without the run directory, is said by whoever meets it.
    """
    if not under_torchrun():
        print_error(text)
        return
    store = None
    with contextlib.suppress(Exception):  # the variables may be inherited, the job gone
        import torch.distributed as dist

        rendezvous, _, _ = next(dist.rendezvous("env://", timeout=_PATIENCE))
        store = dist.PrefixStore("mtopd", rendezvous)
    print_of_rank(text, rank, store)


def print_of_rank(text: str, rank: int, store: Counters | None) -> None:
    """Print why this rank of an outer launcher's job fails, unless it is known: the first rank of a
    host speaks for the host, and what several say is said once.
    """
    host = socket.gethostname()
    me, after = f"rank {rank} on host {host}", ""
    said = hashlib.sha256(text.encode(errors="replace")).hexdigest()
    # Without its store a job is ending anyway: then every rank speaks.
    with contextlib.suppress(Exception):
        assert store is not None
        if store.add(f"failures on {host}", 1) > 1 or store.add(f"failures saying {said}", 1) > 1:
            return
        if store.add("failures", 1) == 1:
            store.set("first failure", me)
        else:
            after = f", after {store.get('first failure').decode()}"
    print_error(f"{me}{after}: {text}")
