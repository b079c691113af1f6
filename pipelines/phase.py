"""One phase alone, from the files the previous one left.

mtopd rollout | teacher-pass | train | evaluate RUN_DIR --iteration N
mtopd evaluate RUN_DIR --baselines
"""

from __future__ import annotations

from pathlib import Path

from mtopd.megatron import checkpoint
from mtopd.types import MtopdError

from . import baselines, evaluate, rollout, teacher_pass, train
from .session import Session

PHASES = {"rollout": rollout, "teacher_pass": teacher_pass, "train": train}


def main(run_dir: Path, generation: int, phase: str, number: str) -> None:
    """``phase`` of an iteration, on this rank.  All but teacher_pass need that iteration's checkpoint
    (0: the start).
    """
    session = Session(run_dir, generation)
    if phase == "baselines":
        evaluate_baselines(session)
        return
    available = session.beginnings()
    iteration = session.iteration(available[-1] if number == "newest" else int(number))
    chosen = iteration.number
    if phase != "teacher_pass":
        assert chosen in available, f"{chosen} of {available}: start.check_checkpoint let it pass"
        if chosen or session.origin is not None:
            session.restore(iteration)
    if phase == "evaluate":
        evaluate.evaluate_student(session, iteration)
        session.close()
        return
    assert chosen < session.config.train.num_iterations, "start.phase let it pass"
    with session.timed(phase, iteration):
        PHASES[phase].run(session, iteration)
    if phase == "train":
        # Nothing is pruned for this checkpoint: the run itself has not moved on.
        trainer = session.student.trainer
        writer = checkpoint.CheckpointWriter(trainer, session.run, lambda published: None)
        writer.save(chosen + 1, session.checkpoint_state())
        writer.close()
    session.close()


def evaluate_baselines(session: Session) -> None:
    """All that are not known; those that fail, one after the other in one line, are an error."""
    problems = baselines.run(session)
    session.close()
    if problems:
        raise MtopdError("; ".join(problems))
