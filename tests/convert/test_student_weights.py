"""Every architecture as a student: its weights through Megatron and back at every layout, and into
the engine.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mtopd.hf_writer import INDEX
from mtopd.run_dir import SEAL
from tests.conftest import run_ranks
from tests.fp8_models import BLOCK, quantise
from tests.small_models import MODEL_TYPES, save_model

WORKER = Path(__file__).with_name("student_ranks.py")
SP = {"sequence_parallel": True}
DENSE = [({"tp": 2, "pp": 2}, {}), ({"pp": 2, "vpp": 2, "dp": 2}, {}), ({"cp": 2, "dp": 2}, {})]
UNEVEN = ({"pp": 2, "dp": 2}, {"num_layers_in_last_pipeline_stage": 1})
EXPERTS = [
    ({"pp": 2, "dp": 2, "ep": 2}, {}),
    ({"tp": 2, "dp": 2, "ep": 4}, SP),
    ({"tp": 2, "pp": 2}, SP),
]
LAYOUTS = {
    "llama": [({"tp": 2, "dp": 2}, {}), ({"pp": 2, "dp": 2}, {})],
    "qwen2": [({"tp": 2, "pp": 2}, {})],
    "qwen3": [*DENSE, UNEVEN],
    "qwen3_moe": [*EXPERTS, ({"pp": 2, "vpp": 2, "dp": 2, "ep": 2}, {})],
    "mixtral": [({"tp": 2, "pp": 2, "ep": 2}, SP)],
    # A dense layer first: kinds differ by place.
    "deepseek_v3": [*EXPERTS, ({"pp": 2, "vpp": 2, "dp": 2}, {}), UNEVEN],
}


def with_further_head(folder: Path) -> dict[str, torch.Tensor]:
    """Add what a checkpoint has of a head that predicts the token after the next, as a layer behind
    the last.
    """
    tensors = load_file(folder / "model.safetensors")
    extra = {
        f"model.layers.4.{name}": torch.randn(8, 4).bfloat16()
        for name in ("enorm.weight", "shared_head.norm.weight")
    }
    save_file({**tensors, **extra}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    return extra


def under_a_config_that_says_tied(folder: Path) -> torch.Tensor:
    """The folder's own output layer, which counts all the same, as in transformers."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return load_file(folder / "model.safetensors")["lm_head.weight"]


def test_weights_come_back_bit_for_bit_and_answer_as_transformers_does(tmp_path: Path) -> None:
    assert LAYOUTS.keys() == MODEL_TYPES.keys()
    jobs = []
    for seed, (kind, layouts) in enumerate(LAYOUTS.items()):
        tied = kind in ("llama", "qwen3")
        save_model(tmp_path / kind, seed=seed, model_type=kind, vocab=111, tied=tied)
        jobs += [{"kind": kind, "student": {"parallel": p, "megatron": m}} for p, m in layouts]
    jobs += [
        {
            "kind": "deepseek_v3",
            "student": {"parallel": {"pp": 2, "dp": 2, "ep": 2}, "dtype": "bfloat16"},
        }
    ]
    for number, job in enumerate(jobs):
        job["name"] = f"{job['kind']}-{job['student'].get('dtype', 'float32')}/{number}"
    further = with_further_head(tmp_path / "deepseek_v3")
    head = under_a_config_that_says_tied(tmp_path / "qwen2")
    output = run_ranks(4, WORKER, str(tmp_path), json.dumps(jobs), timeout=400.0)
    print(output)
    assert output.count("PASSED") == len(jobs), output
    for kind in {Path(job["name"]).parent for job in jobs}:
        files = [
            {path.name: path.read_bytes() for path in export.iterdir() if path.name != SEAL}
            for export in sorted((tmp_path / "runs").glob(f"{kind}/*/export"))
        ]
        assert all(found == files[0] for found in files), f"{kind}: not the same bytes everywhere"
        assert sum(name.startswith("model-") for name in files[0]) > 4 and INDEX in files[0]
    export = tmp_path / "runs" / "qwen2-freeze"
    assert torch.equal(load_file(export / "model.safetensors")["lm_head.weight"], head)
    assert json.loads((export / "config.json").read_text())["tie_word_embeddings"] is False
    for mtp in ("freeze", "drop"):
        export = tmp_path / "runs" / f"deepseek_v3-{mtp}"
        stored = load_file(export / "model.safetensors")
        assert json.loads((export / "config.json").read_text())["num_nextn_predict_layers"] == (
            mtp == "freeze"
        )
        assert {name for name in stored if ".layers.4." in name} == (
            further.keys() if mtp == "freeze" else set()
        )
        assert all(
            torch.equal(stored[name], tensor) for name, tensor in further.items() if mtp == "freeze"
        )


def test_a_student_of_fp8_weights_is_the_one_of_the_dequantised_folder(tmp_path: Path) -> None:
    """Two tp ranks: both take their rows and columns of the same numbers; the exports tell."""
    save_model(tmp_path / "plain", seed=1, model_type="deepseek_v3", vocab=111, tied=False)
    quantise(tmp_path / "plain", tmp_path / "fp8", tmp_path / "whole", BLOCK)
    student = {"parallel": {"tp": 2}, "megatron": SP}
    jobs = [{"kind": kind, "name": kind, "student": student} for kind in ("fp8", "whole")]
    output = run_ranks(2, WORKER, str(tmp_path), json.dumps(jobs), timeout=400.0)
    assert output.count("PASSED") == len(jobs), output
    found, expected = (
        {path.name: path.read_bytes() for path in folder.iterdir() if path.name != SEAL}
        for folder in (tmp_path / "runs" / kind / "export" for kind in ("fp8", "whole"))
    )
    assert found == expected and INDEX in found
