"""Calls of one environment: at most so many at once, none waited for longer than it may take.

A thread that is stuck in foreign code cannot be ended: it is given up, and another takes its place,
until as many are stuck as there may be calls at once.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from mtopd.types import MtopdError

T = TypeVar("T")
_LOOK_S = 0.05  # between two looks at the time of running calls


class Call(Generic[T]):
    """One call on its way."""

    def __init__(
        self, work: Callable[[], T], done: Callable[[T | BaseException, float], None]
    ) -> None:
        self._work = work
        self._done = done
        self._lock = threading.Lock()
        self._started_s: float | None = None
        self._failed: BaseException | None = None  # of ``done``
        self.is_over = threading.Event()

    def run(self) -> None:
        self._started_s = time.monotonic()
        try:
            result: T | BaseException = self._work()
        except BaseException as error:  # SystemExit, too: foreign code ends no thread of ours
            result = error
        self.finish(result)

    @property
    def seconds(self) -> float:
        """Since it began; 0: it waits."""
        return 0.0 if self._started_s is None else time.monotonic() - self._started_s

    def finish(self, result: T | BaseException) -> None:
        """Tell what came of it, once: a call that was given up is not listened to any more."""
        with self._lock:
            if self.is_over.is_set():
                return
            try:
                self._done(result, self.seconds)
            except BaseException as error:
                self._failed = error
            self.is_over.set()

    def raise_error(self) -> None:
        if self._failed is not None:
            raise self._failed


class Calls(Generic[T]):
    """``name`` is the environment's, for errors."""

    def __init__(self, name: str, *, threads: int, timeout_s: float) -> None:
        self._name = name
        self._threads = threads
        self._timeout_s = timeout_s
        self._waiting: queue.SimpleQueue[Call[T] | None] = queue.SimpleQueue()
        self._running: set[Call[T]] = set()
        self._stuck: set[Call[T]] = set()  # given up, and their threads have not come back
        self._lock = threading.Lock()
        self._num_threads = 0

    def submit(
        self, work: Callable[[], T], done: Callable[[T | BaseException, float], None]
    ) -> Call[T]:
        """Call ``work`` in a thread, then ``done(result or what it raised, seconds)``."""
        call = Call(work, done)
        self._waiting.put(call)
        with self._lock:
            if self._num_threads < self._threads:
                self._start_thread()
        return call

    def wait(self, call: Call[T]) -> None:
        """Until the call is over.  Raises what its ``done`` raised, and MtopdError where the
        environment hangs.
        """
        while not call.is_over.wait(_LOOK_S):
            self._give_up()
        call.raise_error()

    def close(self) -> None:
        """Threads end, as far as they come back."""
        for _ in range(self._num_threads):
            self._waiting.put(None)

    def _start_thread(self) -> None:
        """The lock is held.  A daemon: one that hangs must not keep the process from ending."""
        self._num_threads += 1
        threading.Thread(target=self._work, name=f"environment {self._name}", daemon=True).start()

    def _work(self) -> None:
        while (call := self._waiting.get()) is not None:
            with self._lock:
                self._running.add(call)
            call.run()
            with self._lock:
                self._running.discard(call)
                if call in self._stuck:  # another thread has taken its place
                    self._stuck.discard(call)
                    return

    def _give_up(self) -> None:
        """Give up running calls whose time is over."""
        with self._lock:
            late = [call for call in self._running if call.seconds > self._timeout_s]
        for call in late:
            with self._lock:
                if call not in self._running:
                    continue
                self._running.discard(call)
                self._stuck.add(call)
                self._num_threads -= 1
                self._start_thread()
                num_stuck = len(self._stuck)
            call.finish(TimeoutError(f"no answer within timeout_s {self._timeout_s:g}"))
            if num_stuck > self._threads:
                raise MtopdError(
                    f"environment {self._name}: {num_stuck} calls did not come back within their "
                    f"timeout_s {self._timeout_s:g}, nor since; look at what they wait for, then start "
                    "the same command again: what was logged is kept"
                )
