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
from cache_samples import fill, flip, row_key_of, rows_of

from mtopd.hidden_cache import CachedStates, CacheMiss, HiddenCacheReader, StateFormat, shared_read
from mtopd.types import SampleRows, TeacherRun

LENGTHS = [50, 0, 1100, 7]
VERSION = 7  # of cache_samples


def states_of(
    reader: HiddenCacheReader, tp_rank: int = 0, tp_size: int = 1, version: int = VERSION
) -> CachedStates:
    ranks: Any = SimpleNamespace(
        tp_rank=tp_rank, tp_size=tp_size, tp_group=None, device=torch.device("cpu")
    )
    return CachedStates(reader, [StateFormat(4, torch.bfloat16)], ranks, version)


def run_of(*sample_ids: int) -> TeacherRun:
    rows = [SampleRows(i, 0, row_key_of(i).key, 0, LENGTHS[i]) for i in sample_ids]
    return TeacherRun(0, 0, sum(LENGTHS[i] for i in sample_ids), rows)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for sample_id, n in enumerate(LENGTHS):
        fill(tmp_path / "c", sample_id, n=n)
    return tmp_path / "c"


@pytest.mark.parametrize("tp_size", [1, 2, 3, 8])
def test_the_shares_of_all_ranks_are_the_rows_of_the_runs(
    root: Path, tp_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs in one exchange, of which this plays the ranks one after the other."""
    monkeypatch.setattr(shared_read, "_SMALLEST_SHARE", 1)
    runs, shares = [run_of(0, 1, 3), run_of(2)], []
    with HiddenCacheReader(root) as reader:
        for tp_rank in range(tp_size):
            with states_of(reader, tp_rank, tp_size) as states:
                shares.append(states._read_shares(runs, tp_size))
        exchange = SimpleNamespace(
            all_gather_single=lambda out, mine, group: out.copy_(torch.cat(shares))
        )
        monkeypatch.setattr(shared_read, "dist", exchange)
        with states_of(reader, 0, tp_size) as states:
            states.prefetch([[], runs])
            for run, ids in zip(runs, [(0, 1, 3), (2,)], strict=True):
                expected = np.concatenate([rows_of(i, n=LENGTHS[i]) for i in ids])
                rows_TE = states(run)
                assert np.array_equal(rows_TE.view(torch.uint16).numpy(), expected), ids
                assert rows_TE.is_contiguous() and rows_TE.data_ptr() % 64 == 0
    assert len({len(share) for share in shares}) == 1


def test_what_is_smaller_than_a_chunk_every_rank_reads_itself(root: Path) -> None:
    for tp_rank in range(2):
        with (
            HiddenCacheReader(root) as reader,
            states_of(reader, tp_rank, 2) as states,
        ):
            assert np.array_equal(states(run_of(3)).view(torch.uint16).numpy(), rows_of(3, n=7))
    large = TeacherRun(0, 0, (2 << 20) // 8, [])  # 1 MiB for either rank
    with HiddenCacheReader(root) as reader, states_of(reader, 0, 2) as states:
        states.prefetch([[large]])
        assert [batch.num_shares for batch in states._announced.values()] == [2]


def test_what_was_read_ahead_is_given_once_and_then_forgotten(root: Path) -> None:
    ids = [(0, 1), (2,), (3,)]
    runs = [run_of(*of_run) for of_run in ids]
    with HiddenCacheReader(root) as reader, states_of(reader) as states:
        states.prefetch([[runs[0]], [runs[1]]])
        states.prefetch([[runs[2]]])
        for number in (0, 1, 2, 1):  # the last was not announced again
            rows_TE = states(runs[number])
            expected = np.concatenate([rows_of(i, n=LENGTHS[i]) for i in ids[number]])
            assert np.array_equal(rows_TE.view(torch.uint16).numpy(), expected), number
        assert states.stall_s > 0
        memory = weakref.ref(rows_TE.untyped_storage())
        del rows_TE
        gc.collect()
        assert memory() is None and not states._announced and not states._joined


def test_damage_is_raised_where_the_run_is_asked_for(root: Path) -> None:
    for segment in root.glob("t/*/seg/*"):
        if (segment / "c/0/0").exists() and (
            segment / "c/0/0"
        ).stat().st_size > 10000:  # of sample 2
            flip(segment / "c/0/0", 20)
    damaged, sound = run_of(2), run_of(0)
    with HiddenCacheReader(root) as reader, states_of(reader) as states:
        states.prefetch([[damaged], [sound]])
        with pytest.raises(CacheMiss, match="sample 2"):
            states(damaged)
        assert np.array_equal(states(sound).view(torch.uint16).numpy(), rows_of(0))
        states = states_of(reader, version=VERSION + 1)
        with states, pytest.raises(CacheMiss, match="not in the cache"):
            states(sound)
