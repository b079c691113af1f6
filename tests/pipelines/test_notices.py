"""What a start says and does not refuse."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from mtopd.config import SupervisedConfig
from mtopd.pipelines.notices import report_positions, report_schedule
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
