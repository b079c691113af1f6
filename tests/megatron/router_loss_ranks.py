"""Worker of test_train_step: gradients with a router's own loss, by our normalisation and by Megatron's."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mtopd.megatron import train_step
from mtopd.megatron.cross_entropy import CrossEntropy
from mtopd.megatron.train_step import Trainer
from mtopd.pipelines import ranks
from tests.megatron.checkpoint_ranks import VOCAB, build, micro_batches


def router_gradients(trainer: Trainer) -> torch.Tensor:
    trainer.forward_backward(micro_batches(trainer, 0), CrossEntropy(vocab_size=VOCAB, tp_rank=trainer.ranks.tp_rank))
    found = [p for chunk in trainer.chunks for name, p in chunk.named_parameters() if ".router." in name]
    return torch.cat([p.main_grad.flatten().double() for p in found])


def divided_by_megatron(trainer: Trainer) -> torch.Tensor:
    """The same where every position counts and Megatron divides all gradients by their number."""
    batches, normalised = micro_batches(trainer, 0), train_step._loss
    total = sum(batch.input_ids_BS.numel() for batch in batches) * trainer.ranks.dp_size * trainer.ranks.cp_size

    def loss(hidden: torch.Tensor, *, micro_batch: Any, **rest: Any) -> Any:
        value, _, metrics = normalised(hidden, micro_batch=micro_batch, **rest)
        return value * total, torch.tensor(micro_batch.input_ids_BS.numel(), dtype=torch.int), metrics

    ours, trainer.config.grad_scale_func = trainer.config.grad_scale_func, trainer.optimizer.scale_loss
    train_step._loss = loss
    try:
        return router_gradients(trainer)
    finally:
        train_step._loss, trainer.config.grad_scale_func = normalised, ours


def run_job(root: Path, job: dict[str, Any]) -> dict[str, float]:
    trainers = [
        build(root, {**job, "megatron": {**job["megatron"], "moe_aux_loss_coeff": coefficient}})[0]
        for coefficient in (0.0, 0.1)
    ]
    without, ours = map(router_gradients, trainers)
    wanted = divided_by_megatron(trainers[1])
    return {
        "error": float((ours - wanted).norm() / wanted.norm()),
        "effect": float((ours - without).norm() / without.norm()),
    }


if __name__ == "__main__":
    ranks.quiet_libraries()
    for spec in json.loads(sys.argv[2]):
        found = run_job(Path(sys.argv[1]), spec)
        if dist.get_rank() == 0:
            print("RESULT " + json.dumps({**spec, **found}), flush=True)
    dist.barrier()
    dist.destroy_process_group()
