"""Teachers of every architecture on meshes of their own, against transformers and a resident Megatron model.

No streamer: the parts of a store are joined by hand.  Four gloo ranks run all models under a student's tp 2 x pp 2.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.conftest import run_ranks
from tests.small_models import save_model

WORKER = Path(__file__).with_name("architecture_ranks.py")
LIMIT = 2e-6  # of the norm of a token's state, float32
EXPERT_MESHES = [(1, 1), (2, 1), (1, 2), (1, 4), (2, 2)]
# name: (fields, slices of the store, meshes (tp, ep))
MODELS: dict[str, tuple[dict, int, list[tuple[int, int]]]] = {
    "llama": ({"num_attention_heads": 8, "num_key_value_heads": 4}, 4, [(1, 1), (2, 1), (4, 1)]),
    "qwen2": ({"tied": False}, 2, [(1, 1), (2, 1)]),
    "qwen3": ({"hidden": 96, "layers": 3}, 2, [(1, 1), (2, 1)]),
    "qwen3_moe": ({}, 2, EXPERT_MESHES),
    "qwen3_moe-raw": ({"norm_topk_prob": False, "num_key_value_heads": 4}, 4, [(1, 1), (4, 4)]),
    "mixtral": ({"tied": False}, 2, EXPERT_MESHES),
    "deepseek_v3": ({"tied": False}, 4, [*EXPERT_MESHES, (4, 1), (4, 4)]),
    "deepseek_v3-plain": (
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 2,
        },
        2,
        [(1, 1), (2, 2)],
    ),
}


def test_every_architecture_on_every_mesh_gives_the_states_of_transformers(tmp_path: Path) -> None:
    for seed, (name, (fields, _, _)) in enumerate(MODELS.items()):
        model = save_model(tmp_path / name, seed=seed, model_type=name.partition("-")[0], **fields).eval()
        chunks = {}
        for i, shape in enumerate([(2, 13), (1, 40), (3, 5)]):  # 40: beyond the original range of the scaled rope
            ids = torch.randint(0, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(i))
            with torch.no_grad():
                states = model.model(ids).last_hidden_state
            chunks |= {f"ids/{i}": ids, f"states/{i}": states.contiguous()}
        save_file(chunks, tmp_path / f"{name}.chunks.safetensors")
    plan = [(name, slices, meshes) for name, (_, slices, meshes) in MODELS.items()]
    output = run_ranks(4, WORKER, str(tmp_path), json.dumps(plan))
    results = {
        (m[1], int(m[2]), int(m[3])): (float(m[4]), float(m[5]))
        for m in re.finditer(r"RESULT (\S+) (\d) (\d) (\S+) (\S+)", output)
    }
    assert results.keys() == {(name, *mesh) for name, (_, _, meshes) in MODELS.items() for mesh in meshes}, output
    print(*(f"{key}: {errors[0]:.1e}" for key, errors in results.items()), sep="\n")
    assert all(error <= LIMIT for error, _ in results.values()), results
    assert all(difference == 0 for _, difference in results.values()), results  # resident model: bit for bit
