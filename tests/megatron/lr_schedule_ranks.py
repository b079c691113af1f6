"""Worker of test_lr_schedule: what the trainer says of the learning rate of each step, and how far
a weight moves.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from mtopd.config import OptimizerConfig, ParallelConfig
from mtopd.convert.bridge import Bridge
from mtopd.hf_checkpoint import load_hf_config
from mtopd.megatron import parallel
from mtopd.megatron.model import build_chunks
from mtopd.megatron.optimizer import resume_schedule
from mtopd.megatron.options import config_overrides, sort_fields
from mtopd.megatron.trainer import Trainer
from mtopd.progress import quiet_libraries
from mtopd.step_sums import LocalSums


def build(model: Path, config: OptimizerConfig, num_steps: int) -> Trainer:
    own = parallel.initialize(ParallelConfig(), seed=0)
    hf_config, fields = load_hf_config(model), sort_fields({})
    overrides = config_overrides(own.device, fields.transformer)
    bridge = Bridge(hf_config, dtype=torch.float32, padded_vocab_size=128, overrides=overrides)
    chunks = build_chunks(bridge.transformer_config, bridge.facts, own, padded_vocab=128)
    return Trainer(chunks, own, config, num_steps, torch.float32, fields)


def step(trainer: Trainer) -> tuple[float, float]:
    """(learning rate said, distance moved): under equal gradients in every step Adam moves a weight
    by exactly lr.
    """
    weight = trainer.chunks[0].decoder.final_layernorm.weight
    weight.main_grad.fill_(1.0)
    with torch.no_grad():
        weight.zero_()  # so that the distance is not rounded
    _, said = trainer.optimizer_step(trainer.reduce(lambda: LocalSums({})))
    return said, -weight[0].item()


def main() -> None:
    quiet_libraries()
    model, runs = Path(sys.argv[1]), json.loads(sys.argv[2])
    for run in runs:
        config, num_steps = (
            OptimizerConfig(**run["optimizer"], weight_decay=0.0, clip_grad=0.0),
            run["num_steps"],
        )
        trainer = build(model, config, num_steps)
        found = [step(trainer) for _ in range(num_steps + 2)]
        resumed = build(model, config, num_steps)
        resume_schedule(resumed.schedule, num_steps // 2)
        print("RESULT", json.dumps({"steps": found, "resumed": step(resumed)[0]}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
