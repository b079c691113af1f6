"""One train step of a real model against transformers and autograd in float64.

The student is SmolLM2-135M, tied and with the end token as padding.  transformers gives the padding
row of an embedding no gradient (``padding_idx``): where it is also the end token, as here, a part of
that row is missing there (7 % of the row's gradient), so the reference is computed without it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file

from mtopd.config import ConsolidateConfig
from mtopd.config_file import load_config
from mtopd.convert.teacher import add_teacher
from mtopd.pipelines import prepare
from mtopd.run_dir import RunDir
from mtopd.tokenizer import load_tokenizer, vocab_size
from mtopd.trajectories import write_shard
from mtopd.types import Trajectory
from tests.conftest import run_ranks

WORKER = Path(__file__).parents[1] / "integration" / "real_model_ranks.py"
TEACHERS = ("near", "far")
_NOISE = {"near": 0.02, "far": 0.2}  # relative, on every weight
_QUESTIONS = (
    "What is the capital of France?",
    "Count the letters of the word banana.",
    "What is 17 + 25? Answer with the number.",
    "Name three colours.",
)


def make_teachers(model: Path, root: Path, *, slices: int = 1) -> None:
    """Two stores beside one another: the model with a little and with more noise on its weights."""
    for name in TEACHERS:
        folder = noisy_copy(model, root / name, _NOISE[name])
        add_teacher(name, folder, root / "stores" / name, slices=slices)


def noisy_copy(model: Path, folder: Path, noise: float) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    generator = torch.Generator().manual_seed(5)
    tensors = {
        name: tensor * (1 + noise * torch.randn(tensor.shape, generator=generator))
        for name, tensor in load_file(model / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_config(path: Path, model: Path, root: Path, **parallel: int) -> Path:
    """A consolidation of the two teachers, four prompts an iteration."""
    prompts = root / "prompts.jsonl"
    rows = [{"prompt": q, "kind": TEACHERS[i % 2]} for i, q in enumerate(_QUESTIONS)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "run_dir": str(path.with_suffix("")),
        "student": {"model": str(model), "parallel": parallel},
        "teachers": [
            {
                "name": n,
                "store": str(root / "stores" / n),
                "route": {"kind": n},
                "parallel": {"tp": 1},
            }
            for n in TEACHERS
        ],
        "data": {
            "sources": [{"name": "questions", "path": str(prompts)}],
            "context_length": 64,
            "max_response": 12,
        },
        "rollout": {"prompts_per_iteration": len(rows)},
        "train": {
            "num_iterations": 2,
            "micro_batch_size": 2,
            "optimizer": {"lr": 1e-5, "warmup_steps": 0},
        },
    }
    path.write_text(yaml.safe_dump(values))
    return path


def step(
    config_file: Path, samples: Sequence[Trajectory], *, world_size: int
) -> dict[str, torch.Tensor]:
    """Loss and gradients, under HF's names, of the product's first train step on ``samples``."""
    config = load_config(config_file, [], ConsolidateConfig)
    run = RunDir(config.run_dir)
    with run.lock():
        prepare.consolidate(config, run, lambda text: None)
    run.trajectories(0).mkdir(parents=True)
    write_shard(run.trajectories(0), "given", list(samples), run.generation)
    run.seal(run.trajectories(0))
    run_ranks(world_size, WORKER, str(run.path), timeout=400)
    return load_file(run.path / "step.safetensors")


def trajectories(model: Path) -> list[Trajectory]:
    """The questions with answers of drawn tokens, end tokens inside and at the end."""
    tokenizer = load_tokenizer(model)
    rng = np.random.default_rng(3)
    samples = []
    for i, question in enumerate(_QUESTIONS):
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        answer = [*rng.integers(3, vocab_size(tokenizer), 4 + i), tokenizer.eos_token_id]
        samples.append(
            Trajectory(
                sample_id=i,
                prompt_id=f"questions/{i}",
                route={},
                teacher_index=i % 2,
                prompt_ids=tuple(prompt),
                response_ids=tuple(int(n) for n in answer),
                loss_mask=(1,) * len(answer),
                rollout_log_probs=(0.0,) * len(answer),
                student_version=0,
                finish_reason="stop",
            )
        )
    return samples


def reference(model: Path, root: Path, samples: Sequence[Trajectory]) -> dict[str, torch.Tensor]:
    """The same by transformers and autograd in float64, one sample at a time; teachers of equal
    weight.
    """
    from transformers import AutoModelForCausalLM

    def load(folder: Path) -> torch.nn.Module:
        found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        found.get_input_embeddings().padding_idx = None
        return found

    student = load(model)
    known = vocab_size(load_tokenizer(model))
    total = torch.zeros((), dtype=torch.float64)
    for index, name in enumerate(TEACHERS):
        teacher = load(root / name)
        of_teacher = [s for s in samples if s.teacher_index == index]
        num_tokens = sum(sum(s.loss_mask) for s in of_teacher)
        for s in of_teacher:
            ids = torch.tensor([[*s.prompt_ids, *s.response_ids[:-1]]])
            rows = slice(len(s.prompt_ids) - 1, None)
            log_p_TV = torch.log_softmax(student(ids).logits[0, rows, :known], -1)
            with torch.no_grad():
                log_q_TV = torch.log_softmax(teacher(ids).logits[0, rows, :known], -1)
            loss = (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum() / num_tokens / len(TEACHERS)
            loss.backward()
            total += loss.detach()
        del teacher
    gradients = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    return {"loss": total, **gradients}


def gradient_error(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Relative L2 distance over all tensors together."""
    names = wanted.keys() - {"loss"}
    assert found.keys() - {"loss"} == names, found.keys() ^ wanted.keys()
    difference = sum(float((found[n].double() - wanted[n]).square().sum()) for n in names)
    return (difference / sum(float(wanted[n].square().sum()) for n in names)) ** 0.5
