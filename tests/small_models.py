"""Small real models in HF format, with a real tokenizer: what the tests train, stream and compare."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from mtopd.hf_export import begin_export, finish_export, unfinished
from mtopd.hf_weights import TensorSpec
from mtopd.hf_writer import SHARD_BYTES, ShardFile, plan_shards

WORDS = ["abc", "hello", "table", "stone", "river", "cloud", "grass", "plant"]


def tokenizer_folder(folder: Path) -> Path:
    from mtopd.char_tokenizer import build_char_tokenizer

    build_char_tokenizer({"spell": [f"Spell this word backward: {w}" for w in WORDS]}, folder)
    return folder


_EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
}
# What each architecture has beyond the sizes that all share.
MODEL_TYPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},  # biases on query, key and value
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 8,
        "norm_topk_prob": True,
        "moe_intermediate_size": 32,
        **_EXPERTS,
    },
    "mixtral": {"num_local_experts": 4, "sliding_window": None, **_EXPERTS},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 32,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 0,
        "rope_parameters": _YARN,
    },
}


def save_model(
    folder: Path,
    *,
    seed: int,
    model_type: str = "qwen3",
    hidden: int = 64,
    layers: int = 4,
    tied: bool = True,
    vocab: int | None = None,
    **fields: Any,
) -> Any:
    """A random model whose logits are spread enough that two of them are more than 1 nat apart;
    returns the model.

    ``fields`` go into the HF config over those of its entry in MODEL_TYPES.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from mtopd.tokenizer import load_tokenizer, vocab_size

    tokenizer = load_tokenizer(tokenizer_folder(folder))
    values = {
        "vocab_size": vocab or vocab_size(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-6,
        "rope_parameters": _ROPE,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    # transformers writes into the dicts that it is given, and these are shared.
    values = copy.deepcopy({**values, **MODEL_TYPES[model_type], **fields})
    config = AutoConfig.for_model(model_type, **values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("inv_freq"):
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):  # of attention, or what a router adds to choose experts
                parameter.copy_(0.3 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(1.0 + 0.1 * noise)
            elif "embed" in name or "lm_head" in name:
                parameter.copy_(0.25 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return model


def write_prompts(path: Path, count: int = 24, domains: tuple[str, ...] = ("a", "b")) -> Path:
    """JSONL prompts over the test tokenizer, routed by domain."""
    rows = [
        {
            "prompt": f"Spell this word backward: {WORDS[i % len(WORDS)]}{i}",
            "answer": WORDS[i % len(WORDS)][::-1],
            "domain": domains[i % len(domains)],
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def whole(buckets: Iterable[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """All tensors of buckets, each in memory of its own."""
    found: dict[str, torch.Tensor] = {}
    for bucket in buckets:
        assert not found.keys() & bucket.keys(), "a tensor came twice"
        found |= {name: tensor.clone() for name, tensor in bucket.items()}
    return found


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    source: Path,
    changes: Mapping[str, object],
    *,
    dtype: torch.dtype,
    seal: Callable[[Path], object] = lambda _: None,
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """An export by one process: what was left out."""
    left_out = begin_export(folder, source, changes, dtype=dtype)
    specs = [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    shards = plan_shards(specs, shard_bytes)
    for shard in shards:
        file = ShardFile(unfinished(folder) / shard.name, shard.tensors)
        for tensor in shard.tensors:
            file.write(tensor.name, tensors[tensor.name])
        file.close()
    finish_export(folder, shards, seal)
    return left_out
