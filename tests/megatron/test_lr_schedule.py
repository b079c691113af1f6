"""The learning rate of every train step: warm-up, decay and what comes after, as the closed forms
have them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mtopd.planning import learning_rate
from tests.conftest import results_of, run_ranks
from tests.small_models import save_model

WORKER = Path(__file__).with_name("lr_schedule_ranks.py")
LR, MIN_LR = 1e-2, 1e-3
RUNS = [
    {
        "num_steps": num_steps,
        "optimizer": {"lr": LR, "min_lr": MIN_LR, "warmup_steps": warmup, "decay": decay},
    }
    for num_steps, warmup, decay in (
        (10, 4, "linear"),
        (10, 4, "cosine"),
        (10, 4, "constant"),
        (10, 0, "linear"),
        (4, 6, "cosine"),  # a warm-up longer than the run
    )
]


def closed_form(number: int, num_steps: int, warmup: int, decay: str) -> float:
    """The learning rate of the step with this number, from 1: the first step moves, the last is at
    ``min_lr``.
    """
    if number <= warmup:
        return LR * number / warmup
    if decay == "constant":
        return LR
    done = min((number - warmup) / max(num_steps - warmup, 1), 1.0)
    shape = 1 - done if decay == "linear" else (1 + math.cos(math.pi * done)) / 2
    return MIN_LR + (LR - MIN_LR) * shape


def test_every_step_moves_by_the_rate_of_its_schedule(tmp_path: Path) -> None:
    save_model(tmp_path, seed=0, layers=1, vocab=111)
    output = run_ranks(1, WORKER, str(tmp_path), json.dumps(RUNS))
    results = results_of(output)
    for run, result in zip(RUNS, results, strict=True):
        options = run["num_steps"], run["optimizer"]["warmup_steps"], run["optimizer"]["decay"]
        wanted = [closed_form(number, *options) for number in range(1, run["num_steps"] + 3)]
        ours = [
            learning_rate(step, num_steps=run["num_steps"], **run["optimizer"])
            for step in range(run["num_steps"] + 2)
        ]
        assert ours == pytest.approx(wanted, rel=1e-12), "what a start says before its ranks"
        said, moved = zip(*result["steps"], strict=True)
        assert said == pytest.approx(wanted, rel=1e-12), run
        assert moved == pytest.approx(wanted, rel=1e-5), run
        assert result["resumed"] == pytest.approx(wanted[run["num_steps"] // 2], rel=1e-12), run
