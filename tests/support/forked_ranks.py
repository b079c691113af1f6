"""``mtopd`` on several ranks that are forked from a process with all imports: up in a second instead of
ten, which is most of what a small run that is killed and started again takes.

The ranks take part in a torchrun, in whose place this stands: it hosts their store, and where one ends
badly it ends the others.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

from torch.distributed import TCPStore

from mtopd.child_process import die_with_parent
from tests.conftest import REPOSITORY

_CONTEXT = multiprocessing.get_context("forkserver")
_IMPORTED = (
    "mtopd.pipelines.cli",
    "mtopd.pipelines.consolidate",
    "mtopd.pipelines.prepare",
    "mtopd.pipelines.serve",
    "mtopd.report",
    "transformers.models.qwen3.modeling_qwen3",
    "aiohttp",
)
_ENDED_WITHIN_S = 30.0  # as torchrun allows between SIGTERM and SIGKILL


def _rank(environment: dict[str, str], log: str, parent: int, arguments: list[str]) -> None:
    die_with_parent(parent)
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(REPOSITORY)
    sys.argv = ["mtopd", *arguments]
    from mtopd.pipelines.cli import main

    main()


class Ranks:
    """A command of mtopd that runs on ``world_size`` ranks; what they say is in the file ``log``."""

    _count = 0

    def __init__(self, world_size: int, log: Path, *arguments: str) -> None:
        self.log = log
        _CONTEXT.set_forkserver_preload(list(_IMPORTED))
        forkserver.ensure_running()
        parent = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        Ranks._count += 1
        common = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_RUN_ID": f"{os.getpid()}-{Ranks._count}",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "GLOO_SOCKET_IFNAME": "lo",
            "TORCHDYNAMO_DISABLE": "1",
        }
        self._ranks = []
        for rank in range(world_size):
            environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            rank_arguments = (environment, str(log), parent, list(arguments))
            self._ranks.append(_CONTEXT.Process(target=_rank, args=rank_arguments, daemon=True))
        for process in self._ranks:
            process.start()

    def kill(self, rank: int) -> None:
        """SIGKILL, from any thread."""
        pid = self._ranks[rank].pid
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)

    def poll(self) -> int | None:
        """The worst exit code once all have ended, negative for a signal; None while some run.  Where
        one ends badly the others are ended.
        """
        codes = [process.exitcode for process in self._ranks]
        bad = [code for code in codes if code]
        if bad and None in codes:
            self._end()
        elif None in codes:
            return None
        return bad[0] if bad else 0

    def wait(self, limit_s: float) -> int:
        deadline = time.monotonic() + limit_s
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self._end()
                raise AssertionError(
                    f"the ranks did not end within {limit_s:.0f} s:\n{self.said()}"
                )
            time.sleep(0.02)
        return code

    def _end(self) -> None:
        for process in self._ranks:
            process.terminate()
        for process in self._ranks:
            process.join(_ENDED_WITHIN_S)
            process.kill()
            process.join()

    def said(self) -> str:
        return self.log.read_text()[-6000:]


def forget_imports() -> None:
    """End the process that ranks are forked from, and give its memory back."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
