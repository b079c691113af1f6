"""Worker of test_student_weights: loads students at several layouts, exports them, asks the rollout
engine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mtopd.config import OptimizerConfig, StudentConfig
from mtopd.files import write_json
from mtopd.hf_checkpoint import read_weights
from mtopd.megatron.options import splits_unevenly
from mtopd.pipelines.engines import embedded
from mtopd.pipelines.student import Student
from mtopd.planning import Layout
from mtopd.planning.capacity import stage_params
from mtopd.progress import quiet_libraries
from mtopd.rollout.engine import GREEDY, Engine, Request
from mtopd.run_dir import RunDir

BIAS = "e_score_correction_bias"  # chooses experts: float32 whatever the model is


def run_job(root: Path, job: dict[str, Any], first_of_kind: bool) -> None:
    folder = root / job["kind"]
    config = StudentConfig(**{"model": folder, "freeze_router": True, **job["student"]})
    student = Student(config, OptimizerConfig(lr=1e-3, warmup_steps=0), 10, seed=0)
    check_counted(student)
    engine = embedded(student, ())
    engine.update_weights(student.weights())
    wanted, found = read_weights(folder), student.weights()
    tied = {"lm_head.weight"} if student.hf_config.tie_word_embeddings else set()
    assert found.keys() - tied == wanted.keys() - tied, found.keys() ^ wanted.keys()
    for name in found.keys() - tied:
        stored = wanted[name] if name.endswith(BIAS) else wanted[name].to(student.dtype)
        assert torch.equal(found[name], stored), f"{name} came back otherwise"
        assert found[name].dtype == stored.dtype, name
    for name, tensor in engine._model.state_dict().items():
        if name.endswith(BIAS):
            assert tensor.dtype == torch.float32 and torch.equal(tensor, wanted[name]), (
                f"the engine's {name}"
            )
    for chunk in student.trainer.chunks:
        for name, parameter in chunk.named_parameters():
            assert parameter.requires_grad == (".router." not in name), name
    if first_of_kind:
        check_answers(root, job["kind"], student, engine)
    dist.barrier()


def check_counted(student: Student) -> None:
    """Planning counts a rank's parameters without building them; layers in equal numbers."""
    parallel = student.config.parallel
    if splits_unevenly(student.config.megatron):
        return
    layout = Layout(
        tp=parallel.tp,
        pp=parallel.pp,
        vpp=parallel.vpp,
        cp=parallel.cp,
        dp=parallel.dp,
        ep=parallel.ep,
        etp=parallel.expert_tp,
    )
    held = sum(p.numel() for chunk in student.trainer.chunks for p in chunk.parameters())
    counted = stage_params(student.facts.sizes, layout)[student.ranks.pp_rank]
    assert held == counted, (student.facts, layout, held, counted)


def check_answers(root: Path, kind: str, student: Student, engine: Engine) -> None:
    """Greedy answers of the engine, and of transformers from the exported folder: the same tokens."""
    run = RunDir(root / "runs", 1)
    if dist.get_rank() == 0:
        run.path.mkdir(exist_ok=True)
        write_json(run.path / "generation.json", {"generation": 1})
    dist.barrier()
    for mtp in ("drop", "freeze"):
        student.config = student.config.model_copy(update={"mtp": mtp})
        student.hf_config.num_nextn_predict_layers = 1  # what the folder says
        student.export(run, run.path / f"{kind}-{mtp}")
    prompts = [tuple(range(5 + i, 12 + 2 * i)) for i in range(4)]
    requests = [Request(f"p{i}", ids) for i, ids in enumerate(prompts)]
    answers = [r.response_ids for r in engine.generate(requests, max_response=12, sampling=GREEDY)]
    if dist.get_rank() == 0:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            run.path / f"{kind}-freeze", dtype=torch.float32
        ).eval()
        for ids, answer in zip(prompts, answers, strict=True):
            whole = torch.tensor([[*ids, *answer]])
            with torch.no_grad():
                logits = model(whole[:, :-1]).logits[0, len(ids) - 1 :, : student.vocab_size]
            assert logits.argmax(-1).tolist() == list(answer), (ids, answer)


if __name__ == "__main__":
    quiet_libraries()
    seen: set[str] = set()
    for spec in json.loads(sys.argv[2]):
        run_job(Path(sys.argv[1]), spec, spec["kind"] not in seen)
        seen.add(spec["kind"])
        if dist.get_rank() == 0:
            print(f"PASSED {spec['kind']} {spec['student']}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
