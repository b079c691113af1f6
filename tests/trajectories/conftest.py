"""A folder of trajectories."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtopd.trajectories import write_shard
from tests.trajectories.shards import trajectory


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two sealed shards: samples 0..3 and 10..12."""
    write_shard(tmp_path, "a", [trajectory(k) for k in range(4)], generation=1)
    write_shard(
        tmp_path, "b", [trajectory(k, response_len=1 + k) for k in (12, 10, 11)], generation=2
    )
    return tmp_path
