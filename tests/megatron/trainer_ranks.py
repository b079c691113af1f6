"""Worker of test_train_step: a router's own loss by our normalisation and by Megatron's; a rank
without labels.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from mtopd.data import SupervisedExample
from mtopd.megatron import micro_batch as seam
from mtopd.megatron.trainer import Trainer
from mtopd.pipelines import supervised
from mtopd.progress import quiet_libraries
from tests.megatron.checkpoint_ranks import build, cross_entropy, micro_batches


def router_gradients(trainer: Trainer) -> torch.Tensor:
    trainer.forward_backward(micro_batches(trainer, 0), cross_entropy(trainer))
    found = [
        p for chunk in trainer.chunks for name, p in chunk.named_parameters() if ".router." in name
    ]
    return torch.cat([p.main_grad.flatten().double() for p in found])


def divided_by_megatron(trainer: Trainer) -> torch.Tensor:
    """The same where every position counts and Megatron divides all gradients by their number."""
    batches, normalised = micro_batches(trainer, 0), seam.loss
    total = (
        sum(batch.input_ids_BS.numel() for batch in batches)
        * trainer.ranks.dp_size
        * trainer.ranks.cp_size
    )

    def loss(hidden: torch.Tensor, *, micro_batch: Any, **rest: Any) -> Any:
        value, _, metrics = normalised(hidden, micro_batch=micro_batch, **rest)
        return (
            value * total,
            torch.tensor(micro_batch.input_ids_BS.numel(), dtype=torch.int),
            metrics,
        )

    ours, trainer.config.grad_scale_func = (
        trainer.config.grad_scale_func,
        trainer.optimizer.scale_loss,
    )
    seam.loss = loss
    try:
        return router_gradients(trainer)
    finally:
        seam.loss, trainer.config.grad_scale_func = normalised, ours


def router_loss(root: Path, job: dict[str, Any]) -> dict[str, float]:
    trainers = [
        build(root, {**job, "megatron": {**job["megatron"], "moe_aux_loss_coeff": coefficient}})[0]
        for coefficient in (0.0, 0.1)
    ]
    without, ours = map(router_gradients, trainers)
    wanted = divided_by_megatron(trainers[1])
    error, effect = (
        (found - other).norm() / other.norm() for found, other in ((ours, wanted), (ours, without))
    )
    return {"error": float(error), "effect": float(effect)}


def one_answer(root: Path, job: dict[str, Any]) -> dict[str, float]:
    """The loss of one example, whose answer lies on the second rank under cp 2."""
    trainer, _ = build(root, job)
    config: Any = SimpleNamespace(train=SimpleNamespace(micro_batch_size=1))
    student: Any = SimpleNamespace(trainer=trainer, ranks=trainer.ranks)
    batches, _ = supervised.pack(
        [SupervisedExample((1, 2, 3, 4, 5, 6), (7, 8, 9, 10))], config, student
    )
    objective = cross_entropy(trainer)
    trainer.forward_backward(batches, objective)
    return dict(trainer.reduce(objective.finish).values)


if __name__ == "__main__":
    quiet_libraries()
    for spec in json.loads(sys.argv[2]):
        found = {"router_loss": router_loss, "one_answer": one_answer}[spec["check"]](
            Path(sys.argv[1]), spec
        )
        if dist.get_rank() == 0:
            print("RESULT " + json.dumps({**spec, **found}), flush=True)
    dist.barrier()
    dist.destroy_process_group()
