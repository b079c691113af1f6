"""The parameters of one layer as a teacher store holds them: what tp replicates, slices, experts."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mtopd.convert.bridge import Bridge

Parts = list[tuple[str, torch.Tensor]]  # stored name, tensor

_LAYER_PARAMETERS = (  # of a Megatron TransformerLayer built from its local spec
    "input_layernorm.weight",
    "self_attention.q_layernorm.weight",
    "self_attention.k_layernorm.weight",
    "pre_mlp_layernorm.weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
)


def layer_parts(bridge: Bridge, tensors: Mapping[str, torch.Tensor], layer: int, slices: int) -> tuple[Parts, Parts]:
    """(layer tensors, expert tensors) of one layer, sections together and in order; a dense layer has no experts.

    Tensors may be views of any strides.
    """
    common: Parts = []
    sliced: list[Parts] = [[] for _ in range(slices)]

    def cut(name: str, weight: torch.Tensor) -> None:
        for part, piece in zip(sliced, weight.chunk(slices), strict=True):
            part.append((name, piece))

    for name in _LAYER_PARAMETERS:
        full_name = f"decoder.layers.{layer}.{name}"
        weight = bridge.to_megatron(full_name, [tensors[n] for n in bridge.hf_names(full_name)])
        if name == "self_attention.linear_qkv.weight":
            cut(name, weight)  # rows stand by query group: a slice is a whole number of groups
        elif name == "mlp.linear_fc1.weight":
            gate, up = weight.chunk(2)
            cut(f"{name}.gate", gate)
            cut(f"{name}.up", up)
        elif name in ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight"):
            cut(f"{name}.T", weight.T)
        else:
            common.append((f"common/{name}", weight))
    sections = [(f"slice.{i:04d}/{name}", piece) for i, part in enumerate(sliced) for name, piece in part]
    return common + sections, []
