"""What the families say of real HF configs: facts, refused variants, names and Megatron's fields."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from mtopd.families import (
    FAMILIES,
    ModelFacts,
    check_variant,
    model_facts,
    without_further_heads,
)
from mtopd.types import MtopdError
from tests.small_models import MODEL_TYPES

SHARED = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 111,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
}
DENSE = ModelFacts(
    num_layers=2,
    hidden_size=64,
    ffn_size=96,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
    value_head_dim=16,
    vocab_size=111,
    max_positions=128,
    rope_theta=1e4,
    has_tied_embeddings=True,
    dense_ffn_size=96,
    split_attention_params=4 * 64 * 64,
)
FACTS = {
    "llama": DENSE,
    "qwen2": replace(DENSE, split_attention_params=4 * 64 * 64 + 3 * 64),
    "qwen3": replace(DENSE, common_attention_params=2 * 16),
    "qwen3_moe": replace(
        DENSE,
        ffn_size=2 * 32,
        num_experts=8,
        experts_per_token=2,
        common_attention_params=2 * 16,
        dense_ffn_size=0,
        expert_ffn_size=32,
    ),
    "mixtral": replace(
        DENSE,
        ffn_size=2 * 96,
        num_experts=4,
        experts_per_token=2,
        dense_ffn_size=0,
        expert_ffn_size=96,
    ),
    "deepseek_v3": replace(
        DENSE,
        ffn_size=(4 + 2) * 32,
        head_dim=8,  # of its rotary part, which transformers names so
        value_head_dim=12,
        is_latent_attention=True,
        num_experts=8,
        experts_per_token=4,
        num_dense_layers=1,
        expert_ffn_size=32,
        shared_ffn_size=2 * 32,
        split_attention_params=4 * (24 * (16 + 8) + 32 * (16 + 12) + 12 * 64),
        common_attention_params=64 * (24 + 32 + 8) + 24 + 32,
    ),
}


PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}
YARN = MODEL_TYPES["deepseek_v3"]["rope_parameters"]


def make_config(model_type: str, **fields: Any) -> PretrainedConfig:
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    # transformers writes into the dicts that it is given, and these are shared.
    values = copy.deepcopy({**SHARED, **rope, **MODEL_TYPES[model_type], **fields})
    return AutoConfig.for_model(model_type, **values)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_facts_of_every_family(model_type: str) -> None:
    assert FAMILIES.keys() == MODEL_TYPES.keys()
    assert model_facts(make_config(model_type)) == FACTS[model_type]
    check_variant(make_config(model_type))


def test_a_layer_is_dense_or_has_experts_and_its_names_say_so() -> None:
    for model_type, facts in FACTS.items():
        for layer in range(facts.num_layers):
            has_experts = facts.num_experts > 0 and (model_type, layer) != ("deepseek_v3", 0)
            assert (facts.num_experts_of(layer) > 0) == has_experts
            names = FAMILIES[model_type].layer_names(facts, layer)
            assert ("mlp.router.weight" in names) == has_experts
            assert ("mlp.linear_fc1.weight" in names) != has_experts
            if has_experts:
                assert set(FAMILIES[model_type].fp32_names) <= set(names)
    assert FAMILIES["qwen2"].layer_names(FACTS["qwen2"], 0) == [
        "input_layernorm.weight",
        "self_attention.linear_qkv.weight",
        "self_attention.linear_qkv.bias",
        "self_attention.linear_proj.weight",
        "pre_mlp_layernorm.weight",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
    ]


def test_further_heads_stand_behind_the_last_layer_and_can_be_dropped() -> None:
    names = ["model.layers.1.mlp.up_proj.weight", "model.layers.2.enorm.weight", "lm_head.weight"]
    facts = replace(DENSE, num_further_heads=1)
    assert [facts.is_further_head(name) for name in names] == [False, True, False]
    # A model that was made shallower has left layers in its files; they are no heads.
    assert [DENSE.is_further_head(name) for name in names] == [False, False, False]
    assert [DENSE.is_behind_last(name) for name in names] == [False, True, False]
    config = make_config("deepseek_v3", num_nextn_predict_layers=1)
    assert without_further_heads(config) == {"num_nextn_predict_layers": 0}
    assert without_further_heads(make_config("qwen3")) == {}


@pytest.mark.parametrize("pre", [True, False])
def test_routing_follows_the_checkpoints_own_normalisation(pre: bool) -> None:
    fields = FAMILIES["qwen3_moe"].megatron_fields(make_config("qwen3_moe", norm_topk_prob=not pre))
    assert fields["moe_router_pre_softmax"] is pre and fields["moe_aux_loss_coeff"] == 0.0


def test_no_heavy_library_is_loaded_by_the_tables() -> None:
    code = (
        "import sys, mtopd.families\n"
        "heavy = {'torch', 'numpy', 'megatron', 'mbridge', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
        ("deepseek_v3", {"n_group": 3}, r"8 experts do not go into 3 groups \(n_group\)"),
        ("deepseek_v3", {"n_group": 1, "topk_group": 2}, "a token has 2 of 1 groups"),
        (
            "deepseek_v3",
            {"rope_parameters": {**YARN, "mscale": 0.0}},
            "yarn",
        ),
        (
            "deepseek_v3",
            {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor 0.5 of",
        ),
        *(
            (kind, fields, f"partial_rotary_factor 0.5 of model_type '{kind}'")
            for kind in MODEL_TYPES
            for fields in (
                {"partial_rotary_factor": 0.5},
                {"rope_parameters": {**PLAIN_ROPE, "partial_rotary_factor": 0.5}},
            )
        ),
    ],
)
def test_variants_that_megatron_computes_otherwise_are_refused(
    model_type: str, fields: Any, message: str
) -> None:
    with pytest.raises(MtopdError, match=message):
        check_variant(make_config(model_type, **fields))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_a_token_has_no_more_experts_than_there_are(model_type: str) -> None:
    facts = model_facts(make_config(model_type, num_experts_per_tok=9))
    with pytest.raises(ValueError, match=f"a token has 9 of {facts.num_experts} experts"):
        facts.check_numbers()


def test_scaled_ropes_are_named() -> None:
    rope = {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 1e4,
        "original_max_position_embeddings": 64,
    }
    with pytest.raises(MtopdError, match="rope_type 'yarn' of model_type 'qwen3' is not supported"):
        check_variant(make_config("qwen3", rope_parameters=rope))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_transformers_turns_all_of_a_head_whatever_the_factor_says(model_type: str) -> None:
    """So the refusal of another factor refuses no model that transformers computes otherwise."""
    ids, logits = torch.arange(12)[None], []
    for factor in (1.0, 0.5):
        rope = {**PLAIN_ROPE, "partial_rotary_factor": factor}
        config = make_config(model_type, rope_parameters=rope)
        assert config.rope_parameters["partial_rotary_factor"] == factor
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            logits.append(model(ids).logits)
    assert torch.equal(*logits)


def test_transformers_fails_on_a_part_of_a_head_under_yarn() -> None:
    config = make_config("deepseek_v3", rope_parameters={**YARN, "partial_rotary_factor": 0.5})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with pytest.raises(RuntimeError, match="size of tensor"):
        model(torch.arange(12)[None])


@pytest.mark.parametrize("factor", [{}, {"partial_rotary_factor": 1.0}])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_no_config_is_refused_as_transformers_saves_it(
    tmp_path: Path, model_type: str, factor: dict[str, float]
) -> None:
    rope = MODEL_TYPES[model_type].get("rope_parameters", PLAIN_ROPE)
    make_config(model_type, rope_parameters={**rope, **factor}).save_pretrained(tmp_path)
    check_variant(AutoConfig.from_pretrained(tmp_path))
