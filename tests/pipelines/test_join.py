"""A rank that waits for rank 0 of an outer torchrun."""

from __future__ import annotations

import datetime
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from mtopd.pipelines import start
from mtopd.run_dir import RunDir
from mtopd.types import MtopdError


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.HashStore:
    """That of a job in which this process is rank 1."""
    store = dist.HashStore()
    store.set_timeout(datetime.timedelta(seconds=0.1))
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, 1, 2)]))
    for name, value in {"TORCHELASTIC_RUN_ID": "job", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    return store


def join(run: Path) -> None:
    start._join_outer_torchrun(RunDir(run), lambda: pytest.fail("only rank 0 prepares"), "m:f")


def test_rank_0_may_prepare_for_longer_than_the_stores_timeout(
    store: dist.HashStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads the whole checkpoint to know its content: half an hour is a terabyte."""
    called: list[object] = []
    monkeypatch.setattr(start, "call", lambda *arguments: called.append(arguments))
    word = dist.PrefixStore("mtopd", store)
    threading.Timer(0.5, lambda: word.set("start", "generation 3")).start()
    join(tmp_path)
    assert called == [("m:f", tmp_path, 3)]


def test_a_torchrun_that_would_try_again_is_refused(
    store: dist.HashStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its second attempt finds the first one's keys, and no rank would say so."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(MtopdError, match="--max-restarts 3"):
        join(tmp_path)
