"""Ranks of this node, started with torchrun's library.

A rank that is started here dies with its launcher: the kernel sends it SIGKILL
(PR_SET_PDEATHSIG), so nothing is left behind however the launcher ends.  On one node the ranks'
store and gloo are bound to loopback: nobody has to prove who he is to either.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from mtopd.child_process import die_with_parent
from mtopd.files import one_line_errors
from mtopd.progress import quiet_libraries
from mtopd.types import MtopdError

from . import failures

if TYPE_CHECKING:
    from torch.distributed import TCPStore
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def own_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def exit_code(error: Exception) -> int:
    return 2 if isinstance(error, MtopdError) else 1


def launch(world_size: int, target: str, run_dir: Path, generation: int, *arguments: str) -> None:
    """Run ``python -m mtopd.pipelines.own_ranks <target> ...`` on ``world_size`` processes and wait.

    Raises MtopdError with the message of the rank that failed first.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="mtopd-") as folder:
        error_path = Path(folder) / "error"
        store = _loopback_store()  # torch's launcher finds it by its port
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=world_size,
            run_id="mtopd",
            rdzv_backend="static",
            rdzv_endpoint=f"127.0.0.1:{store.port}",
            rdzv_configs={"rank": 0},
            local_addr="127.0.0.1",
            max_restarts=0,
            monitor_interval=0.2,
            logs_specs=DefaultLogsSpecs(log_dir=folder),  # else a folder in /tmp that stays
        )
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.update(GLOO_SOCKET_IFNAME="lo", TORCHDYNAMO_DISABLE="1")
        # our error line replaces torch's report
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
        # -P: the folder mtopd of a clone that one stands in is not the installed package.
        entry = ["-P", "-u", "-m", "mtopd.pipelines.own_ranks"]
        rank = [target, str(run_dir), str(generation), str(error_path), *arguments]
        try:
            elastic_launch(config, sys.executable)(*entry, *rank)
        except SignalException as stop:
            raise MtopdError(
                f"stopped by {stop.sigval.name}; start the same command again to go on"
            ) from None
        except ChildFailedError as error:
            raise MtopdError(_why(error, error_path)) from None


def _loopback_store() -> TCPStore:
    """The key-value store of all ranks; torch itself would listen on every interface."""
    from torch.distributed import TCPStore

    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    return TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listening.detach(),
    )


def _why(error: ChildFailedError, error_path: Path) -> str:
    """One line for a failed run.  A killed rank is the cause; what the others said then only
    follows from it.
    """
    killed = [
        (rank, f.exitcode)
        for rank, f in error.failures.items()
        if f.exitcode < 0 and f.exitcode != -signal.SIGTERM
    ]
    if killed:
        rank, code = killed[0]
        how = f"was killed by {signal.Signals(-code).name}"
    elif error_path.exists():
        return error_path.read_text()
    else:
        rank, failure = error.get_first_failure()
        how = f"ended with exit code {failure.exitcode}"
    return f"rank {rank} {how}; what was sealed is kept: start the same command again to go on"


def main(arguments: list[str]) -> int:
    """One rank that `launch` started."""
    die_with_parent(os.getppid())
    target, run_dir, generation, error_path, *rest = arguments
    try:
        call(target, Path(run_dir), int(generation), *rest)
    except Exception as error:
        message = failures.describe(error, Path(run_dir), own_rank())
        if not isinstance(error, MtopdError):
            message = f"rank {own_rank()}: {message}"
        _report(Path(error_path), message)
        return exit_code(error)
    return 0


def call(target: str, run_dir: Path, generation: int, *arguments: str) -> None:
    """The body of a rank, however it was started."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    quiet_libraries()
    module, _, function = target.partition(":")
    body = getattr(importlib.import_module(f"mtopd.pipelines.{module}"), function)
    with one_line_errors():
        body(run_dir, generation, *arguments)


def _report(path: Path, message: str) -> None:
    """The first rank that fails says why."""
    with contextlib.suppress(FileExistsError), open(path, "x") as file:
        file.write(message)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
