"""What a layer is cut into.  That the parts compute the right thing is
tests/teacher_offload/test_architectures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mtopd.convert.bridge import Bridge
from mtopd.convert.layer_parts import layer_parts
from mtopd.hf_checkpoint import load_hf_config
from mtopd.types import MtopdError
from tests.small_models import MODEL_TYPES, save_model


def make_bridge(hf_config: Any, dtype: torch.dtype = torch.float32) -> Bridge:
    return Bridge(hf_config, dtype=dtype, padded_vocab_size=hf_config.vocab_size, tp=1)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_value_of_a_layer_stands_once_and_keeps_its_dtype(
    model_type: str, tmp_path: Path
) -> None:
    save_model(tmp_path, seed=1, model_type=model_type, layers=2)
    stored = load_file(tmp_path / "model.safetensors")
    # Mixed as checkpoints are: matrices in bfloat16, norms and the router's bias in what they were
    # trained in.
    stored = {n: t.bfloat16() if t.dim() == 2 else t for n, t in stored.items()}
    bridge = make_bridge(load_hf_config(tmp_path), torch.bfloat16)
    for layer in range(2):
        layer_tensors, expert_tensors = layer_parts(bridge, stored, layer, 2)
        names = [name for name, _ in layer_tensors + expert_tensors]
        sections = [name.partition("/")[0] for name in names]
        assert len(set(names)) == len(names) and sections == sorted(sections, key=sections.index)
        num_experts = sum(section.startswith("expert.") for section in set(sections))
        assert set(sections) == {"common", "slice.0000", "slice.0001"} | {
            f"expert.{e:04d}" for e in range(bridge.facts.num_experts_of(layer))
        }
        is_moe = model_type in ("qwen3_moe", "mixtral") or (
            model_type == "deepseek_v3" and layer == 1
        )
        assert (num_experts > 0) == is_moe
        assert [n for n, t in layer_tensors if n.startswith("slice.0000")] == [
            n.replace("slice.0001", "slice.0000")
            for n, t in layer_tensors
            if n.startswith("slice.0001")
        ]
        found = (
            torch.cat([t.float().flatten() for _, t in layer_tensors + expert_tensors])
            .sort()
            .values
        )
        wanted = [t.float().flatten() for n, t in stored.items() if f"layers.{layer}." in n]
        assert torch.equal(found, torch.cat(wanted).sort().values)
        for name, tensor in layer_tensors + expert_tensors:
            assert tensor.dtype == (torch.bfloat16 if tensor.dim() == 2 else torch.float32), name


def test_what_is_cut_and_what_is_common(tmp_path: Path) -> None:
    save_model(tmp_path, seed=1, model_type="deepseek_v3", layers=2)
    stored = load_file(tmp_path / "model.safetensors")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    stored[bias] = stored[bias].bfloat16()
    layer_tensors, expert_tensors = layer_parts(make_bridge(load_hf_config(tmp_path)), stored, 1, 4)
    shapes = {name: tuple(tensor.shape) for name, tensor in layer_tensors + expert_tensors}
    assert {
        n: s
        for n, s in shapes.items()
        if not n.startswith(("slice.0001", "slice.0002", "slice.0003"))
    } == {
        "common/input_layernorm.weight": (64,),
        "common/self_attention.q_layernorm.weight": (24,),
        "common/self_attention.kv_layernorm.weight": (32,),
        "common/self_attention.linear_q_down_proj.weight": (24, 64),
        "common/self_attention.linear_kv_down_proj.weight": (32 + 8, 64),
        "common/pre_mlp_layernorm.weight": (64,),
        "common/mlp.router.weight": (8, 64),
        "common/mlp.router.expert_bias": (8,),
        "slice.0000/self_attention.linear_q_up_proj.weight": (16 + 8, 24),
        "slice.0000/self_attention.linear_kv_up_proj.weight": (16 + 12, 32),
        "slice.0000/self_attention.linear_proj.weight.T": (12, 64),
        "slice.0000/mlp.shared_experts.linear_fc1.weight.gate": (16, 64),
        "slice.0000/mlp.shared_experts.linear_fc1.weight.up": (16, 64),
        "slice.0000/mlp.shared_experts.linear_fc2.weight.T": (16, 64),
        **{f"expert.{e:04d}/linear_fc1.weight": (64, 64) for e in range(8)},
        **{f"expert.{e:04d}/linear_fc2.weight": (64, 32) for e in range(8)},
    }
    assert dict(layer_tensors)["common/mlp.router.expert_bias"].dtype == torch.float32
    gate, up = dict(expert_tensors)["expert.0003/linear_fc1.weight"].chunk(2)
    assert torch.equal(gate, stored["model.layers.1.mlp.experts.3.gate_proj.weight"])
    assert torch.equal(up, stored["model.layers.1.mlp.experts.3.up_proj.weight"])


@pytest.mark.parametrize(
    ("slices", "what"), [(0, "2 query groups"), (4, "2 query groups"), (3, "2 query groups")]
)
def test_slices_that_do_not_divide_are_refused(slices: int, what: str, tmp_path: Path) -> None:
    save_model(tmp_path, seed=1, layers=1)
    bridge = make_bridge(load_hf_config(tmp_path))
    with pytest.raises(MtopdError, match=f"{what} .*which {slices} slices do not divide"):
        layer_parts(bridge, load_file(tmp_path / "model.safetensors"), 0, slices)


def test_a_bridge_refuses_variants(tmp_path: Path) -> None:
    save_model(tmp_path, seed=1, layers=1)
    hf_config = load_hf_config(tmp_path)
    hf_config.attention_bias = True
    with pytest.raises(MtopdError, match="attention_bias True"):
        make_bridge(hf_config)
