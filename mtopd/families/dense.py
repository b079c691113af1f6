"""Llama, Qwen2 and Qwen3: dense layers, which differ in what attention adds to its projections."""

from __future__ import annotations

from functools import partial

from mtopd.families.base import (
    Family,
    common_fields,
    common_refusals,
    dense_facts,
    names_of_layer,
)

QK_NORMS = ("q_layernorm.weight", "k_layernorm.weight", "linear_qkv.weight")

LLAMA = Family(
    facts=dense_facts,
    megatron_fields=common_fields,
    refusals=common_refusals,
    layer_names=names_of_layer,
)
QWEN2 = Family(
    facts=dense_facts,
    megatron_fields=common_fields,
    refusals=common_refusals,
    layer_names=partial(names_of_layer, attention=("linear_qkv.weight", "linear_qkv.bias")),
)
QWEN3 = Family(
    facts=dense_facts,
    megatron_fields=common_fields,
    refusals=common_refusals,
    layer_names=partial(names_of_layer, attention=QK_NORMS),
)
