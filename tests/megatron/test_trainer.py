"""What a train step does for optimizers and schedules that this machine does not have, and for
16-bit models.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from mtopd.megatron import optimizer
from mtopd.megatron.micro_batch import ReachesWeight
from mtopd.megatron.trainer import _in_bfloat16
from tests.conftest import results_of, run_ranks
from tests.small_models import save_model

WORKER = Path(__file__).with_name("trainer_ranks.py")


class FusedAdam(torch.optim.Optimizer):
    """As Transformer Engine's: counts steps by group, and knows the dtypes of these states alone."""

    name_to_dtype_map = dict.fromkeys(("exp_avg", "exp_avg_sq", "master_param"), torch.float32)

    def state_dict(self) -> dict[str, Any]:
        values = super().state_dict()
        for state in values["state"].values():
            for name in state:
                assert self.name_to_dtype_map[name] == state[name].dtype
        return values


def adam_of(kind: Any) -> Any:
    weight = torch.nn.Parameter(torch.ones(3))
    return kind([weight], {"lr": 1.0}) if kind is FusedAdam else kind([weight])


@pytest.mark.parametrize("kind", [FusedAdam, torch.optim.AdamW])
def test_fresh_moments_have_the_names_that_this_adam_knows(kind: Any) -> None:
    adam = adam_of(kind)
    wrapper: Any = SimpleNamespace(optimizer=adam)
    optimizer.create_state(wrapper)
    (state,) = adam.state_dict()["state"].values()
    assert state.keys() == {"exp_avg", "exp_avg_sq"} | (set() if kind is FusedAdam else {"step"})
    assert all(not tensor.any() for tensor in state.values())


@pytest.mark.parametrize("kind", [FusedAdam, torch.optim.AdamW])
def test_the_seal_counts_the_steps_of_every_optimizer(kind: Any) -> None:
    """Rank 0 may have written no count for the experts, or none of this kind of Adam."""
    wrappers = [SimpleNamespace(optimizer=adam_of(kind)) for _ in range(2)]
    chained: Any = Mock(chained_optimizers=wrappers)
    of_dense, of_experts = ({"state": {}, "param_groups": [{}]} for _ in range(2))
    state = {0: {"optimizer": of_dense, "param_state": {}}, 1: of_experts}
    optimizer.load_state(chained, state, 7)
    for values in (of_dense, of_experts):
        counts = values["param_groups"][0].get("step"), values["state"].get("common_step")
        assert counts == ((7, None) if kind is FusedAdam else (None, 7))
    chained.load_state_dict.assert_called_once_with(state)
    schedule: Any = Mock()
    optimizer.resume_schedule(schedule, 7)
    assert schedule.num_steps == 0
    schedule.step.assert_called_once_with(8)


def test_a_loss_that_reaches_the_weight_may_be_freed_and_has_the_same_gradient() -> None:
    """Megatron frees a stage's output after its use, which it refuses for a view of another tensor."""
    hidden, weight = torch.ones(2, requires_grad=True), torch.ones(5, 3, requires_grad=True)
    before = 3.0 * hidden.sum()
    loss = ReachesWeight.apply(before, weight)
    assert loss._base is None and torch.equal(loss, before)
    reached = []
    weight.register_hook(reached.append)
    loss.backward()
    assert hidden.grad is not None and hidden.grad.tolist() == [3.0, 3.0]
    assert len(reached) == 1 and reached[0].shape == weight.shape and not reached[0].any()


def test_a_16_bit_model_keeps_its_routers_biases_in_float32() -> None:
    router = torch.nn.Linear(2, 2)
    bias = 0.1 + torch.arange(4) / 1000  # none of them is a bfloat16
    router.register_buffer("expert_bias", bias)
    chunk: Any = torch.nn.Sequential(router)
    chunk.config = SimpleNamespace(fp16=False, bf16=True, virtual_pipeline_model_parallel_size=None)
    wrapped: Any = _in_bfloat16(chunk)
    assert wrapped.module is chunk and router.weight.dtype == torch.bfloat16
    assert router.expert_bias is bias and bias.dtype == torch.float32


def run_jobs(root: Path, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    output = run_ranks(2, WORKER, str(root), json.dumps(jobs))
    found = results_of(output)
    assert len(found) == len(jobs), output
    return found


def test_a_routers_own_loss_has_the_weight_that_megatron_gives_it(tmp_path: Path) -> None:
    """Megatron multiplies it by a micro-batch's tokens and divides all gradients by the
    mini-batch's; ours are divided by nothing.
    """
    save_model(tmp_path / "qwen3_moe", seed=2, model_type="qwen3_moe", tied=False, vocab=111)
    layouts = [({"dp": 2}, {}), ({"pp": 2}, {}), ({"tp": 2}, {"sequence_parallel": True})]
    balanced = {"moe_router_load_balancing_type": "aux_loss"}
    jobs = [
        {"parallel": parallel, "megatron": {**megatron, **balanced}}
        for parallel, megatron in layouts
    ]
    for job in run_jobs(
        tmp_path, [{"check": "router_loss", "kind": "qwen3_moe", **job} for job in jobs]
    ):
        print(job["parallel"], f"error {job['error']:.1e}, effect {job['effect']:.2f}")
        assert job["error"] <= 2e-6 and 0.01 < job["effect"] < 1, job


def test_a_context_parallel_rank_may_have_no_label(tmp_path: Path) -> None:
    save_model(tmp_path / "qwen3", seed=1, vocab=111)
    jobs = [
        {"check": "one_answer", "kind": "qwen3", "parallel": parallel}
        for parallel in ({"cp": 2}, {"tp": 2})
    ]
    split, whole = run_jobs(tmp_path, jobs)
    assert split["tokens"] == whole["tokens"] == 4
    assert split["loss"] == pytest.approx(whole["loss"], rel=1e-6)
