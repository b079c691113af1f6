"""Worker: one train step of a prepared run with given trajectories; its loss and gradients are saved."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from mtopd.pipelines import micro_batches, teacher_pass, train
from mtopd.pipelines.session import Session
from mtopd.progress import quiet_libraries
from mtopd.step_sums import StepSums
from tests.parallel.parity_ranks import gradients


def main(run_dir: Path) -> None:
    session = Session(run_dir, 1)
    iteration, trainer = session.iteration(0), session.student.trainer
    teacher_pass.run(session, iteration)
    (plan,) = micro_batches.plan(session, iteration, iteration.samples)
    found: dict[str, torch.Tensor] = {}
    optimizer_step = trainer.optimizer_step

    def keep_gradients(sums: StepSums) -> tuple[float, float]:
        found.update(gradients(session))
        return optimizer_step(sums)

    trainer.optimizer_step = keep_gradients
    with train.open_hidden_states(session, iteration) as states:
        runs = micro_batches.teacher_runs(session, iteration, plan)
        line = train.train_step(session, iteration, plan, runs, states, 0)
    if session.ranks.rank == 0:
        found["loss"] = torch.tensor(line.loss, dtype=torch.float64)
        save_file({k: v.contiguous() for k, v in found.items()}, run_dir / "step.safetensors")
    session.metrics.close()
    session.checkpoints.close()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    quiet_libraries()
    main(Path(sys.argv[1]))
