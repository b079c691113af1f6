"""Who speaks for a run: rank 0 of a torchrun, and whoever no torchrun started."""

from __future__ import annotations

import pytest

from mtopd.progress import is_first, log_as_json, logs_json


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-0"}, True),  # of a scheduler
        ({"RANK": "1", "TORCHELASTIC_RUN_ID": "x"}, False),
        ({"RANK": "0", "TORCHELASTIC_RUN_ID": "x"}, True),
        ({"TORCHELASTIC_RUN_ID": "x"}, True),
    ],
)
def test_a_rank_is_one_that_a_torchrun_started(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], first: bool
) -> None:
    for name in ("RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_first() is first


def test_json_is_chosen_for_one_start_or_by_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTOPD_LOG_JSON", "")
    assert not logs_json(False) and logs_json(True)
    log_as_json()
    assert logs_json(False)
