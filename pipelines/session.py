"""What lasts as long as a start of a consolidation, on this rank: run directory, config, student,
teachers, prompts, metrics, progress, checkpoints.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from mtopd.config import ConsolidateConfig
from mtopd.config_file import load_config
from mtopd.files import read_json, remove_tree
from mtopd.manifest import check_accepted
from mtopd.megatron import checkpoint
from mtopd.megatron.agreement import apart, decide, see_start_alike
from mtopd.metrics import MetricsWriter
from mtopd.metrics_lines import MemoryLine, PhaseLine
from mtopd.progress import Progress, logs_json
from mtopd.prompt_table import Prompts
from mtopd.rollout.background import Background
from mtopd.run_dir import RunDir
from mtopd.teacher_offload.teacher_probes import TeacherProbes
from mtopd.tokenizer import tokenizer_hash
from mtopd.types import MtopdError

from .engines import ENGINES
from .export import export
from .iteration import Iteration
from .student import Student, peak_host_bytes
from .teachers import build_teachers


class RolloutUnderWay(Protocol):
    """What is asked of a rollout that goes on while the ranks do something else."""

    shard_names: Sequence[str]  # of all that it will have sealed, sorted
    background: Background | None  # what answers, on this rank; None: nothing does meanwhile

    def pause(self) -> None:
        """Nothing is drawn, and the engine is free."""

    def resume(self) -> None:
        """It goes on with the weights that the engine has now."""


class Session:
    """One rank from its start to its end.  ``update_engine``, ``rollout_paused``, ``timed``, ``resume``,
    ``restore``, ``save``, ``finish`` and ``close`` are collective.
    """

    def __init__(self, run_dir: Path, generation: int) -> None:
        self.run = RunDir(run_dir, generation)
        config = load_config(self.run.config, [], ConsolidateConfig)
        self.config = config.model_copy(update={"run_dir": run_dir})  # it may have been moved
        torch.use_deterministic_algorithms(self.config.deterministic)
        train = self.config.train
        num_steps = train.num_iterations * train.train_steps_per_iteration
        self.student = Student(self.config.student, train.optimizer, num_steps, self.config.seed)
        self.ranks = self.student.ranks
        see_start_alike(self.ranks, self.run)
        # It takes no memory before the first phase that asks it something.
        self.engine = ENGINES[self.config.rollout.engine](self.student, self.config)
        self.rollout: RolloutUnderWay | None = None  # under way: of this iteration, or the next
        self.prompts = Prompts.load(self.run, self.config.data)
        self.teachers = build_teachers(self.config, self.student, self.run)
        self.probes = TeacherProbes(self.run.path, self.teachers)
        is_first = self.ranks.rank == 0
        as_json = logs_json(self.config.log_json)
        self.metrics = MetricsWriter(self.run.metrics, enabled=is_first, echo=as_json)
        self.progress = Progress(enabled=is_first and not as_json)
        self.checkpoints = checkpoint.CheckpointWriter(self.student.trainer, self.run, self._retain)
        self.num_bad_steps = 0  # train steps left out so far because of NaN or inf
        # The other run's checkpoint that this run begins with, or None
        self.origin: dict[str, Any] | None = read_json(self.run.manifest).get("from")

    # -- iterations --------------------------------------------------------------------------------
    def iteration(self, number: int) -> Iteration:
        return Iteration(number, self.run, self.config, self.teachers, self.ranks)

    def iterations(self, first: Iteration) -> Iterator[Iteration]:
        """``first`` and all that follow."""
        for number in range(first.number, self.config.train.num_iterations):
            yield self.iteration(number)

    def update_engine(self, iteration: Iteration) -> None:
        """Give the engine the student that ``iteration`` begins with, unless it has it.  Collective."""
        version = f"{self.run.id}/{self.run.generation}/{iteration.number}"
        if self.engine.version != version:
            with self.rollout_paused():
                self.engine.update_weights(self.student.weights(self.engine.taker), version)
            if self.engine.update is not None:
                self.metrics.write(self.engine.update, iteration.number)

    @contextlib.contextmanager
    def rollout_paused(self) -> Iterator[None]:
        """The engine is free in the block.  A rollout under way goes on after it, from what its log
        holds.  Collective.
        """
        # In a block inside this one it is paused already.
        rollout, self.rollout = self.rollout, None
        if rollout is not None:
            with apart(self.ranks):  # it may fail on rank 0, whose work it is
                rollout.pause()
        yield
        if rollout is not None:
            rollout.resume()
            self.rollout = rollout

    def check_rollout(self) -> None:
        """Raise what a rollout under way has failed with, on this rank.  Never waits."""
        if self.rollout is not None and self.rollout.background is not None:
            self.rollout.background.check()

    @contextlib.contextmanager
    def timed(self, phase: str, iteration: Iteration) -> Iterator[None]:
        """Write a ``phase`` line with the wall seconds of the block, and show the phase.

        A checkpoint that was written meanwhile is published first: a kill in this phase goes on
        from it.
        """
        self.check_rollout()
        self.checkpoints.advance()
        self.progress.phase(phase, iteration.number, self.config.train.num_iterations)
        started = time.perf_counter()
        yield
        line = PhaseLine(phase, time.perf_counter() - started)
        # Each start has its own line, so that time lost to a kill is counted.
        self.metrics.write(line, iteration.number, part=f"start {self.run.generation}")

    def skip_step(self, step: int, why: str) -> None:
        """Count a refused train step: weights, optimizer and schedule are as before.  Raises
        MtopdError if it is one too many.
        """
        allowed = self.config.train.max_bad_steps
        if self.num_bad_steps >= allowed:
            raise MtopdError(
                f"train step {step} was refused: {why}; weights are as after the step before.  "
                f"Look at those samples, or allow more than {self.num_bad_steps} such steps with "
                "train.max_bad_steps"
            )
        self.num_bad_steps += 1
        self.progress.note(
            f"train step {step} is left out ({self.num_bad_steps} of {allowed}): {why}"
        )

    # -- checkpoints -------------------------------------------------------------------------------
    def resume(self) -> Iteration:
        """Restore the newest sealed checkpoint; returns the iteration to go on with."""
        newest = decide(self.ranks, lambda: checkpoint.newest(self.run))
        iteration = self.iteration(newest or 0)
        if newest is not None:
            self.restore(iteration)
        elif self.origin is not None:
            self._begin(self.origin)
        return iteration

    def _begin(self, origin: Mapping[str, Any]) -> None:
        """Take what another run's checkpoint holds, and keep it at once as checkpoint 0: from then on
        that run may go.
        """
        folder = RunDir(Path(origin["run"])).checkpoint(origin["iteration"])
        checkpoint.begin_with(self.student.trainer, folder, origin["seal"])
        self.checkpoints.save(0, self.checkpoint_state())
        self.checkpoints.wait()

    def beginnings(self) -> list[int]:
        """Iterations whose student is at hand, ascending: those with a sealed checkpoint, and 0,
        which ``student.model`` holds unless the run began with another run's checkpoint.
        """
        found = decide(self.ranks, lambda: checkpoint.sealed(self.run))
        if self.origin is None:
            return sorted({0, *found})
        if not found:  # its first start ended before it had one
            self._begin(self.origin)
        return found or [0]

    def restore(self, iteration: Iteration) -> None:
        """Load the checkpoint that ``iteration`` begins with."""
        state = checkpoint.load(self.student.trainer, self.run, iteration.number)
        folder = self.run.checkpoint(iteration.number)
        check_accepted(self.run, folder, state["taught_by"], teacher_identities(self))
        self.num_bad_steps = int(state["bad_steps"])

    def save(self, iteration: Iteration) -> None:
        """Begin a checkpoint of the state after ``iteration``, and export the student, when they are
        due.
        """
        is_due = (iteration.number + 1) % self.config.checkpoint.every == 0
        if is_due or iteration.is_last:
            with self.timed("checkpoint", iteration):
                self.checkpoints.save(iteration.number + 1, self.checkpoint_state())
        every = self.config.checkpoint.export_every
        if every and (iteration.number + 1) % every == 0 and not iteration.is_last:
            with self.timed("export", iteration):
                export(self.student, self.run, self.run.export(iteration.number + 1))

    def checkpoint_state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the trainer's own."""
        return {"bad_steps": self.num_bad_steps, "taught_by": teacher_identities(self)}

    def _retain(self, published: int) -> None:
        """Remove older checkpoints, and the files of iterations before the newest one."""
        checkpoint.prune(self.run, keep=self.config.checkpoint.keep)
        for done in range(published - 1):  # the newest iteration stays to be looked at
            remove_tree(self.run.iteration(done))

    # -- the end -----------------------------------------------------------------------------------
    def finish(self) -> None:
        """Export the student, then close."""
        self.checkpoints.wait()
        export(self.student, self.run, self.run.export(self.config.train.num_iterations))
        self.close()

    def close(self) -> None:
        """Note the peak memory, end the process group."""
        peak = peak_host_bytes(self.ranks)
        self.metrics.write(MemoryLine(peak), self.config.train.num_iterations)
        self.checkpoints.close()
        self.engine.close()
        self.teachers.close()
        self.metrics.close()
        self.progress.close()
        dist.barrier()
        dist.destroy_process_group()


def teacher_identities(session: Session) -> dict[str, Any]:
    """Who teaches what, in which tokens, as JSON has it."""
    config, stores = session.config, session.teachers.stores
    teachers = [
        {
            "name": store.name,
            "fingerprint": store.fingerprint,
            "weight": weight,
            "route": dict(teacher.route),
        }
        for store, weight, teacher in zip(
            stores, config.teacher_weights, config.teachers, strict=True
        )
    ]
    return {
        "teachers": teachers,
        "tokenizer_hash": tokenizer_hash(session.student.tokenizer),
    }
