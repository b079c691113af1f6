"""A few gloo ranks forked from the test that runs, for work that needs no more of them than a group."""

from __future__ import annotations

import multiprocessing
import queue
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from mtopd.megatron import agreement
from mtopd.types import MtopdError

WORLD = 3
_ENDED_WITHIN_S = 240.0


def _rank(rank: int, path: str, body: Callable[[Any], Any], results: Any) -> None:
    try:
        dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=WORLD)
        agreement.BEAT_EVERY_S = 0.05
        results.put((rank, None, body(SimpleNamespace(rank=rank, world_size=WORLD))))
    except MtopdError as error:
        results.put((rank, None, str(error)))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))


def on_ranks(tmp_path: Path, body: Callable[[Any], Any], awaited: int = WORLD) -> list[Any]:
    """What the ranks give (or the words of their MtopdError), by rank; of the first ``awaited`` that end.
    Another error of one, or its death, fails the test at once: the rest would wait for it.
    """
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [
        context.Process(target=_rank, args=(r, str(tmp_path / "store"), body, results), daemon=True)
        for r in range(WORLD)
    ]
    for process in ranks:
        process.start()
    found: dict[int, Any] = {}
    deadline = time.monotonic() + _ENDED_WITHIN_S
    try:
        while len(found) < awaited:
            try:
                rank, failure, given = results.get(timeout=1.0)
            except queue.Empty:
                codes = [process.exitcode for process in ranks]
                assert not any(codes), f"a rank died; exit codes {codes}"
                assert time.monotonic() < deadline, f"only the ranks {sorted(found)} ended"
                continue
            assert failure is None, f"rank {rank}:\n{failure}"
            found[rank] = given
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return [found[rank] for rank in sorted(found)]
