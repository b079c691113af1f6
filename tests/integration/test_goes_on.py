"""A finished run that goes on, and a new run that begins with its checkpoint: by the commands a user
gives.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mtopd.files import read_json
from mtopd.metrics import read_metrics
from mtopd.metrics_lines import SupervisedStepLine, TrainStepLine
from mtopd.run_dir import RunDir, is_sealed
from tests.conftest import REPOSITORY
from tests.integration.test_kill_and_resume import workplace  # noqa: F401 - a fixture
from tests.integration.test_phases_alone import checkpoint_tensors

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(600),
    # A checkpoint is read by one process.
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]
SMALL = (
    "student.parallel.pp=1",
    "rollout.prompts_per_iteration=16",
    "train.micro_batch_size=4",
    "train.train_steps_per_iteration=2",
    "train.optimizer.decay=constant",
    "checkpoint.keep=9",
)


def mtopd(*arguments: str, fails: bool = False) -> str:
    """What a command says; it ends well, or with one line and exit code 2."""
    command = [sys.executable, "-m", "mtopd.pipelines.cli", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert done.returncode == (2 if fails else 0), done.stderr
    assert done.stderr.count("error:") == int(fails)
    return done.stderr


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def steps(run: RunDir, kind: Any) -> list[tuple[int | None, Any, Any, Any]]:
    entries = [entry for entry in read_metrics(run.metrics) if isinstance(entry.line, kind)]
    return [(e.step, e.line.loss, e.line.grad_norm, e.line.lr) for e in entries]


def test_a_finished_run_goes_on_and_another_begins_with_it(workplace: Path) -> None:  # noqa: F811
    config = str(workplace / "config.yaml")

    def consolidate(run: RunDir, num_iterations: int, *rest: str, tp: int = 1) -> str:
        own = (f"train.num_iterations={num_iterations}", f"student.parallel.tp={tp}")
        return mtopd("consolidate", config, f"run_dir={run.path}", *own, *SMALL, *rest)

    straight, run = RunDir(workplace / "straight"), RunDir(workplace / "grown")
    consolidate(straight, 3)
    consolidate(run, 2)
    former = weights(run.export(2))
    said = consolidate(run, 3)
    assert "train.num_iterations was 2, is now 3" in said
    found, wanted = weights(run.export(3)), weights(straight.export(3))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert steps(run, TrainStepLine) == steps(straight, TrainStepLine)
    assert len(steps(run, TrainStepLine)) == 6
    assert all(torch.equal(weights(run.export(2))[name], former[name]) for name in former)
    assert {2, 3} <= {int(path.stem) for path in run.evaluation(0).parent.glob("[0-9]*.json")}
    assert read_json(run.path / "report.json")["iterations"]["planned"] == 3

    new = RunDir(workplace / "new")
    said = consolidate(new, 1, "seed=5", "--from", f"{run.path}@2", tp=2)
    assert f"starting from {run.path} at iteration 2" in said
    of_new, of_run = checkpoint_tensors(new, 0), checkpoint_tensors(run, 2)
    for name, tensor in of_run.items():
        if not name.startswith("rng"):
            assert torch.equal(of_new[name], tensor), name
    assert any("exp_avg_sq" in name for name in of_run)
    rates = [lr for _, _, _, lr in steps(new, TrainStepLine)]
    assert rates == [lr for _, _, _, lr in steps(straight, TrainStepLine)][: len(rates)]
    assert new.evaluation(0).exists()
    shutil.rmtree(run.path)
    said = consolidate(new, 2, "seed=5", tp=2)
    assert "starting from" not in said and is_sealed(new.export(2))


def test_a_specialist_goes_on(workplace: Path) -> None:  # noqa: F811
    run, store = RunDir(workplace / "specialist"), workplace / "stores" / "own"
    rows = [{"prompt": "abc", "answer": "cba"}, {"prompt": "table", "answer": "elbat"}]
    examples = workplace / "examples.jsonl"
    examples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "run_dir": str(run.path),
        "student": {"model": str(workplace / "student")},
        "data": {
            "sources": [{"name": "words", "path": str(examples)}],
            "context_length": 32,
            "max_response": 16,
        },
        "train": {
            "num_steps": 2,
            "global_batch_size": 2,
            "micro_batch_size": 2,
            "optimizer": {"lr": 1e-3, "warmup_steps": 0},
        },
        "store": {"name": "own", "path": str(store)},
    }
    path = workplace / "specialist.yaml"
    path.write_text(yaml.safe_dump(config))
    mtopd("specialist", str(path))
    final = run.path / "export" / "final"
    former = weights(final)
    assert "before it goes on" in mtopd("specialist", str(path), "train.num_steps=4", fails=True)
    other = ("store.name=other", f"store.path={store.with_name('other')}")
    said = mtopd("specialist", str(path), "train.num_steps=4", *other)
    assert "learning rate at step 2 was 0, is now 0.00025;" in said
    assert str(run.export(2)) in said
    assert all(torch.equal(weights(run.export(2))[name], former[name]) for name in former)
    assert any(not torch.equal(weights(final)[name], former[name]) for name in former)
    rates = [lr for _, _, _, lr in steps(run, SupervisedStepLine)]
    assert rates == pytest.approx([5e-4, 0.0, 2.5e-4, 0.0], abs=1e-12)
    assert is_sealed(final) and (store.with_name("other") / "teacher.json").exists()
