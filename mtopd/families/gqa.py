"""Llama, Qwen2, Qwen3, Qwen3-MoE and Mixtral: grouped-query attention, which some add biases or
norms to; the last two route by softmax in every layer and share no expert.
"""

from __future__ import annotations

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

_QK_NORMS = ("q_layernorm.weight", "k_layernorm.weight", "linear_qkv.weight")


def _qwen2_facts(hf_config: PretrainedConfig) -> ModelFacts:
    facts = dense_facts(hf_config)
    biases = facts.head_dim * (facts.num_attention_heads + 2 * facts.num_key_value_heads)
    return replace(facts, split_attention_params=facts.split_attention_params + biases)


def _qwen3_facts(hf_config: PretrainedConfig) -> ModelFacts:
    facts = dense_facts(hf_config)
    return replace(facts, common_attention_params=2 * facts.head_dim)


def _qwen3_moe_facts(hf_config: PretrainedConfig) -> ModelFacts:
    return replace(
        _qwen3_facts(hf_config),
        ffn_size=hf_config.num_experts_per_tok * hf_config.moe_intermediate_size,
        num_experts=hf_config.num_experts,
        experts_per_token=hf_config.num_experts_per_tok,
        dense_ffn_size=0,
        expert_ffn_size=hf_config.moe_intermediate_size,
    )


def _qwen3_moe_fields(hf_config: PretrainedConfig) -> dict[str, Any]:
    # normalised, the weights of a softmax over all experts are one over the chosen experts
    return common_fields(hf_config, moe_router_pre_softmax=not hf_config.norm_topk_prob)


def _mixtral_facts(hf_config: PretrainedConfig) -> ModelFacts:
    return replace(
        dense_facts(hf_config),
        ffn_size=hf_config.num_experts_per_tok * hf_config.intermediate_size,
        num_experts=hf_config.num_local_experts,
        experts_per_token=hf_config.num_experts_per_tok,
        dense_ffn_size=0,
        expert_ffn_size=hf_config.intermediate_size,
    )


LLAMA = Family(
    facts=dense_facts,
    megatron_fields=common_fields,
    refusals=common_refusals,
    layer_names=names_of_layer,
)
QWEN2 = replace(
    LLAMA,
    facts=_qwen2_facts,
    layer_names=partial(names_of_layer, attention=("linear_qkv.weight", "linear_qkv.bias")),
)
QWEN3 = replace(LLAMA, facts=_qwen3_facts, layer_names=partial(names_of_layer, attention=_QK_NORMS))
QWEN3_MOE = Family(
    facts=_qwen3_moe_facts,
    megatron_fields=_qwen3_moe_fields,
    refusals=partial(common_refusals, mlp_only_layers=[], decoder_sparse_step=1),
    layer_names=partial(names_of_layer, attention=_QK_NORMS),
)
MIXTRAL = Family(
    facts=_mixtral_facts,
    megatron_fields=partial(common_fields, moe_router_pre_softmax=False),
    refusals=partial(common_refusals, sliding_window=None),  # its code has no option to leave it
    layer_names=names_of_layer,
)
