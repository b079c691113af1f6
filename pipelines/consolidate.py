"""Consolidate many teachers into one student by on-policy distillation.

One iteration has four phases.  The first three can each be run alone, from the files of the one
before:

    rollout         trajectories/   the student answers prompts; every prompt names its teacher
    teacher pass    hidden_cache/   teachers are streamed one after the other, each reads its own
    train           metrics.jsonl   exact reverse KL, samples sorted by teacher, one head resident
    update weights  -               the student's weights go to the rollout engine

A run that was killed and is started again continues from the newest checkpoint; what was sealed is
not done again.
"""

from __future__ import annotations

from pathlib import Path

from . import baselines, evaluate, rollout, teacher_pass, train
from .session import Session


def main(run_dir: Path, generation: int) -> None:
    """All iterations, on this rank."""
    session = Session(run_dir, generation)
    first = session.resume()
    evaluate.run(session, first)

    for iteration in session.iterations(first):
        # 1. The student answers: only its own tokens are ever trained on.
        with session.timed("rollout", iteration):
            rollout.start(session, iteration)
            # With rollout.overlap_teacher_pass teachers begin on what is answered.
            teacher_pass.run_beside(session, iteration)
            rollout.finish(session, iteration)
            # With rollout.overlap the next iteration's answers begin here, one student behind.
            rollout.begin_next(session, iteration)

        # 2. Each teacher reads its own trajectories; only last hidden states are kept.
        with session.timed("teacher_pass", iteration):
            teacher_pass.run(session, iteration)

        # 3. Mini-batches sorted by teacher: each head is loaded once per train step.
        with session.timed("train", iteration):
            train.run(session, iteration)

        # 4. The new weights answer the next prompts, or go on with them.
        with session.timed("update_weights", iteration):
            session.update_engine(iteration.next)

        session.save(iteration)
        evaluate.run(session, iteration.next)

    baselines.run_at_end(session)
    session.finish()
