"""Teachers streamed on meshes of their own, under a student at tp2 x pp2 over the same four ranks.

Small blocks make small models travel as big ones do: all-gathers with equal shares, broadcasts
where there are fewer blocks than ranks, re-layouts where tp is below the slice count.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mtopd.convert.teacher import add_teacher
from mtopd.teacher_offload import store as store_module
from tests.conftest import run_ranks
from tests.small_models import save_model

WORKER = Path(__file__).with_name("stream_ranks.py")
MODELS = {
    "qwen3": {"num_attention_heads": 8, "num_key_value_heads": 4, "layers": 3, "tied": False},
    "qwen3_moe": {"layers": 2},
    "deepseek_v3": {"layers": 3, "tied": False},
}
MESHES = {  # (tp, ep) over four ranks; what tp does not take are replicas
    "qwen3": [(1, 1), (2, 1), (4, 1)],
    "qwen3_moe": [(1, 1), (1, 2), (2, 2)],
    "deepseek_v3": [(1, 2), (4, 4)],
}


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints, stores in slices of the largest tp, and the states that transformers gives."""
    root = tmp_path_factory.mktemp("stream")
    draw = np.random.default_rng(0)
    samples = [draw.integers(0, 90, length).tolist() for length in (31, 5, 17, 2, 24, 9, 30, 12, 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "BLOCK_BYTES", 4096)
        for seed, (name, fields) in enumerate(MODELS.items()):
            model = save_model(root / "hf" / name, seed=seed, model_type=name, **fields)  # type: ignore[arg-type]
            slices = max(tp for tp, _ in MESHES[name])
            add_teacher(name, root / "hf" / name, root / "stores" / name, slices=slices)
            model.eval()
            with torch.no_grad():
                states = {
                    str(i): model.model(torch.tensor([s])).last_hidden_state[0]
                    for i, s in enumerate(samples)
                }
            save_file({k: v.contiguous() for k, v in states.items()}, root / f"{name}.safetensors")
        add_teacher("damaged", root / "hf" / "qwen3", root / "stores" / "damaged", slices=4)
    layer = root / "stores" / "damaged" / "layers" / "00001.safetensors"
    content = bytearray(layer.read_bytes())
    content[-1000] ^= 4
    layer.write_bytes(content)
    values = {"hf": root / "hf", "stores": root / "stores", "references": root}
    path = root / "spec.json"
    path.write_text(
        json.dumps({**{k: str(v) for k, v in values.items()}, "samples": samples, "meshes": MESHES})
    )
    return path


def test_every_mesh_streams_the_states_of_transformers(spec: Path) -> None:
    output = run_ranks(4, WORKER, str(spec))
    print(output)
    assert output.count("PASSED") == 4, output
