"""What the launcher refuses: layouts that a model is not trained or streamed on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from mtopd.config import SpecialistConfig, StudentConfig
from mtopd.pipelines.checks import check_mesh, check_student
from mtopd.pipelines.prepare import specialist
from mtopd.run_dir import RunDir
from mtopd.types import MtopdError
from tests.small_models import save_model, write_prompts


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
            "deepseek_v3",
            {"tp": 2},
            {"sequence_parallel": "False"},
            "experts needs sequence parallelism",
        ),
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
        (
            "qwen3_moe",
            {"tp": 2, "etp": 1},
            {"sequence_parallel": True},
            "etp 1 with tp 2 and ep 1 is not supported",
        ),
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


@pytest.mark.parametrize(
    ("num_experts", "tp", "ep", "message"),
    [
        (8, 4, 1, "has 2 slices, which tp 4 does not divide; .* a divisor, or add the teacher"),
        (8, 1, 3, "has 8 experts, which ep 3 does not divide; set its parallel.ep to a divisor$"),
        (0, 1, 2, "has 0 experts, which ep 2 does not divide; set its parallel.ep to 1$"),
    ],
)
def test_a_mesh_that_does_not_divide_its_teacher_is_refused(
    num_experts: int, tp: int, ep: int, message: str
) -> None:
    store = SimpleNamespace(slices=2, num_experts=num_experts)
    check_mesh("t0", store, 2, 4 if num_experts else 1)  # type: ignore[arg-type]
    with pytest.raises(MtopdError, match=f"teacher 't0' {message}"):
        check_mesh("t0", store, tp, ep)  # type: ignore[arg-type]
