"""The closed form of the learning rate; tests/megatron/test_lr_schedule.py holds it to Megatron's."""

from __future__ import annotations

from typing import Any

import pytest

from mtopd.planning import learning_rate

LINEAR: dict[str, Any] = {"lr": 1.0, "min_lr": 0.2, "warmup_steps": 2, "decay": "linear"}


def test_a_warm_up_moves_at_once_and_a_decay_ends_with_the_last_step() -> None:
    found = [learning_rate(step, num_steps=6, **LINEAR) for step in range(8)]
    assert found == pytest.approx([0.5, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2])
    cosine = [learning_rate(step, num_steps=6, **{**LINEAR, "decay": "cosine"}) for step in (1, 3)]
    assert cosine == pytest.approx([1.0, 0.6])


def test_a_constant_rate_knows_no_end() -> None:
    constant = {**LINEAR, "decay": "constant"}
    found = {learning_rate(step, num_steps=n, **constant) for step in (2, 5, 50) for n in (3, 90)}
    assert found == {1.0}
