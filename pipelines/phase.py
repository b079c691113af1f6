"""One phase alone, from the files the previous one left."""

from __future__ import annotations

from pathlib import Path

from mtopd.megatron import checkpoint
from mtopd.types import MtopdError

from . import rollout, teacher_pass, train
from .job import Job


def main(run_dir: Path, generation: int, phase: str, iteration: str) -> None:
    """``phase`` of an iteration, on this rank.  rollout and train need that iteration's checkpoint
    (0: the start).
    """
    job = Job(run_dir, generation)
    available = [0, *checkpoint.sealed(job.run)]
    chosen = available[-1] if iteration == "newest" else int(iteration)
    if phase != "teacher_pass":
        if chosen not in available:
            raise MtopdError(
                f"{run_dir} has no checkpoint of iteration {chosen}; there are {available}"
            )
        if chosen:
            job.restore(chosen)
    if chosen >= job.config.train.num_iterations:
        raise MtopdError(
            f"the run has iterations 0..{job.config.train.num_iterations - 1}, {chosen} was asked "
            "for"
        )
    with job.timed(phase, chosen):
        {"rollout": rollout, "teacher_pass": teacher_pass, "train": train}[phase].run(job, chosen)
    if phase == "train":
        # Nothing goes for it: this is a look at one phase.
        writer = checkpoint.CheckpointWriter(job.trainer, job.run, lambda published: None)
        writer.save(chosen + 1, job.state())
        writer.close()
    job.close()
