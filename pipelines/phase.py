"""One phase alone, from the files the previous one left.

mtopd rollout | teacher-pass | train RUN_DIR --iteration N
"""

from __future__ import annotations

from pathlib import Path

from mtopd.megatron import checkpoint
from mtopd.types import MtopdError

from . import rollout, teacher_pass, train
from .session import Session

PHASES = {"rollout": rollout, "teacher_pass": teacher_pass, "train": train}


def main(run_dir: Path, generation: int, phase: str, number: str) -> None:
    """``phase`` of an iteration, on this rank.  rollout and train need that iteration's checkpoint
    (0: the start).
    """
    session = Session(run_dir, generation)
    available = [0, *checkpoint.sealed(session.run)]
    iteration = session.iteration(available[-1] if number == "newest" else int(number))
    chosen, num_iterations = iteration.number, session.config.train.num_iterations
    if phase != "teacher_pass":
        if chosen not in available:
            raise MtopdError(
                f"{run_dir} has no checkpoint of iteration {chosen}; there are {available}"
            )
        if chosen:
            session.restore(iteration)
    if chosen >= num_iterations:
        raise MtopdError(f"the run has iterations 0..{num_iterations - 1}, {chosen} was asked for")
    with session.timed(phase, iteration):
        PHASES[phase].run(session, iteration)
    if phase == "train":
        # Nothing is pruned for this checkpoint: the run itself has not moved on.
        trainer = session.student.trainer
        writer = checkpoint.CheckpointWriter(trainer, session.run, lambda published: None)
        writer.save(chosen + 1, session.checkpoint_state())
        writer.close()
    session.close()
