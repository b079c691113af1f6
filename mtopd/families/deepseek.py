"""DeepSeek-V3: latent attention (MLA), sigmoid routing with a bias, shared experts, yarn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from mtopd.families.base import (
    Family,
    ModelFacts,
    common_fields,
    common_refusals,
    dense_facts,
    names_of_layer,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_ATTENTION = (
    "q_layernorm.weight",
    "kv_layernorm.weight",
    "linear_q_down_proj.weight",
    "linear_kv_down_proj.weight",
    "linear_q_up_proj.weight",
    "linear_kv_up_proj.weight",
)
_BESIDE_EXPERTS = (
    "router.weight",
    "router.expert_bias",
    "shared_experts.linear_fc1.weight",
    "shared_experts.linear_fc2.weight",
)


def _facts(hf_config: PretrainedConfig) -> ModelFacts:
    experts = hf_config.num_experts_per_tok + hf_config.n_shared_experts
    heads, value_dim = hf_config.num_attention_heads, hf_config.v_head_dim
    query, rotary = hf_config.q_lora_rank or 0, hf_config.qk_rope_head_dim
    compressed, plain = hf_config.kv_lora_rank, hf_config.qk_nope_head_dim
    up = query * (plain + rotary) + compressed * (plain + value_dim)
    # The down-projections are replicated, with the norms behind them.
    down = hf_config.hidden_size * (query + compressed + rotary)
    return replace(
        dense_facts(hf_config),
        ffn_size=experts * hf_config.moe_intermediate_size,
        value_head_dim=hf_config.v_head_dim,
        is_latent_attention=True,
        num_experts=hf_config.n_routed_experts,
        experts_per_token=hf_config.num_experts_per_tok,
        num_dense_layers=hf_config.first_k_dense_replace,
        num_further_heads=getattr(hf_config, "num_nextn_predict_layers", None) or 0,
        expert_ffn_size=hf_config.moe_intermediate_size,
        shared_ffn_size=hf_config.n_shared_experts * hf_config.moe_intermediate_size,
        split_attention_params=heads * (up + value_dim * hf_config.hidden_size),
        common_attention_params=down + query + compressed,
    )


def _refusals(hf_config: PretrainedConfig) -> Iterator[str]:
    if hf_config.q_lora_rank is None:
        yield "q_lora_rank is None: latent attention without a compressed query is not supported"
    if hf_config.num_experts_per_tok == 1:
        yield (
            "num_experts_per_tok is 1: Megatron does not normalise the weight of a single expert"
        )
    if hf_config.n_group > 1 and hf_config.num_experts_per_tok // hf_config.topk_group != 2:
        yield (
            f"{hf_config.num_experts_per_tok} experts of {hf_config.topk_group} groups a token: "
            "Megatron ranks groups as the checkpoint's code does only for two experts a group"
        )
    if hf_config.n_group < 1 or hf_config.n_routed_experts % hf_config.n_group:
        yield f"{hf_config.n_routed_experts} experts do not go into {hf_config.n_group} groups (n_group)"
    if hf_config.topk_group > hf_config.n_group:
        yield f"a token has {hf_config.topk_group} of {hf_config.n_group} groups (topk_group, n_group)"
    yield from common_refusals(
        hf_config,
        rope_types=("default", "yarn"),
        rope_interleave=True,
        norm_topk_prob=True,
        rms_norm_eps=1e-6,
    )
    rope = hf_config.rope_parameters
    if _is_yarn(rope) and not (
        bool(rope.get("mscale")) == bool(rope.get("mscale_all_dim"))
        and not rope.get("attention_factor")
        and rope.get("truncate", True)
        and rope.get("factor")
    ):
        yield (
            "yarn needs a factor, both or none of mscale and mscale_all_dim, no attention_factor and "
            f"truncate on; found {dict(rope)}"
        )


def _is_yarn(rope: dict[str, Any]) -> bool:
    return rope.get("rope_type", "default") != "default"


def _megatron_fields(hf_config: PretrainedConfig) -> dict[str, Any]:
    groups = {
        "moe_router_num_groups": hf_config.n_group,
        "moe_router_group_topk": hf_config.topk_group,
    }
    return {
        **common_fields(hf_config),
        "attention_backend": "auto",
        # what Megatron's own attention takes the width of a head from
        "kv_channels": hf_config.v_head_dim,
        # only the last hidden state of the decoder is asked of a teacher
        "mtp_num_layers": None,
        **_rope_fields(hf_config.rope_parameters),
        **(groups if hf_config.n_group > 1 else {}),
    }


def _rope_fields(rope: dict[str, Any]) -> dict[str, Any]:
    if not _is_yarn(rope):
        return {
            "rope_type": "rope",
            "rotary_scaling_factor": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        }
    return {
        "rope_type": "yarn",
        "rotary_scaling_factor": float(rope["factor"]),
        "original_max_position_embeddings": int(rope["original_max_position_embeddings"]),
        "beta_fast": float(rope.get("beta_fast") or 32),
        "beta_slow": float(rope.get("beta_slow") or 1),
        "mscale": float(rope.get("mscale") or 1.0),
        "mscale_all_dim": float(rope.get("mscale_all_dim") or 0.0),
    }


DEEPSEEK_V3 = Family(
    facts=_facts,
    megatron_fields=_megatron_fields,
    refusals=_refusals,
    layer_names=partial(names_of_layer, attention=_ATTENTION, beside_experts=_BESIDE_EXPERTS),
    fp32_names=("mlp.router.expert_bias",),  # Megatron adds it in float32
    further_heads="num_nextn_predict_layers",
)
