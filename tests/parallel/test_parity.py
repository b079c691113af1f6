"""The same mini-batch under every layout, against one dense float64 batch of transformers and autograd.

The reference knows nothing of mtopd: HF models of student and teachers, softmax, autograd.  Megatron's gradients come
back through the weight map as gradients of HF tensors, so every parameter is compared, tied ones summed.

Each world size is started once; its worker runs all layouts of that size, tied and untied, in the same processes.
Not exercised: pp > 2, tp > 2, bf16 training, CUDA.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mtopd.config import ConsolidateConfig, validate
from mtopd.convert.teacher import add_teacher
from mtopd.pipelines import prepare
from mtopd.run_dir import RunDir
from mtopd.tokenizer import load_tokenizer, vocab_size
from mtopd.trajectories import write_shard
from mtopd.types import Trajectory
from tests.conftest import run_ranks
from tests.small_models import save_model, write_prompts

WORKER = Path(__file__).with_name("parity_ranks.py")
NUM_SAMPLES = 14
WEIGHTS = [0.7, 0.3]
# name: (tp, pp, dp, teacher tp, micro-batch size, tied student, permuted sample ids)
LAYOUTS = {
    1: {"tp1pp1": (1, 1, 1, 1, 14, True), "untied": (1, 1, 1, 1, 5, False), "reordered": (1, 1, 1, 1, 3, True)},
    2: {
        "tp2": (2, 1, 1, 2, 5, True),
        "tp2-untied": (2, 1, 1, 2, 5, False),
        "pp2": (1, 2, 1, 1, 5, True),
        "pp2-untied": (1, 2, 1, 2, 5, False),
        "dp2": (1, 1, 2, 1, 3, True),  # three micro-batches a rank, unequal token counts
    },
    4: {"tp2pp2": (2, 2, 1, 2, 4, True), "tp2pp2-untied": (2, 2, 1, 1, 4, False)},
}


def trajectories(vocab: int, *, permute: bool) -> list[Trajectory]:
    """Unequal lengths, masks with holes, one sample without trained tokens.  ``permute`` renumbers the same samples."""
    rng = np.random.default_rng(7)
    samples = []
    for i in range(NUM_SAMPLES):
        prompt, response = rng.integers(3, vocab, rng.integers(2, 9)), rng.integers(3, vocab, rng.integers(1, 12))
        mask = (rng.random(len(response)) < 0.8).astype(int) if i else np.zeros(len(response), int)
        samples.append((i % 3 != 0, prompt, response, mask))
    order = list(range(NUM_SAMPLES))[::-1] if permute else range(NUM_SAMPLES)
    return [
        Trajectory(
            sample_id=new,
            prompt_id=f"p/{old}",
            route={},
            teacher_index=int(samples[old][0]),
            prompt_ids=tuple(samples[old][1].tolist()),
            response_ids=tuple(samples[old][2].tolist()),
            loss_mask=tuple(samples[old][3].tolist()),
            rollout_log_probs=(0.0,) * len(samples[old][2]),
            student_version=0,
            finish_reason="length",
        )
        for new, old in enumerate(order)
    ]


def dense_reference(
    student: torch.nn.Module, teachers: list[torch.nn.Module], samples: list[Trajectory], vocab: int
) -> dict:
    """Loss, gradients and the teachers' hidden states, one sample at a time in float64 (states in float32)."""
    student = student.double()
    doubles = [t.double() for t in teachers]
    tokens = [sum(sum(s.loss_mask) for s in samples if s.teacher_index == i) for i in range(len(teachers))]
    loss, kl_sum = torch.zeros((), dtype=torch.float64), 0.0
    for s in samples:
        ids = torch.tensor([[*s.prompt_ids, *s.response_ids[:-1]]])
        rows = len(s.prompt_ids) - 1 + np.flatnonzero(s.loss_mask)
        log_p = torch.log_softmax(student(ids).logits[0, rows, :vocab], -1)
        with torch.no_grad():
            log_q = torch.log_softmax(doubles[s.teacher_index](ids).logits[0, rows, :vocab], -1)
        kl = (log_p.exp() * (log_p - log_q)).sum()
        loss, kl_sum = loss + WEIGHTS[s.teacher_index] / tokens[s.teacher_index] * kl, kl_sum + kl.item()
    loss.backward()
    gradients = {n: p.grad for n, p in student.named_parameters()}
    singles = [t.float() for t in teachers]
    states = {}
    for s in samples:
        rows = len(s.prompt_ids) - 1 + np.flatnonzero(s.loss_mask)
        with torch.no_grad():
            ids = torch.tensor([[*s.prompt_ids, *s.response_ids[:-1]]])
            states[f"states/{s.prompt_id}"] = (
                singles[s.teacher_index].model(ids).last_hidden_state[0, rows].contiguous()
            )
    student.float()
    return {"loss": loss.detach(), "kl": torch.tensor(kl_sum / sum(tokens)), **gradients, **states}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Students (tied, untied), two teachers of other widths and depths as stores, references."""
    root = tmp_path_factory.mktemp("parity")
    # The HF table is larger than the tokenizer: rows beyond it must take no part anywhere.
    students = {tied: save_model(root / f"student-{tied}", seed=1, tied=tied, vocab=111) for tied in (True, False)}
    teachers = [
        save_model(root / "t0", seed=2, hidden=96, layers=3, tied=True, vocab=107),
        save_model(root / "t1", seed=3, hidden=64, layers=2, tied=False),
    ]
    for i, slices in enumerate((2, 2)):
        add_teacher(f"t{i}", root / f"t{i}", root / "stores" / f"t{i}", slices=slices)
    for name in ("self", "self-again"):
        add_teacher(name, root / "student-True", root / "stores" / name, slices=2)
    write_prompts(root / "prompts.jsonl")
    vocab = vocab_size(load_tokenizer(root / "student-True"))
    for tied, student in students.items():
        reference = dense_reference(student, teachers, trajectories(vocab, permute=False), vocab)
        assert reference["kl"] >= 1, f"the comparison needs models more than 1 nat apart, found {reference['kl']}"
        save_file({k: v.contiguous() for k, v in reference.items()}, root / f"reference-{tied}.safetensors")
    return root


def prepare_run(root: Path, name: str, layout: tuple, *, teachers: list[str], cache_dtype: str = "auto") -> Path:
    tp, pp, dp, teacher_tp, micro_batch_size, tied = layout
    values = {
        "run_dir": str(root / "runs" / name),
        "student": {"model": str(root / f"student-{tied}"), "parallel": {"tp": tp, "pp": pp, "dp": dp}},
        "teachers": [
            {
                "name": t,
                "store": str(root / "stores" / t),
                "route": {"domain": "ab"[i]},
                "weight": WEIGHTS[i],
                "parallel": {"tp": teacher_tp},
            }
            for i, t in enumerate(teachers)
        ],
        "data": {
            "sources": [{"name": "words", "path": str(root / "prompts.jsonl")}],
            "context_length": 64,
            "max_response": 16,
        },
        "rollout": {"prompts_per_iteration": NUM_SAMPLES},
        "teacher_offload": {"batch_tokens": 40},
        "hidden_cache": {"dtype": cache_dtype},
        "train": {"num_iterations": 1, "micro_batch_size": micro_batch_size, "optimizer": {"lr": 1e-3}},
    }
    config = validate(values, ConsolidateConfig, "test")
    run = RunDir(config.run_dir)
    with run.lock():
        prepare.consolidate(config, run, lambda text: None)
    vocab = vocab_size(load_tokenizer(root / "student-True"))
    run.trajectories(0).mkdir(parents=True)
    write_shard(run.trajectories(0), "given", trajectories(vocab, permute=name == "reordered"), run.generation)
    run.seal(run.trajectories(0))
    return run.path


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_layout_gives_the_dense_loss_gradients_and_states(workplace: Path, world_size: int) -> None:
    jobs = [
        {
            "run": str(prepare_run(workplace, name, layout, teachers=["t0", "t1"])),
            "reference": str(workplace / f"reference-{layout[5]}.safetensors"),
        }
        for name, layout in LAYOUTS[world_size].items()
    ]
    for dtype, limit in (("float32", 1e-6), ("bfloat16", 1e-4)) if world_size == 4 else ():
        run = prepare_run(
            workplace, f"self-{dtype}", (2, 2, 1, 2, 4, True), teachers=["self", "self-again"], cache_dtype=dtype
        )
        jobs.append({"run": str(run), "self_kl": limit})
    plan = workplace / f"plan-{world_size}.json"
    plan.write_text(json.dumps(jobs))
    output = run_ranks(world_size, WORKER, str(plan))
    print(output)
    assert output.count("PASSED") == len(jobs), output
