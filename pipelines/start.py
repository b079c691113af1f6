"""Start the ranks of a run on this node with torchrun's library, or take part in an outer torchrun.

Every verb that runs ranks comes here: `start_ranks` locks the run directory, lets the verb check and write
what its ranks read, and then calls one function on every rank.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

from mtopd.config import ConsolidateConfig, ParallelConfig
from mtopd.config_file import load_config
from mtopd.config_specialist import SpecialistConfig
from mtopd.files import one_line_errors
from mtopd.manifest import check_schema, has_origin
from mtopd.planning import in_words
from mtopd.progress import is_first, say, under_torchrun
from mtopd.run_dir import RunDir, is_sealed
from mtopd.types import MtopdError

from . import failures
from .own_ranks import call, exit_code, launch, own_rank

Config = TypeVar("Config", ConsolidateConfig, SpecialistConfig)
# Rank 0 reads a large checkpoint, tokenizes: hours.  When it fails, torchrun ends the ranks that wait.
_PREPARED_WITHIN = datetime.timedelta(days=7)
_INHERITED = "in a shell that only inherited its variables, unset TORCHELASTIC_RUN_ID"


def start_ranks(
    run: RunDir,
    config: Config,
    prepare: Callable[[Config, RunDir, Callable[[str], None]], None],
    target: str,
    *arguments: str,
    final: Path | None = None,
    check: bool = False,
    around_ranks: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> None:
    """Call ``target`` ("module:function" of pipelines) on every rank, with the run directory, the
    number of this start and ``arguments``.

    ``prepare`` is called before, once, under the lock; once all is well, ranks run inside
    ``around_ranks``.  Where ``final`` is sealed the run was finished before, and nothing is started;
    nor with ``check``, which only says what would be.
    """

    def is_ready(held: contextlib.ExitStack) -> bool:
        with one_line_errors():
            prepare(config, run, say)
        if final is not None and is_sealed(final):
            end = "num_iterations" if isinstance(config, ConsolidateConfig) else "num_steps"
            say(f"{run.path} is finished; raise train.{end} to go on, or remove it to start over")
            return False
        if not under_torchrun():
            from mtopd.megatron.devices import check_own_devices

            check_own_devices(config.student.parallel.world_size)
        if check:
            say(
                f"all is well: {run.path} would start {_ranks(config.student.parallel)}; written "
                f"there: {in_words([path.name for path in run.first_files], 'and')}, which the "
                "start will use, or write anew for other settings"
            )
        else:
            held.enter_context(around_ranks())
            failures.forget(run.path)
            run.note_ranks()
        return not check

    if under_torchrun():
        _join_outer_torchrun(run, is_ready, target, *arguments)
        return
    with run.lock(), contextlib.ExitStack() as held:
        if is_ready(held):
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


def phase(run_dir: Path, name: str, iteration: int | None) -> None:
    """Run one phase alone, with the settings that the run directory keeps."""
    from . import prepare, serve

    run = RunDir(run_dir)
    if not run.config.is_file():
        raise MtopdError(
            f"{run_dir} is not a run directory (no config.yaml); give the run_dir of a "
            "consolidation"
        )
    check_schema(run)  # before its config is: of an older version it may hold what is refused today
    config = load_config(run.config, [], ConsolidateConfig)
    config = config.model_copy(update={"run_dir": run_dir.absolute()})  # it may have been moved

    def prepared(config: ConsolidateConfig, run: RunDir, say: Callable[[str], None]) -> None:
        trains = name not in ("evaluate", "baselines")
        if not trains:
            if not any(source.has_held_out for source in config.data.sources):
                raise MtopdError(
                    f"{run_dir} has no held-out prompts to evaluate on; they come from eval_path "
                    "of data.sources, or from a reasoning_gym dataset"
                )
            if name == "baselines" and not config.evaluation.baselines:
                raise MtopdError(f"the config of {run_dir} has no evaluation.baselines")
        if iteration is not None and name != "teacher_pass":
            check_checkpoint(run, iteration)
        begun = max(run.sealed_checkpoints(), default=0) if iteration is None else iteration
        if trains and begun >= (end := config.train.num_iterations):
            raise MtopdError(f"the run has iterations 0..{end - 1}, {begun} was asked for")
        prepare.consolidate(config, run, say, trains=trains)

    chosen = "newest" if iteration is None else str(iteration)
    samples = name not in ("teacher_pass", "train")
    around = functools.partial(serve.servers_of, config, run) if samples else contextlib.nullcontext
    start_ranks(run, config, prepared, "phase:main", name, chosen, around_ranks=around)


def check_checkpoint(run: RunDir, iteration: int) -> None:
    """Raise MtopdError unless a phase can begin with ``iteration``: 0 is the student itself."""
    found = run.sealed_checkpoints()
    available = sorted({0, *found}) if not has_origin(run) else found or [0]
    if iteration not in available:
        raise MtopdError(
            f"{run.path} has no checkpoint of iteration {iteration}; iterations with a "
            f"checkpoint: {', '.join(map(str, available))}"
        )


def _join_outer_torchrun(
    run: RunDir, is_ready: Callable[[contextlib.ExitStack], bool], target: str, *arguments: str
) -> None:
    """One rank of an outer torchrun.  Rank 0 locks and prepares; the others wait for its word."""
    import torch.distributed as dist

    if (restarts := os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) != "0":
        raise MtopdError(
            f"torchrun was given --max-restarts {restarts}, but its second attempt meets what the first "
            "one left in their store; leave the option out, and start the same command again to go on"
        )
    try:
        rendezvous, _, _ = next(dist.rendezvous("env://"))
    except (RuntimeError, ValueError, OSError) as error:
        raise MtopdError(
            f"the environment says that torchrun started this command, but it cannot be reached "
            f"({str(error).partition(chr(10))[0]}); {_INHERITED}"
        ) from None
    store = dist.PrefixStore("mtopd", rendezvous)
    if store.add(f"started {own_rank()}", 1) > 1:
        raise MtopdError(
            f"rank {own_rank()} of this torchrun has begun a command of mtopd before, and a torchrun runs "
            f"one; {_INHERITED}"
        )
    with contextlib.ExitStack() as held:
        if is_first():
            try:
                held.enter_context(run.lock())
                word = f"generation {run.generation}" if is_ready(held) else "finished"
            except Exception as error:  # the others would wait for a word in vain
                store.set("start", f"error {error}")
                raise
            store.set("start", word)
        store.wait(["start"], _PREPARED_WITHIN)
        word, _, rest = store.get("start").decode().partition(" ")
        if word == "error":
            raise MtopdError(rest)
        if word == "finished":
            return
        try:
            call(target, run.path, int(rest), *arguments)
        except Exception as error:
            said = failures.describe(error, run.path, own_rank())
            failures.print_of_rank(said, own_rank(), store)
            if "--debug" in sys.argv:
                raise
            sys.exit(exit_code(error))
