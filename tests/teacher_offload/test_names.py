"""Names of a store's tensors, built and parsed by one grammar."""

from __future__ import annotations

from mtopd.teacher_offload.names import (
    COMMON,
    GATE,
    expert_section,
    expert_weight,
    experts_path,
    is_experts_path,
    layer_path,
    local_name,
    section_of,
    slice_section,
    stored_name,
)


def test_what_is_built_is_parsed() -> None:
    gate = stored_name(slice_section(3), "mlp.linear_fc1.weight" + GATE)
    assert gate == "slice.0003/mlp.linear_fc1.weight.gate" and section_of(gate) == slice_section(3)
    assert local_name(gate, first_expert=0) == "mlp.linear_fc1.weight.gate"
    assert local_name(stored_name(COMMON, "weight"), first_expert=5) == "weight"


def test_experts_are_counted_from_the_ranks_first() -> None:
    stored = stored_name(expert_section(7), "linear_fc2.weight")
    assert stored == "expert.0007/linear_fc2.weight"
    assert local_name(stored, first_expert=4) == expert_weight(3, "linear_fc2.weight")
    assert expert_weight(3, "a") == "mlp.experts.local_experts.3.a"


def test_paths() -> None:
    assert layer_path(12) == "layers/00012.safetensors"
    assert is_experts_path(experts_path(12)) and not is_experts_path(layer_path(12))
