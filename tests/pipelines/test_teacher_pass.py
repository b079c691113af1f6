"""Teachers read quarters of an iteration whose rollout goes on: which, rank 0 says."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from mtopd.pipelines import teacher_pass
from mtopd.planning import quarters
from mtopd.rollout.background import Background
from mtopd.trajectories import write_shard
from mtopd.trajectories.format import tokens_path
from tests.trajectories.shards import trajectory

NAMES = [f"batch-{i:05d}" for i in range(6)]  # quarters of 1, 2, 1 and 2 shards


class Rollout:
    """It goes on until ``end``."""

    def __init__(self, root: Path) -> None:
        self._end = threading.Event()
        self.background = Background(lambda thread: self._work(), "rollout")
        self._iteration = SimpleNamespace(trajectories=root)
        self.waiting = dict(enumerate(quarters(NAMES)))

    def _work(self) -> None:
        self._end.wait(30)

    def seal(self, *shards: int) -> None:
        for i in shards:
            write_shard(self._iteration.trajectories, NAMES[i], [trajectory(i)], 0)

    def end(self) -> None:
        self._end.set()
        self.background.join()

    def whole(self) -> list[int]:
        return teacher_pass.wait_for_quarters(self._iteration, self.waiting, self.background)  # type: ignore[arg-type]


@pytest.fixture
def rollout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rollout]:
    monkeypatch.setattr(teacher_pass, "_LOOK_S", 0.01)
    rollout = Rollout(tmp_path)
    yield rollout
    rollout.end()


def test_quarters_are_read_once_all_their_shards_are_sealed(rollout: Rollout) -> None:
    rollout.seal(1, 3)
    assert rollout.whole() == [2], "shard 1 is half of quarter 1"
    del rollout.waiting[2]
    later = threading.Timer(0.1, rollout.seal, (2,))
    later.start()
    assert rollout.whole() == [1], "it is waited for"
    later.join()
    rollout.seal(0)
    assert rollout.whole() == [0, 1], "all that are whole at once"


def test_the_last_quarter_and_all_at_once_are_left_to_the_pass(rollout: Rollout) -> None:
    rollout.seal(*range(6))
    assert rollout.whole() == []
    rollout.waiting = {2: rollout.waiting[2]}
    assert rollout.whole() == []


def test_a_shard_that_is_not_whole_is_not_read(rollout: Rollout) -> None:
    rollout.seal(0, 1, 2)
    path = tokens_path(rollout._iteration.trajectories, NAMES[0])
    path.write_bytes(path.read_bytes()[:-1])
    assert rollout.whole() == [1]


def test_nothing_is_waited_for_once_the_rollout_is_over(rollout: Rollout) -> None:
    rollout.seal(0)
    threading.Timer(0.1, rollout.end).start()
    del rollout.waiting[0]
    assert rollout.whole() == []
    rollout.waiting = dict(enumerate(quarters(NAMES)))
    assert rollout.whole() == [], "a quarter is whole, but so will the others be"


def test_a_rollout_that_failed_is_over(tmp_path: Path) -> None:
    def fail(thread: Background) -> None:
        raise OSError("no space left")

    failed = Background(fail, "rollout")
    assert failed.is_over(within_s=10) and failed.ended_at is not None
    with pytest.raises(OSError, match="no space"):
        failed.join()
