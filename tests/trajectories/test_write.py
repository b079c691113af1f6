"""A shard is visible when it is whole; what is sealed stays as it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mtopd.trajectories import (
    TokenStore,
    sealed_shards,
    shard_is_sealed,
    write_shard,
)
from mtopd.trajectories import write as write_module
from mtopd.types import MtopdError
from tests.trajectories.shards import trajectory, truncate


@pytest.mark.parametrize("stop_before", ["c.meta.parquet", "c.tokens.arrow", "c.sealed.json"])
def test_a_writer_killed_at_any_file_leaves_no_shard(
    folder: Path, monkeypatch, stop_before: str
) -> None:
    replace = os.replace

    def killed(source, target) -> None:
        if Path(target).name == stop_before:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_shard(folder, "c", [trajectory(20)], generation=3)
    monkeypatch.undo()
    assert not shard_is_sealed(folder, "c")
    assert sealed_shards(folder) == ["a", "b"]
    write_shard(folder, "c", [trajectory(20)], generation=3)
    assert TokenStore(folder).get(20) == trajectory(20)


def test_sealed_shard_is_never_overwritten(folder: Path) -> None:
    with pytest.raises(MtopdError, match="sealed by start 1 of the run, this is start 5"):
        write_shard(folder, "a", [trajectory(30)], generation=5)
    truncate(folder / "b.tokens.arrow")
    assert not shard_is_sealed(folder, "b")
    with pytest.raises(MtopdError, match="sealed by start 2 of the run, this is start 1"):
        write_shard(folder, "b", [trajectory(30)], generation=1)
    write_shard(folder, "b", [trajectory(30)], generation=2)
    assert shard_is_sealed(folder, "b")
    assert TokenStore(folder).get(30) == trajectory(30)


def test_a_damaged_shard_loses_its_seal_before_it_is_written_anew(
    folder: Path, monkeypatch
) -> None:
    truncate(folder / "b.tokens.arrow")
    monkeypatch.setattr(write_module, "write_atomic", lambda path, data: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_shard(folder, "b", [trajectory(30)], generation=2)
    assert sealed_shards(folder) == ["a"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_ids": ()}, "prompt has 0 and response 5 tokens"),
        ({"response_ids": ()}, "response 0 tokens"),
        ({"loss_mask": (1,) * 4}, "loss_mask has 4 and rollout_log_probs 5 entries for 5"),
        ({"rollout_log_probs": (0.0,) * 6}, "rollout_log_probs 6 entries"),
        ({"loss_mask": (0, 1, 2, 1, 1)}, "only 0 and 1"),
        ({"rollout_log_probs": (0.0, float("-inf"), 0.0, 0.0, 0.0)}, "not finite"),
        ({"finish_reason": "abort"}, "finish_reason is 'abort'"),
    ],
)
def test_broken_trajectory_is_not_written(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=rf"trajectory 3 \(rot/3\).*{message}"):
        write_shard(tmp_path, "a", [trajectory(1), trajectory(3, **changes)], generation=1)
    assert list(tmp_path.iterdir()) == []


def test_impossible_shards_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no trajectories"):
        write_shard(tmp_path, "a", [], generation=1)
    with pytest.raises(ValueError, match="one sample_id"):
        write_shard(tmp_path, "a", [trajectory(1), trajectory(1)], generation=1)
    for name in ("", "../a", ".a"):
        with pytest.raises(ValueError, match="cannot name a shard"):
            write_shard(tmp_path, name, [trajectory(1)], generation=1)
