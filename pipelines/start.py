"""Start the ranks of a run on this node with torchrun's library, or take part in an outer torchrun.

Every verb that runs ranks comes here: `start_ranks` locks the run directory, lets the verb check and write
what its ranks read, and then calls one function on every rank.

A rank that was started here dies with its launcher: the kernel sends it SIGKILL
(PR_SET_PDEATHSIG), so nothing is left behind however the launcher ends.  On one node rendezvous
and gloo are bound to loopback.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mtopd.config import ConsolidateConfig, ParallelConfig, SpecialistConfig, load_config
from mtopd.progress import is_first, quiet_libraries, say
from mtopd.run_dir import RunDir, is_sealed
from mtopd.types import MtopdError

from . import failures

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

Config = TypeVar("Config", ConsolidateConfig, SpecialistConfig)
_PR_SET_PDEATHSIG = 1


def start_ranks(
    run: RunDir,
    config: Config,
    prepare: Callable[[Config, RunDir, Callable[[str], None]], None],
    target: str,
    *arguments: str,
    final: Path | None = None,
    check: bool = False,
) -> None:
    """Call ``target`` ("module:function" of pipelines) on every rank, with the run directory, the
    number of this start and ``arguments``.

    ``prepare`` is called before, once, under the lock.  Where ``final`` is sealed the run was
    finished before, and nothing is started; nor with ``check``, which only says what would be.
    """

    def is_ready() -> bool:
        prepare(config, run, say)
        if final is not None and is_sealed(final):
            end = "num_iterations" if isinstance(config, ConsolidateConfig) else "num_steps"
            say(f"{run.path} is finished; raise train.{end} to go on, or remove it to start over")
            return False
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            from mtopd.megatron.devices import check_own_devices

            check_own_devices(config.student.parallel.world_size)
        if check:
            say(f"all is well: {run.path} would start {_ranks(config.student.parallel)}")
        else:
            failures.forget(run.path)
        return not check

    if "TORCHELASTIC_RUN_ID" in os.environ:
        _join_outer_torchrun(run, is_ready, target, *arguments)
        return
    with run.lock():
        if is_ready():
            say(f"starting {_ranks(config.student.parallel)}")
            launch(config.student.parallel.world_size, target, run.path, run.generation, *arguments)


def _ranks(parallel: ParallelConfig) -> str:
    """How many ranks, and by which axes where there is more than one."""
    axes = " x ".join(
        f"{axis} {size}"
        for axis in ("tp", "pp", "cp", "dp")
        if (size := getattr(parallel, axis)) > 1
    )
    if not axes:
        return "1 rank"
    return f"{parallel.world_size} ranks ({axes})"


def phase(run_dir: Path, name: str, iteration: int | None, overrides: list[str]) -> None:
    """Run one phase alone, with the settings that the run directory keeps and ``overrides``."""
    from . import prepare

    if not (run_dir / "config.yaml").is_file():
        raise MtopdError(
            f"{run_dir} is not a run directory (no config.yaml); give the run_dir of a "
            "consolidation"
        )
    config = load_config(run_dir / "config.yaml", overrides, ConsolidateConfig)
    chosen = "newest" if iteration is None else str(iteration)
    start_ranks(RunDir(run_dir), config, prepare.consolidate, "phase:main", name, chosen)


def _join_outer_torchrun(
    run: RunDir, is_ready: Callable[[], bool], target: str, *arguments: str
) -> None:
    """One rank of an outer torchrun.  Rank 0 locks and prepares; the others wait for its word."""
    import torch.distributed as dist

    rendezvous, _, _ = next(dist.rendezvous("env://"))
    store = dist.PrefixStore("mtopd", rendezvous)
    with contextlib.ExitStack() as held:
        if is_first():
            try:
                held.enter_context(run.lock())
                word = f"generation {run.generation}" if is_ready() else "finished"
            except Exception as error:  # the others would wait for a word in vain
                store.set("start", f"error {error}")
                raise
            store.set("start", word)
        word, _, rest = store.get("start").decode().partition(" ")
        if word == "error":
            raise MtopdError(rest)
        if word == "finished":
            return
        try:
            _call(target, run.path, int(rest), *arguments)
        except Exception as error:
            rank = _rank()
            failures.print_of_rank(failures.describe(error, run.path, rank), rank, store)
            if "--debug" in sys.argv:
                raise
            sys.exit(_exit_code(error))


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _exit_code(error: Exception) -> int:
    return 2 if isinstance(error, MtopdError) else 1


def launch(world_size: int, target: str, run_dir: Path, generation: int, *arguments: str) -> None:
    """Run ``python -m mtopd.pipelines.start <target> ...`` on ``world_size`` processes and wait.

    Raises MtopdError with the message of the rank that failed first.
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
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.update(GLOO_SOCKET_IFNAME="lo", TORCHDYNAMO_DISABLE="1")
        # our error line replaces torch's report
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
        entry = ["-u", "-m", "mtopd.pipelines.start"]
        rank = [target, str(run_dir), str(generation), str(error_path), *arguments]
        try:
            elastic_launch(config, sys.executable)(*entry, *rank)
        except SignalException as stop:
            raise MtopdError(
                f"stopped by {stop.sigval.name}; start the same command again to go on"
            ) from None
        except ChildFailedError as error:
            raise MtopdError(_why(error, error_path)) from None


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


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies (Linux)."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the request was made
        os._exit(1)


def main(arguments: list[str]) -> int:
    """One rank that `launch` started."""
    die_with_parent()
    target, run_dir, generation, error_path, *rest = arguments
    try:
        _call(target, Path(run_dir), int(generation), *rest)
    except Exception as error:
        message = failures.describe(error, Path(run_dir), _rank())
        if not isinstance(error, MtopdError):
            message = f"rank {_rank()}: {message}"
        _report(Path(error_path), message)
        return _exit_code(error)
    return 0


def _call(target: str, run_dir: Path, generation: int, *arguments: str) -> None:
    """The body of a rank, however it was started."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if is_first():
        # which row kernels were chosen, and why
        logging.getLogger("mtopd.kernels").setLevel(logging.INFO)
    quiet_libraries()
    module, _, function = target.partition(":")
    getattr(importlib.import_module(f"mtopd.pipelines.{module}"), function)(
        run_dir, generation, *arguments
    )


def _report(path: Path, message: str) -> None:
    """The first rank that fails says why."""
    with contextlib.suppress(FileExistsError), open(path, "x") as file:
        file.write(message)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
