"""The model that is trained, on this rank, and its weights on their way out, bucket by bucket."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from mtopd.config import OptimizerConfig, ParallelConfig, StudentConfig
from mtopd.config_rollout import RolloutConfig
from mtopd.convert.bridge import Bridge
from mtopd.convert.weight_stream import Taker, WeightStream, everyone
from mtopd.dtypes import torch_dtype
from mtopd.families import model_facts
from mtopd.hf_checkpoint import load_hf_config
from mtopd.hf_weights import Bucket
from mtopd.megatron import parallel
from mtopd.megatron.model import build_chunks
from mtopd.megatron.optimizer import build_optimizer_config
from mtopd.megatron.options import (
    MegatronFields,
    check_model_fields,
    config_overrides,
    megatron_refuses,
    sort_fields,
)
from mtopd.megatron.trainer import Trainer, build_ddp_config
from mtopd.planning.capacity import padded_vocab_size
from mtopd.rollout.ending import Ending
from mtopd.tokenizer import end_ids, load_tokenizer, vocab_size

if TYPE_CHECKING:
    from transformers import PretrainedConfig


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
        self.end_ids = end_ids(self.tokenizer, config.model)
        fields = sort_fields(config.megatron)
        self.bridge = build_bridge(config, self.hf_config, fields, self.ranks.device)
        with megatron_refuses(config.megatron):
            chunks = build_chunks(
                self.bridge.transformer_config,
                self.facts,
                self.ranks,
                padded_vocab=padded_vocab_size(self.facts.vocab_size, self.ranks.tp_size),
                freeze_router=config.freeze_router,
            )
        self.bridge.load(chunks, config.model)
        with megatron_refuses(config.megatron):
            self.trainer = Trainer(chunks, self.ranks, optimizer, num_steps, self.dtype, fields)
        self.stream = WeightStream(self.bridge, chunks, self.ranks)

    def ending(self, config: RolloutConfig | None) -> Ending:
        """When a response is over.  ``config``: None for a run without rollouts."""
        if config is None:
            return Ending(self.tokenizer, self.end_ids)
        assert all(index < self.vocab_size for index in config.stop_ids), config.stop_ids
        return Ending(self.tokenizer, [*self.end_ids, *config.stop_ids], config.stop)

    def weights(self, taker: Taker = everyone) -> Iterator[Bucket]:
        """All weights as HF tensors, each bucket on the rank that takes it.  Collective."""
        self.trainer.finish_param_sync()
        return self.stream.buckets(self.config.bucket_bytes, taker)


def build_bridge(
    config: StudentConfig,
    hf_config: PretrainedConfig,
    fields: MegatronFields,
    device: torch.device,
    *,
    layout: ParallelConfig | None = None,
) -> Bridge:
    """The map between the student's checkpoint and Megatron, and Megatron's config of the student.

    ``layout``: before process groups exist.  Raises MtopdError where Megatron refuses its options.
    """
    facts = model_facts(hf_config)
    with megatron_refuses(config.megatron):
        return Bridge(
            hf_config,
            dtype=torch_dtype(config.dtype),
            padded_vocab_size=padded_vocab_size(facts.vocab_size, config.parallel.tp),
            overrides=config_overrides(
                device, fields.transformer, interleaved=config.parallel.vpp > 1
            ),
            layout=layout,
        )


def check_megatron(config: StudentConfig, fields: MegatronFields) -> None:
    """Ask of the user's Megatron options all that needs no process group: compare what the
    checkpoint decides, and build Megatron's configs.  Raises MtopdError.
    """
    hf_config, device = load_hf_config(config.model), torch.device("cpu")
    plain = build_bridge(config, hf_config, sort_fields({}), device, layout=config.parallel)
    check_model_fields(fields, plain.transformer_config, config.model)
    build_bridge(config, hf_config, fields, device, layout=config.parallel)
    build_ddp_config(fields)
    build_optimizer_config(OptimizerConfig(lr=1.0), torch_dtype(config.dtype), fields.optimizer)
