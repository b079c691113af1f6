"""What a layer is cut into, and which checkpoints are refused.  That the parts compute the right
thing is tests/teacher_offload/test_architectures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from mtopd.convert.bridge import Bridge, rope_theta
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
            f"expert.{e:04d}" for e in range(bridge.num_experts(layer))
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


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("llama", {"attention_bias": True}, "attention_bias True"),
        ("llama", {"mlp_bias": True}, "mlp_bias True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type 'linear'",
        ),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 0},
            "sliding_window 32",
        ),
        ("mixtral", {"sliding_window": 32}, "sliding_window 32"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers \[0\]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave False"),
        ("deepseek_v3", {"norm_topk_prob": False}, "norm_topk_prob False"),
        ("deepseek_v3", {"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05"),
        ("deepseek_v3", {"q_lora_rank": None}, "q_lora_rank is None"),
        ("deepseek_v3", {"n_group": 4, "topk_group": 4}, "4 experts of 4 groups"),
        ("deepseek_v3", {"n_group": 1, "num_experts_per_tok": 1}, "num_experts_per_tok is 1"),
        (
            "deepseek_v3",
            {"rope_parameters": {**MODEL_TYPES["deepseek_v3"]["rope_parameters"], "mscale": 0.0}},
            "yarn",
        ),
    ],
)
def test_variants_that_megatron_computes_otherwise_are_refused(
    model_type: str, fields: Any, message: str
) -> None:
    shared = {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    hf_config = AutoConfig.for_model(model_type, **{**shared, **MODEL_TYPES[model_type], **fields})
    with pytest.raises(MtopdError, match=message):
        make_bridge(hf_config)


def test_scaled_ropes_are_named() -> None:
    rope = {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 1e4,
        "original_max_position_embeddings": 64,
    }
    with pytest.raises(MtopdError, match="rope_type 'yarn' of model_type 'qwen3' is not supported"):
        rope_theta(AutoConfig.for_model("qwen3", rope_parameters=rope))
