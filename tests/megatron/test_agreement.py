"""What rank 0 looks at may take longer than a collective: hashing or writing a large checkpoint."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import run_ranks

WORKER = Path(__file__).with_name("decide_ranks.py")


def test_ranks_wait_for_a_slow_decision_beyond_the_time_of_a_collective() -> None:
    assert run_ranks(2, WORKER).count("decided") == 2
