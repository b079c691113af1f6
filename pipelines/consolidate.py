"""Consolidate many teachers into one student by on-policy distillation.

One iteration has four phases; each leaves files that the next one reads, and can be run alone from
them:

    rollout         trajectories/   the student answers prompts; every prompt names its teacher
    teacher pass    hidden_cache/   teachers are streamed one after the other, each reads its own trajectories only
    train           metrics.jsonl   exact reverse KL, samples sorted by teacher, one teacher head resident
    update weights  checkpoints/    the student's weights go to the rollout engine; a checkpoint where it is due

A run that was killed and is started again continues from the newest checkpoint; what was sealed is
not done again.
"""

from __future__ import annotations

from pathlib import Path

from . import evaluate, rollout, teacher_pass, train
from .job import Job


def main(run_dir: Path, generation: int) -> None:
    """All iterations, on this rank."""
    job = Job(run_dir, generation)
    start = job.resume()
    evaluate.baselines(job)
    evaluate.run(job, start)

    for iteration in range(start, job.config.train.num_iterations):
        # 1. The student answers: only its own current tokens are ever trained on.
        with job.timed("rollout", iteration):
            rollout.run(job, iteration)

        # 2. Each teacher reads its own trajectories; only last hidden states are kept.
        with job.timed("teacher_pass", iteration):
            teacher_pass.run(job, iteration)

        # 3. Mini-batches sorted by teacher: at most one head is on the device, each is loaded once
        #    per train step.
        with job.timed("train", iteration):
            train.run(job, iteration)

        # 4. The new weights answer the next prompts.
        with job.timed("update_weights", iteration):
            job.student.update_weights()

        job.save(iteration)
        evaluate.run(job, iteration + 1)

    job.finish()
