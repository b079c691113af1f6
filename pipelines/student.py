"""The model that is trained, on this rank, and the export of its weights, to a rollout engine or as
an HF checkpoint.
"""

from __future__ import annotations

import resource
from pathlib import Path

import torch
import torch.distributed as dist

from mtopd.config import OptimizerConfig, StudentConfig
from mtopd.convert.bridge import Bridge
from mtopd.dtypes import torch_dtype
from mtopd.families import drop_further_heads, model_facts
from mtopd.hf_checkpoint import HFTensors, load_hf_config, write_hf_checkpoint
from mtopd.megatron import parallel
from mtopd.megatron.model import build_chunks
from mtopd.megatron.options import config_overrides, megatron_refuses, sort_fields
from mtopd.megatron.trainer import Trainer
from mtopd.planning.capacity import padded_vocab_size
from mtopd.run_dir import RunDir, is_sealed
from mtopd.tokenizer import load_tokenizer, vocab_size


def peak_host_bytes(ranks: parallel.Ranks) -> int:
    """Peak host memory of the largest rank so far.  Collective."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peaks = torch.tensor([peak], dtype=torch.float64, device=ranks.device)
    dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
    return int(peaks[0])


class Student:
    """Model chunks, trainer, tokenizer.  Building it joins the process group.  Collective."""

    def __init__(
        self, config: StudentConfig, optimizer: OptimizerConfig, num_steps: int, seed: int
    ) -> None:
        self.ranks = parallel.initialize(config.parallel, seed=seed)
        self.config = config
        self.hf_config = load_hf_config(config.model)
        self.facts = model_facts(self.hf_config)
        self.dtype = torch_dtype(config.dtype)
        self.tokenizer = load_tokenizer(config.model)
        self.vocab_size = vocab_size(self.tokenizer)
        padded = padded_vocab_size(self.facts.vocab_size, self.ranks.tp_size)
        fields = sort_fields(config.megatron)
        with megatron_refuses():
            self.bridge = Bridge(
                self.hf_config,
                dtype=self.dtype,
                padded_vocab_size=padded,
                overrides=config_overrides(
                    self.ranks.device, fields.transformer, interleaved=self.ranks.vpp_size > 1
                ),
            )
        chunks = build_chunks(
            self.bridge.transformer_config,
            self.facts,
            self.ranks,
            padded_vocab=padded,
            freeze_router=config.freeze_router,
        )
        self.bridge.load(chunks, config.model)
        self.trainer = Trainer(chunks, self.ranks, optimizer, num_steps, self.dtype, fields)

    def weights(self) -> dict[str, torch.Tensor]:
        """All weights as HF tensors, on every rank.  Collective."""
        self.trainer.finish_param_sync()
        return self.bridge.export(self.trainer.chunks)

    def export(self, run: RunDir, folder: Path) -> None:
        """Write a normal HF checkpoint, whole or not at all, and seal it.  Collective."""
        tensors = self.weights()
        if self.ranks.rank == 0 and not is_sealed(folder):
            stored = HFTensors(self.config.model)
            further = [name for name in stored if self.facts.is_further_head(name)]
            if self.config.mtp == "freeze":
                tensors |= {name: stored[name] for name in further}
            if self.config.mtp != "freeze" or not further:
                drop_further_heads(self.hf_config)
            write_hf_checkpoint(
                folder, tensors, self.hf_config, self.tokenizer, dtype=self.dtype, seal=run.seal
            )
        dist.barrier()
