"""Work in a thread of its own: begun at one place, joined at another, while the caller does more."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Background:
    """``work`` in a thread, which is handed this object.  It takes part in no collective: those are the
    main thread's alone, in one order on every rank.  What it raises is raised where it is joined, paused
    or looked at.

    The thread is a daemon: a process that ends does not wait for it, whatever it does is safe against
    a kill anyway.
    """

    def __init__(self, work: Callable[[Background], None], name: str) -> None:
        self._work = work
        self._error: BaseException | None = None
        self._is_paused = self._stands = False
        self.ended_at: float | None = None  # by time.perf_counter
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work(self)
        except BaseException as error:
            self._error = error
        with self._changed:
            self.ended_at = time.perf_counter()
            self._changed.notify_all()

    def check(self) -> None:
        """Raise what the work has raised, if it has.  Never waits."""
        if self._error is not None:
            raise self._error

    def is_over(self, within_s: float) -> bool:
        """Whether the work ends, or fails, within so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self.ended_at is not None, within_s)

    def join(self) -> None:
        """Until the work is done; raises what it raised."""
        self._thread.join()
        self.check()

    def pause(self, stop: Callable[[], None]) -> None:
        """Return once the work stands still in ``halt``, or is done.  ``stop`` makes it get there."""
        with self._changed:
            self._is_paused = True
        stop()
        with self._changed:
            self._changed.wait_for(lambda: self._stands or self.ended_at is not None)
        self.check()

    def resume(self) -> None:
        with self._changed:
            self._is_paused = False
            self._changed.notify_all()

    def halt(self) -> bool:
        """Of the work: stand still while it is paused.  Returns whether it was: then there may be more
        to do.
        """
        with self._changed:
            if not self._is_paused:
                return False
            self._stands = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._is_paused)
            self._stands = False
            return True
