"""What a start says and does not refuse."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mtopd.config import StudentConfig
from mtopd.config_specialist import SpecialistConfig, SupervisedConfig
from mtopd.hf_checkpoint import load_hf_config
from mtopd.megatron.options import sort_fields
from mtopd.pipelines.notices import (
    report_baselines,
    report_dropout,
    report_positions,
    report_schedule,
)
from mtopd.pipelines.student import build_bridge
from tests.small_models import save_model


def test_what_a_schedule_never_comes_to_is_said() -> None:
    said: list[str] = []

    def report(num_steps: int, **optimizer: object) -> list[str]:
        said.clear()
        values = {"num_steps": num_steps, "global_batch_size": 4, "micro_batch_size": 4}
        train = SupervisedConfig(**values, optimizer={"lr": 0.01, **optimizer})  # type: ignore[arg-type]
        report_schedule(train, said.append)
        return said

    assert report(4)[0].endswith("(warmup_steps), 4 are planned: it comes to 0.004, not to 0.01")
    assert report(10) == []
    assert report(10, min_lr=1e-4, decay="constant") == [
        "min_lr 0.0001 does nothing under decay constant"
    ]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("base math code", []),
        ("", []),
        (
            "base mathe code",
            [
                "evaluation.baselines 'mathe' names no teacher, nor 'base'; did you mean 'math'?",
                "evaluation.baselines has no math: no recovery for it",
            ],
        ),
        ("base math code", []),
        (
            "basis math code",
            [
                "evaluation.baselines 'basis' names no teacher, nor 'base'; did you mean 'base'?",
                "evaluation.baselines has no 'base': no recovery",
            ],
        ),
        ("base math code zebra", ["evaluation.baselines 'zebra' names no teacher, nor 'base'"]),
    ],
)
def test_a_misspelt_baseline_is_said(names: str, said: list[str]) -> None:
    config = SimpleNamespace(
        teachers=[SimpleNamespace(name=name) for name in ("math", "code")],
        evaluation=SimpleNamespace(baselines=dict.fromkeys(names.split(), "x"), weight_average=[]),
    )
    found: list[str] = []
    report_baselines(config, found.append)  # type: ignore[arg-type]
    assert found == said


def test_models_made_for_fewer_positions_are_said(tmp_path: Path) -> None:
    architectures = {}
    for name, positions in (("student", 64), ("teacher", 32), ("base", 16)):
        save_model(tmp_path / name, seed=0, layers=1, max_position_embeddings=positions)
        architectures[name] = json.loads((tmp_path / name / "config.json").read_text())
    config = SimpleNamespace(
        data=SimpleNamespace(context_length=64),
        student=SimpleNamespace(model=tmp_path / "student"),
        evaluation=SimpleNamespace(baselines={"b": tmp_path / "base"}),
    )
    store = SimpleNamespace(name="t", manifest={"architecture": architectures["teacher"]})
    said: list[str] = []
    report_positions(config, [store], said.append)  # type: ignore[arg-type,list-item]
    assert [line.partition(" positions")[0] for line in said] == [
        "teacher 't' is made for 32",
        "baseline 'b' is made for 16",
    ]

    values = {
        "run_dir": "run",
        "student": {"model": tmp_path / "base"},
        "data": {
            "sources": [{"name": "s", "path": "s.jsonl"}],
            "context_length": 64,
            "max_response": 8,
        },
        "train": {
            "num_steps": 1,
            "global_batch_size": 1,
            "micro_batch_size": 1,
            "optimizer": {"lr": 1},
        },
    }
    said.clear()
    report_positions(SpecialistConfig.model_validate(values), [], said.append)
    assert [line.partition(" positions")[0] for line in said] == ["student is made for 16"]


def test_dropout_of_the_checkpoints_config_is_said_and_not_applied(tmp_path: Path) -> None:
    save_model(tmp_path, seed=0, layers=1)
    student, said = StudentConfig(model=tmp_path), list[str]()
    report_dropout(student, said.append)
    assert said == []
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_dropout": 0.1}))
    report_dropout(student, said.append)
    assert said[0].startswith(f"{path} has attention_dropout 0.1: a run trains without dropout")
    hf_config, device = load_hf_config(tmp_path), torch.device("cpu")
    for given in ({}, {"attention_dropout": 0.2, "hidden_dropout": 0.3}):
        bridge = build_bridge(
            student, hf_config, sort_fields(given), device, layout=student.parallel
        )
        applied = vars(bridge.transformer_config)
        assert {name: applied[name] for name in ("attention_dropout", "hidden_dropout")} == (
            given or {"attention_dropout": 0.0, "hidden_dropout": 0.0}
        )
