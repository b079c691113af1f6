"""Every architecture as a student: its weights through Megatron and back at every layout, and into
the engine.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtopd.config import SpecialistConfig, StudentConfig
from mtopd.pipelines.prepare import check_student, specialist
from mtopd.run_dir import RunDir
from mtopd.types import MtopdError
from tests.conftest import run_ranks
from tests.small_models import MODEL_TYPES, save_model, write_prompts

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
    "llama": [({"tp": 2, "dp": 2}, {})],
    "qwen2": [({"tp": 2, "pp": 2}, {})],
    "qwen3": [*DENSE, UNEVEN],
    "qwen3_moe": [*EXPERTS, ({"pp": 2, "vpp": 2, "dp": 2, "ep": 2}, {})],
    "mixtral": [({"tp": 2, "pp": 2, "ep": 2}, SP)],
    "deepseek_v3": [
        *EXPERTS,
        ({"pp": 2, "vpp": 2, "dp": 2}, {}),
        UNEVEN,
    ],  # a dense layer first: kinds differ by place
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


def test_weights_come_back_bit_for_bit_and_answer_as_transformers_does(tmp_path: Path) -> None:
    assert LAYOUTS.keys() == MODEL_TYPES.keys()
    jobs = []
    for seed, (kind, layouts) in enumerate(LAYOUTS.items()):
        save_model(tmp_path / kind, seed=seed, model_type=kind, vocab=111, tied=kind == "qwen3")
        jobs += [{"kind": kind, "student": {"parallel": p, "megatron": m}} for p, m in layouts]
    jobs += [
        {
            "kind": "deepseek_v3",
            "student": {"parallel": {"pp": 2, "dp": 2, "ep": 2}, "dtype": "bfloat16"},
        }
    ]
    further = with_further_head(tmp_path / "deepseek_v3")
    output = run_ranks(4, WORKER, str(tmp_path), json.dumps(jobs), timeout=400.0)
    print(output)
    assert output.count("PASSED") == len(jobs), output
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


@pytest.mark.parametrize(
    ("kind", "parallel", "megatron", "message"),
    [
        (
            "qwen3_moe",
            {"tp": 2},
            {},
            "experts needs sequence parallelism: set student.megatron.sequence_parallel=true",
        ),
        ("deepseek_v3", {"tp": 2}, {}, "experts needs sequence parallelism"),
        (
            "qwen3_moe",
            {"dp": 3, "ep": 3},
            {},
            "has 8 experts, which student.parallel.ep 3 does not divide",
        ),
        ("qwen3", {"dp": 2, "ep": 2}, {}, "has 0 experts, which student.parallel.ep 2"),
        (
            "qwen3_moe",
            {"ep": 2},
            {},
            "ep 2 x etp 1 = 2 does not divide the 1 ranks of a pipeline stage; set",
        ),
        ("qwen3", {"vpp": 2}, {}, "student.parallel.vpp 2 needs a pipeline"),
        (
            "qwen3",
            {"tp": 2, "etp": 2},
            {},
            "etp 2 splits experts, of which .* has none; leave it out",
        ),
        ("qwen3_moe", {"tp": 2, "etp": 1}, SP, "etp 1 with tp 2 and ep 1 is not supported"),
        (
            "qwen3_moe",
            {},
            {"moe_aux_loss_coeff": 0.01},
            "moe_aux_loss_coeff=0.01 makes a step depend on the layout",
        ),
        ("qwen3_moe", {}, {"moe_router_bias_update_rate": 1e-3}, "set deterministic=false"),
        (
            "qwen3_moe",
            {},
            {"moe_router_load_balancing_type": "sinkhorn"},
            "=sinkhorn .* deterministic=false, .* none or",
        ),
        (
            "qwen3_moe",
            {},
            {"moe_router_force_load_balancing": True},
            "=True .* deterministic=false, or leave it at False",
        ),
        ("deepseek_v3", {"cp": 2}, {}, "cp 2 does not go with latent attention"),
        ("qwen3", {"pp": 3}, {}, "has 4 layers, which 3-way"),
        ("qwen3", {"pp": 2, "vpp": 4}, {}, "has 4 layers, which 8-way"),
    ],
)
def test_layouts_that_would_be_wrong_are_refused_before_any_process_starts(
    tmp_path: Path, kind: str, parallel: dict, megatron: dict, message: str
) -> None:
    save_model(tmp_path, seed=0, model_type=kind)
    with pytest.raises(MtopdError, match=message):
        check_student(
            StudentConfig(model=tmp_path, parallel=parallel, megatron=megatron), deterministic=True
        )
    if "deterministic" in message:
        check_student(
            StudentConfig(model=tmp_path, parallel=parallel, megatron=megatron), deterministic=False
        )


def test_what_a_loss_at_coefficient_0_balances_depends_on_no_layout(tmp_path: Path) -> None:
    save_model(tmp_path, seed=0, model_type="qwen3_moe")
    for kind in ("none", "seq_aux_loss"):
        megatron = {
            "moe_router_load_balancing_type": kind,
            "moe_router_group_topk": 1,
            "moe_router_num_groups": 2,
        }
        check_student(StudentConfig(model=tmp_path, megatron=megatron), deterministic=True)


def test_a_specialist_may_balance_its_experts_by_a_loss(tmp_path: Path) -> None:
    """It has no deterministic key: nothing is promised of another layout."""
    save_model(tmp_path / "base", seed=0, model_type="qwen3_moe")
    values = {
        "run_dir": tmp_path / "run",
        "student": {"model": tmp_path / "base", "megatron": {"moe_aux_loss_coeff": 0.01}},
        "data": {
            "sources": [{"name": "words", "path": write_prompts(tmp_path / "prompts.jsonl")}],
            "context_length": 64,
            "max_response": 16,
        },
        "train": {
            "num_steps": 1,
            "global_batch_size": 2,
            "micro_batch_size": 2,
            "optimizer": {"lr": 1e-3},
        },
    }
    config = SpecialistConfig.model_validate(values)
    run = RunDir(config.run_dir)
    with run.lock():
        specialist(config, run, print)
    assert run.generation == 1
