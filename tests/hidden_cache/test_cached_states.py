"""Train steps get the shares of the cache that were read ahead, the same bytes as without."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cache_samples import MATH, fill, flip, request_of, rows_of

from mtopd.hidden_cache import CacheMiss, HiddenCacheReader
from mtopd.objectives.teacher_kl import TeacherRun
from mtopd.pipelines.cached_states import CachedStates

LENGTHS = [50, 0, 1100, 7]
VERSION = 7  # of cache_samples


def job_of(tp_rank: int, tp_size: int) -> Any:
    """The facts of a job that decide what is read."""
    store = SimpleNamespace(hidden_size=4, fingerprint=MATH)
    ranks = SimpleNamespace(tp_rank=tp_rank, tp_size=tp_size, device=torch.device("cpu"))
    return SimpleNamespace(stores=[store], ranks=ranks, cache_dtype=lambda store: "bfloat16")


def run_of(*sample_ids: int) -> TeacherRun:
    entries = [
        SimpleNamespace(key=request_of(i).key, metadata=SimpleNamespace(sample_id=i), first=0, stop=LENGTHS[i])
        for i in sample_ids
    ]
    return TeacherRun(0, 0, sum(LENGTHS[i] for i in sample_ids), entries)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for sample_id, n in enumerate(LENGTHS):
        fill(tmp_path / "c", sample_id, n=n)
    return tmp_path / "c"


@pytest.mark.parametrize("tp_size", [1, 2, 3, 8])
def test_the_shares_of_all_ranks_are_the_rows_of_the_run(root: Path, tp_size: int) -> None:
    expected = np.concatenate([rows_of(i, n=n) for i, n in enumerate(LENGTHS)])
    shares = []
    with HiddenCacheReader(root) as reader:
        for tp_rank in range(tp_size):
            with CachedStates(job_of(tp_rank, tp_size), reader, VERSION) as states:
                shares.append(states._read_share(run_of(0, 1, 2, 3)))
    joined = torch.cat(shares).view(torch.uint16).numpy()
    assert np.array_equal(joined[: len(expected)], expected) and not joined[len(expected) :].any()


def test_what_was_read_ahead_is_given_once_and_then_forgotten(root: Path) -> None:
    with HiddenCacheReader(root) as reader, CachedStates(job_of(0, 1), reader, VERSION) as states:
        states.prefetch([run_of(0, 1), run_of(2)])
        states.prefetch([run_of(3)])
        for number, ids in enumerate([(0, 1), (2,), (3,), (2,)]):  # the last was not announced again
            rows_TE = states(run_of(*ids))
            expected = np.concatenate([rows_of(i, n=LENGTHS[i]) for i in ids])
            assert np.array_equal(rows_TE.view(torch.uint16).numpy(), expected), number
        assert states.stall_s > 0
        memory = weakref.ref(rows_TE)
        del rows_TE
        gc.collect()
        assert memory() is None and not states._shares


def test_damage_is_raised_where_the_run_is_asked_for(root: Path) -> None:
    for segment in root.glob("t/*/seg/*"):
        if (segment / "c/0/0").exists() and (segment / "c/0/0").stat().st_size > 10000:  # of sample 2
            flip(segment / "c/0/0", 20)
    with HiddenCacheReader(root) as reader, CachedStates(job_of(0, 1), reader, VERSION) as states:
        states.prefetch([run_of(2), run_of(0)])
        with pytest.raises(CacheMiss, match="sample 2"):
            states(run_of(2))
        assert np.array_equal(states(run_of(0)).view(torch.uint16).numpy(), rows_of(0))
        states = CachedStates(job_of(0, 1), reader, VERSION + 1)
        with states, pytest.raises(CacheMiss, match="not in the cache"):
            states(run_of(0))
