"""Qwen3-MoE and Mixtral: softmax routing in every layer, no shared expert."""

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
from mtopd.families.dense import QK_NORMS

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _qwen3_facts(hf_config: PretrainedConfig) -> ModelFacts:
    return replace(
        dense_facts(hf_config),
        ffn_size=hf_config.num_experts_per_tok * hf_config.moe_intermediate_size,
        num_experts=hf_config.num_experts,
    )


def _qwen3_fields(hf_config: PretrainedConfig) -> dict[str, Any]:
    # normalised, the weights of a softmax over all experts are one over the chosen experts
    return {**common_fields(hf_config), "moe_router_pre_softmax": not hf_config.norm_topk_prob}


def _mixtral_facts(hf_config: PretrainedConfig) -> ModelFacts:
    return replace(
        dense_facts(hf_config),
        ffn_size=hf_config.num_experts_per_tok * hf_config.intermediate_size,
        num_experts=hf_config.num_local_experts,
    )


def _mixtral_fields(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {**common_fields(hf_config), "moe_router_pre_softmax": False}


QWEN3_MOE = Family(
    facts=_qwen3_facts,
    megatron_fields=_qwen3_fields,
    refusals=partial(common_refusals, mlp_only_layers=[], decoder_sparse_step=1),
    layer_names=partial(names_of_layer, attention=QK_NORMS),
)
MIXTRAL = Family(
    facts=_mixtral_facts,
    megatron_fields=_mixtral_fields,
    refusals=partial(common_refusals, sliding_window=None),  # its code has no option to leave it
    layer_names=names_of_layer,
)
