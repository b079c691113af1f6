"""Start the ranks of a run on this node with torchrun's library, or take part in an outer torchrun.

A rank dies with its launcher: the kernel sends it SIGKILL (PR_SET_PDEATHSIG), so nothing is left
behind however the launcher ends.  On one node rendezvous and gloo are bound to loopback.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mtopd.files import write_atomic
from mtopd.types import MtopdError

logger = logging.getLogger(__name__)
_PR_SET_PDEATHSIG = 1


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def launch(world_size: int, target: str, run_dir: Path, generation: int, *arguments: str) -> None:
    """Run ``python -m mtopd.pipelines.ranks <target> ...`` on ``world_size`` processes and wait.

    Raises MtopdError with the message of the rank that failed first; an unforeseen failure leaves
    its traceback in ``run_dir/failure.txt``.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="mtopd-") as folder:
        error_path = Path(folder) / "error"
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=world_size,
            run_id="mtopd",
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            monitor_interval=0.2,
        )
        environment = {
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "TORCHDYNAMO_DISABLE": "1",
        }
        os.environ.update(environment)
        logging.getLogger("torch.distributed.elastic").setLevel(
            logging.CRITICAL
        )  # our one line says it
        entry = [
            sys.executable,
            "-u",
            "-m",
            "mtopd.pipelines.ranks",
            target,
            str(run_dir),
            str(generation),
            str(error_path),
        ]
        try:
            elastic_launch(config, entry[0])(*entry[1:], *arguments)
        except SignalException as stop:
            raise MtopdError(
                f"stopped by {stop.sigval.name}; start the same command again to go on"
            ) from None
        except ChildFailedError as error:
            raise MtopdError(_why(error, error_path, run_dir)) from None


def _why(error: Any, error_path: Path, run_dir: Path) -> str:
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
        message, _, trace = error_path.read_text().partition("\n")
        if not trace:
            return message
        write_atomic(run_dir / "failure.txt", trace.encode())
        return f"{message} (unforeseen; the traceback is in {run_dir / 'failure.txt'})"
    else:
        rank, failure = error.get_first_failure()
        how = f"ended with exit code {failure.exitcode}"
    return f"rank {rank} {how}; what was sealed is kept: start the same command again to go on"


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies (Linux)."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the request was made
        os._exit(1)


def main(arguments: list[str]) -> int:
    """One rank: ``target`` is a function of mtopd.pipelines ("module:function"); gets run_dir,
    generation, rest.
    """
    die_with_parent()
    target, run_dir, generation, error_path, *rest = arguments
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("mtopd.kernels").setLevel(
            logging.INFO
        )  # which row kernels were chosen, and why
    quiet_libraries()
    try:
        resolve(target)(Path(run_dir), int(generation), *rest)
    except MtopdError as error:
        _report(Path(error_path), " ".join(str(error).split()))
        return 2
    except Exception as error:
        summary = " ".join(f"{type(error).__name__}: {error}".split())
        _report(Path(error_path), f"{summary}\n{traceback.format_exc()}")
        return 1
    return 0


def quiet_libraries() -> None:
    """Keep libraries from printing what is of no use to the reader of a run's output."""
    import warnings

    for module in ("megatron", "mbridge", "torch", "transformers"):
        warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")
    warnings.filterwarnings("ignore", message=".*[Aa]pex.*")
    # The distributed optimizer looks at gradients of views.
    warnings.filterwarnings("ignore", message=".*a Tensor that is not a leaf.*")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def resolve(target: str) -> Callable[..., Any]:
    import importlib

    module, _, function = target.partition(":")
    resolved = getattr(importlib.import_module(f"mtopd.pipelines.{module}"), function)
    assert callable(resolved)
    return resolved


def _report(path: Path, message: str) -> None:
    """The first rank that fails says why: one line, then the traceback if it was unforeseen."""
    try:
        with open(path, "x") as file:
            file.write(message)
    except FileExistsError:
        pass


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
