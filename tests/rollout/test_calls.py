"""Calls of foreign code in threads: bounded in number and time."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import pytest

from mtopd.rollout.calls import Call, Calls
from mtopd.types import MtopdError


def results(calls: Calls[Any], works: list[Any]) -> list[object]:
    """What comes of works that are submitted together, in order."""
    found: dict[int, object] = {}

    def done_of(number: int) -> Any:
        return lambda result, seconds: found.setdefault(number, result)

    running: list[Call[Any]] = [calls.submit(work, done_of(i)) for i, work in enumerate(works)]
    for call in running:
        calls.wait(call)
    return [found[i] for i in range(len(works))]


def test_as_many_run_at_once_as_there_are_threads_and_no_more() -> None:
    lock, running, most = threading.Lock(), 0, 0

    def work() -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        return threading.get_ident()

    calls: Calls[Any] = Calls("e", threads=3, timeout_s=60)
    names = results(calls, [work] * 12)
    calls.close()
    assert most == 3 and len({*names}) == 3


def test_what_a_call_raises_ends_no_thread() -> None:
    calls: Calls[Any] = Calls("e", threads=1, timeout_s=60)
    failed, ended, right = results(calls, [lambda: 1 / 0, lambda: sys.exit(3), lambda: 7])
    calls.close()
    assert isinstance(failed, ZeroDivisionError) and isinstance(ended, SystemExit) and right == 7


def test_a_late_call_is_given_up_and_its_result_is_not_listened_to() -> None:
    release = threading.Event()
    calls: Calls[Any] = Calls("e", threads=1, timeout_s=0.3)
    told: list[object] = []
    late = calls.submit(lambda: release.wait(60), lambda result, seconds: told.append(result))
    # The one thread is stuck; another takes its place.
    assert results(calls, [lambda: 5]) == [5]
    calls.wait(late)
    release.set()
    time.sleep(0.2)
    calls.close()
    (only,) = told
    assert isinstance(only, TimeoutError) and "within timeout_s 0.3" in str(only)


def test_time_does_not_run_while_a_call_waits_for_a_thread() -> None:
    calls: Calls[Any] = Calls("e", threads=1, timeout_s=0.5)
    assert results(calls, [lambda: time.sleep(0.2)] * 5) == [None] * 5
    calls.close()


def test_an_environment_that_hangs_is_an_error() -> None:
    release = threading.Event()
    calls: Calls[Any] = Calls("games", threads=2, timeout_s=0.1)
    with pytest.raises(MtopdError, match="environment games: 3 calls did not come back within"):
        results(calls, [lambda: release.wait(60)] * 8)
    release.set()


def test_what_goes_wrong_with_a_result_is_raised() -> None:
    """A log that cannot be written, say: that is not the environment's fault."""

    def done(result: object, seconds: float) -> None:
        raise MtopdError("the token log cannot be written")

    calls: Calls[Any] = Calls("e", threads=1, timeout_s=60)
    with pytest.raises(MtopdError, match="cannot be written"):
        calls.wait(calls.submit(lambda: 1, done))
    calls.close()
