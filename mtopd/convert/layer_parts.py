"""How the weights of one layer are cut for a teacher store: what tp replicates, tp slices, experts."""

from __future__ import annotations

import torch

from mtopd.convert.bridge import Bridge
from mtopd.hf_checkpoint import Tensors
from mtopd.teacher_offload.names import (
    COMMON,
    GATE,
    TRANSPOSED,
    UP,
    expert_section,
    expert_weight,
    slice_section,
    stored_name,
)
from mtopd.types import MtopdError

Parts = list[tuple[str, torch.Tensor]]

# Rows stand by query group (qkv) or by head, so that a slice is a whole number of them.
_BY_HEAD = (
    "linear_qkv.weight",
    "linear_qkv.bias",
    "linear_q_up_proj.weight",
    "linear_kv_up_proj.weight",
)


def layer_parts(bridge: Bridge, tensors: Tensors, layer: int, slices: int) -> tuple[Parts, Parts]:
    """(layer tensors, expert tensors) of one layer as (stored name, tensor), in the order of the
    store's files.

    Layer tensors: ``common/<name>``, then ``slice.0000/<name>``, ``slice.0001/<name>``, ...  Slices
    join along dim 0: row-parallel weights stand transposed (``.T``), gate and up apart (``.gate``,
    ``.up``).  Expert tensors, none for a dense layer: ``expert.0000/linear_fc1.weight`` (gate over
    up), ``expert.0000/linear_fc2.weight``, ...  as Megatron wants them.  Every tensor keeps its
    dtype; only the family's ``fp32_names`` become float32. Raises MtopdError
    when ``slices`` does not divide the heads, query groups or FFN rows.
    """
    common: Parts = []
    sliced: list[Parts] = [[] for _ in range(slices)]

    def load(name: str) -> torch.Tensor:
        full_name = f"decoder.layers.{layer}.{name}"
        return bridge.to_megatron(full_name, [tensors[n] for n in bridge.hf_names(full_name)])

    def cut(name: str, weight: torch.Tensor, units: int, unit: str) -> None:
        if slices < 1 or units % slices:
            raise MtopdError(
                f"layer {layer} has {units} {unit} in {name}, which {slices} slices do not divide; "
                "choose a divisor"
            )
        for part, piece in zip(sliced, weight.chunk(slices), strict=True):
            part.append((name, piece))

    facts, family = bridge.facts, bridge.family
    if facts.is_latent_attention:
        heads = facts.num_attention_heads, "heads"
    else:
        heads = facts.num_key_value_heads, "query groups"
    for name in family.layer_names(facts, layer):
        weight = load(name)
        if name.endswith(_BY_HEAD):
            cut(name, weight, *heads)
        elif name == "self_attention.linear_proj.weight":
            cut(name + TRANSPOSED, weight.T, *heads)
        elif name.endswith("linear_fc1.weight"):
            for suffix, half in zip((GATE, UP), weight.chunk(2), strict=True):
                cut(name + suffix, half, half.shape[0], "rows")
        elif name.endswith("linear_fc2.weight"):
            cut(name + TRANSPOSED, weight.T, weight.shape[1], "columns")
        else:
            kept = weight.float() if name in family.fp32_names else weight
            common.append((stored_name(COMMON, name), kept))
    layer_tensors = common + [
        (stored_name(slice_section(i), name), piece)
        for i, part in enumerate(sliced)
        for name, piece in part
    ]
    expert_tensors = [
        (stored_name(expert_section(e), name), load(expert_weight(e, name)))
        for e in range(facts.num_experts_of(layer))
        for name in ("linear_fc1.weight", "linear_fc2.weight")
    ]
    return layer_tensors, expert_tensors
