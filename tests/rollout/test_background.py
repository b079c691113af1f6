"""Work in a thread: waited for, and what it raises is met by whoever began it."""

from __future__ import annotations

import threading
import time

import pytest

from mtopd.rollout.background import Background
from mtopd.types import MtopdError


def test_it_runs_while_the_caller_goes_on_and_is_waited_for() -> None:
    goes, done = threading.Event(), []

    def work() -> None:
        assert goes.wait(10)
        done.append(threading.current_thread().name)

    background = Background(work, "rollout 3")
    background.check()
    assert done == []
    goes.set()
    background.join()
    assert done == ["rollout 3"]


def test_what_it_raises_is_met_by_a_look_and_by_whoever_joins() -> None:
    def work() -> None:
        raise MtopdError("no server took the weights")

    background = Background(work, "rollout")
    with pytest.raises(MtopdError, match="no server took the weights"):
        background.join()
    with pytest.raises(MtopdError, match="no server took the weights"):
        background.check()


def test_a_look_never_waits() -> None:
    background = Background(threading.Event().wait, "stuck")  # for good: it is a daemon
    started = time.monotonic()
    background.check()
    assert time.monotonic() - started < 5
