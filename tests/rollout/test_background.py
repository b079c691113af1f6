"""Work in a thread: waited for, and what it raises is met by whoever began it."""

from __future__ import annotations

import threading
import time

import pytest

from mtopd.rollout.background import Background
from mtopd.types import MtopdError


def test_it_runs_while_the_caller_goes_on_and_is_waited_for() -> None:
    goes, done = threading.Event(), []

    def work(_: Background) -> None:
        assert goes.wait(10)
        done.append(threading.current_thread().name)

    background = Background(work, "rollout 3")
    background.check()
    assert done == []
    goes.set()
    background.join()
    assert done == ["rollout 3"]


def test_what_it_raises_is_met_by_a_look_and_by_whoever_joins() -> None:
    def work(_: Background) -> None:
        raise MtopdError("no server took the weights")

    background = Background(work, "rollout")
    with pytest.raises(MtopdError, match="no server took the weights"):
        background.join()
    with pytest.raises(MtopdError, match="no server took the weights"):
        background.check()


def test_a_look_never_waits() -> None:
    def work(_: Background) -> None:
        threading.Event().wait()  # for good: it is a daemon

    background = Background(work, "stuck")
    started = time.monotonic()
    background.check()
    assert time.monotonic() - started < 5


def test_paused_it_stands_still_and_goes_on_where_it_was() -> None:
    stop, count = threading.Event(), 0

    def work(thread: Background) -> None:
        nonlocal count
        while count < 1000:
            while not stop.is_set() and count < 1000:
                count += 1
                time.sleep(0.001)
            assert thread.halt() or count == 1000

    background = Background(work, "rollout")
    for _ in range(2):
        background.pause(stop.set)
        before = count
        time.sleep(0.05)
        assert count == before < 1000
        stop.clear()
        background.resume()
    background.join()
    assert count == 1000
    background.pause(stop.set)  # nothing is left to stand still
    background.resume()


def test_a_pause_of_work_that_failed_raises_what_it_raised() -> None:
    failing = threading.Event()

    def work(thread: Background) -> None:
        assert failing.wait(10)
        raise MtopdError("the disk is full")

    background = Background(work, "rollout")
    with pytest.raises(MtopdError, match="the disk is full"):
        background.pause(failing.set)
