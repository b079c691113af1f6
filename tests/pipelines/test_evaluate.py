"""A model's accuracy on held-out prompts: by domain, whoever answers and in whatever order."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist

from mtopd.data import compared, open_dataset
from mtopd.data.verifiers import entry_of
from mtopd.pipelines import evaluate
from mtopd.prompt_table import Prompts, PromptTable
from mtopd.rollout.engine import Request
from mtopd.rollout.memory_log import Response
from mtopd.run_dir import RunDir
from mtopd.types import Prompt
from tests.report.runs import config_of

RIGHT, WRONG = 7, 8


def prompt(name: str, token: int, teacher: int) -> Prompt:
    verify = {"verifier": "exact_match", "answer": str(RIGHT)}
    return Prompt(name, {}, (token,), teacher, verify)


class Echo:
    """Answers with the prompt's token; that of a name of even length does not end by itself."""

    def generate(self, requests: Sequence[Request], *_: Any) -> Iterator[Response]:
        for request in reversed(requests):
            ids = np.asarray(request.prompt_ids, np.int32)
            reason = "stop" if len(request.prompt_id) % 2 else "length"
            yield Response(request.sample_id, ids, np.zeros(1, np.float32), ((0, 0),), reason)


@pytest.fixture
def student(tmp_path: Path) -> Iterator[Any]:
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    ending = SimpleNamespace(text=lambda ids: " ".join(map(str, ids)))
    ranks = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"))
    tokenizer = SimpleNamespace(decode=lambda ids: f"ask {ids}")
    yield SimpleNamespace(ranks=ranks, ending=lambda rollout: ending, tokenizer=tokenizer)
    dist.destroy_process_group()


def test_answers_are_counted_by_source_and_teacher(student: Any, tmp_path: Path) -> None:
    config = config_of(tmp_path, 1)  # teachers rot, rev, spir
    mine = [
        prompt("m/1", RIGHT, 0),
        prompt("m/2", WRONG, 2),
        prompt("m/3", RIGHT, 0),
        prompt("m/4", WRONG, 0),
        prompt("m/10", RIGHT, 2),  # right, but it does not end by itself
    ]
    one = [prompt("o/1", RIGHT, 1)]
    tables = [PromptTable(pa.table({}))] * 2
    prompts = Prompts(["mine", "one"], tables, [mine, one])
    found = evaluate.measure(Echo(), prompts, student, config)  # type: ignore[arg-type]
    assert found.counts == {"mine/rot": 3, "mine/spir": 2, "one": 1}
    assert found.accuracy == {"mine/rot": pytest.approx(2 / 3), "mine/spir": 0.0, "one": 1.0}
    assert found.stopped == {"mine/rot": 1.0, "mine/spir": 0.5, "one": 1.0}
    (line,) = evaluate.explain_zeros(found)
    assert line.startswith("mine/spir: 0 of 2 answers are right, 1 of them ended by themselves")


def test_the_newest_evaluations_answers_are_kept(student: Any, tmp_path: Path) -> None:
    config = config_of(tmp_path, 1)
    asked = [prompt("m/1", RIGHT, 0), prompt("m/2", WRONG, 2), prompt("m/10", RIGHT, 2)]
    prompts = Prompts(["mine"], [PromptTable(pa.table({}))], [asked])
    run = RunDir(tmp_path / "run")
    for number in (4, 5):
        answers: list[evaluate.Answer] = []
        evaluate.measure(Echo(), prompts, student, config, answers=answers)  # type: ignore[arg-type]
        evaluate.write_answers(run, student.ranks, number, answers)
        run.answers(3).write_text("{}")  # of a start with more ranks
    evaluate.write_answers(run, student.ranks, number, answers)
    (path,) = (run.path / "evaluations").rglob("*.jsonl")
    found = {line["prompt_id"]: line for line in map(json.loads, path.read_text().splitlines())}
    assert found.keys() == {"m/1", "m/2", "m/10"} and {
        line["after"] for line in found.values()
    } == {5}
    assert found["m/1"] == {
        "after": 5,
        "prompt_id": "m/1",
        "domain": "mine/rot",
        "prompt": "ask [7]",
        "response": "7",
        "finish_reason": "stop",
        "found": "7",
        "expected": "7",
        "score": 1.0,
    }
    assert found["m/2"]["score"] == 0.0 and found["m/2"]["found"] == "8"
    assert (found["m/10"]["finish_reason"], found["m/10"]["score"]) == ("length", 0.0)
    evaluate.write_answers(run, student.ranks, 6, [])
    assert not path.exists(), "a rank that saw none leaves none of another evaluation"


def test_what_a_dataset_compares_is_told() -> None:
    recipe = {"verifier": "reasoning_gym", "dataset": "chain_sum", "options": {}}
    verify = {**recipe, "size": 4, "seed": 1, "index": 2, "answer_from": "last_number"}
    found, expected = compared(Prompt("s/2", {}, (1,), 0, verify), "it is 12.")
    assert found == "12" and expected == entry_of(open_dataset(verify), 2, "chain_sum")["answer"]
