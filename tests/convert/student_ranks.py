"""Worker of test_student_weights: loads students at several layouts, exports them, asks the rollout
engine.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mtopd.config import OptimizerConfig, StudentConfig
from mtopd.convert import weight_stream
from mtopd.convert.bridge import Tie
from mtopd.convert.weight_stream import WeightStream
from mtopd.files import write_json
from mtopd.hf_weights import Bucket, read_weights
from mtopd.megatron.options import splits_unevenly
from mtopd.pipelines.engines import embedded
from mtopd.pipelines.export import export
from mtopd.pipelines.student import Student
from mtopd.planning import Layout
from mtopd.planning.capacity import stage_params
from mtopd.progress import quiet_libraries
from mtopd.rollout.engine import Engine, Request, Sampling
from mtopd.run_dir import RunDir
from tests.rollout.engines import alone, answer
from tests.small_models import whole

BIAS = "e_score_correction_bias"  # chooses experts: float32 whatever the model is


def run_job(root: Path, job: dict[str, Any], first_of_kind: bool) -> None:
    folder = root / job["kind"]
    config = StudentConfig(**{"model": folder, "freeze_router": True, **job["student"]})
    student = Student(config, OptimizerConfig(lr=1e-3, warmup_steps=0), 10, seed=0)
    check_counted(student)
    engine = embedded(student)
    engine.update_weights(student.weights(), "test/1/0")
    wanted, found = whole(read_weights(folder)), whole(student.weights())
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
    check_buckets(student, found)
    check_files(root / "runs" / job["name"], student)
    if first_of_kind:
        check_mutants(student, found)
        check_answers(root, job["kind"], student, engine)
    dist.barrier()


def check_buckets(student: Student, found: dict[str, torch.Tensor]) -> None:
    """The same tensors in small buckets, on all ranks, on any one of them, and dealt to all."""
    largest = max(tensor.nbytes for tensor in found.values())
    world, rank, large = dist.get_world_size(), dist.get_rank(), weight_stream._LARGE
    plan = [bucket.keys() for bucket in student.stream.buckets(20_000)]
    assert len(plan) > 3 and set().union(*plan) == found.keys()
    assert sum(map(len, plan)) == len(found), "a tensor came twice"
    takers: list[weight_stream.Taker] = [lambda _, to=to: to for to in (None, *range(world))]
    takers.append(lambda number: number % world)
    for taker in takers:
        weight_stream._LARGE = large
        streams: list[Iterable[Bucket]] = [[*student.stream.buckets(20_000, taker)]]
        weight_stream._LARGE = 1  # as buckets of a real model are made
        # One that is held is not what the next one is written into; one that is not, is.
        streams += [[*student.stream.buckets(20_000, taker)], student.stream.buckets(20_000, taker)]
        for stream in streams:
            for number, (bucket, names) in enumerate(zip(stream, plan, strict=True)):
                is_mine = taker(number) in (None, rank)
                assert bucket.keys() == (names if is_mine else set()), number
                assert sum(t.nbytes for t in bucket.values()) <= max(20_000, largest)
                for name, tensor in bucket.items():
                    assert torch.equal(tensor, found[name]), name
                    assert tensor.dtype == found[name].dtype, name
    weight_stream._LARGE = large


def check_files(folder: Path, student: Student) -> None:
    """An export in many files; that other layouts write the same bytes, the test compares."""
    run = RunDir(folder, 1)
    if dist.get_rank() == 0:
        run.path.mkdir(parents=True)
        write_json(run.path / "generation.json", {"generation": 1})
    dist.barrier()
    student.config = student.config.model_copy(update={"bucket_bytes": 20_000})
    export(student, run, run.path / "export", shard_bytes=100_000)


# What may be wrong in the table of ties, and what the weights then are: other ones, or refused.
def _swap(tie: Tie) -> Tie:
    return dataclasses.replace(tie, hf=(*tie.hf[1::-1], *tie.hf[2:]))


MUTANTS: dict[str, Callable[[list[Tie]], list[Tie]]] = {
    "a tensor left out": lambda ties: ties[:-1],
    "wrong axis": lambda ties: [
        dataclasses.replace(t, tp_axis=1 - t.tp_axis)
        if t.tp_axis is not None and "linear_proj" in t.megatron
        else t
        for t in ties
    ],
    "gate and up swapped": lambda ties: [_swap(t) if len(t.hf) == 2 else t for t in ties],
    "key and query swapped": lambda ties: [_swap(t) if len(t.hf) == 3 else t for t in ties],
    "key and value swapped": lambda ties: [
        dataclasses.replace(t, hf=(t.hf[0], t.hf[2], t.hf[1])) if len(t.hf) == 3 else t
        for t in ties
    ],
    "padding kept": lambda ties: [dataclasses.replace(t, rows=None) for t in ties],
}


def check_mutants(student: Student, found: dict[str, torch.Tensor]) -> None:
    bridge = student.bridge
    for what, change in MUTANTS.items():
        if student.facts.is_latent_attention and "key" in what:
            continue
        if student.ranks.tp_size == 1 and what in ("wrong axis", "padding kept"):
            continue
        wrong = copy.copy(bridge)
        wrong.ties = lambda layer, change=change: change(bridge.ties(layer))
        try:
            weights = whole(
                WeightStream(wrong, student.trainer.chunks, student.ranks).buckets(1 << 20)
            )
            same = weights.keys() == found.keys() and all(
                weights[n].shape == found[n].shape and torch.equal(weights[n], found[n])
                for n in found
            )
        except AssertionError:
            same = False
        assert not same, what


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
        run.path.mkdir(parents=True, exist_ok=True)
        write_json(run.path / "generation.json", {"generation": 1})
    dist.barrier()
    for mtp in ("drop", "freeze"):
        student.config = student.config.model_copy(update={"mtp": mtp})
        student.hf_config.num_nextn_predict_layers = 1  # what the folder says
        export(student, run, run.path / f"{kind}-{mtp}")
    prompts = [tuple(range(5 + i, 12 + 2 * i)) for i in range(4)]
    requests = [Request(i, f"p{i}", ids) for i, ids in enumerate(prompts)]
    engine._deal = alone()  # every rank answers all
    found = answer(engine, requests, Sampling(12, temperature=0))
    answers = [response.response_ids.tolist() for response in found]
    if dist.get_rank() == 0:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            run.path / f"{kind}-freeze", dtype=torch.float32
        ).eval()
        for ids, given in zip(prompts, answers, strict=True):
            whole = torch.tensor([[*ids, *given]])
            with torch.no_grad():
                logits = model(whole[:, :-1]).logits[0, len(ids) - 1 :, : student.vocab_size]
            assert logits.argmax(-1).tolist() == given, (ids, given)


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
