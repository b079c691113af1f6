"""Work in a thread of its own: begun at one place, joined at another, while the caller does more."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """``work`` in a thread.  It takes part in no collective: those are the main thread's alone, in one
    order on every rank.  What it raises is raised where it is joined, or looked at before.

    The thread is a daemon: a process that ends does not wait for it, whatever it does is safe against
    a kill anyway.
    """

    def __init__(self, work: Callable[[], None], name: str) -> None:
        self._work = work
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._error = error

    def check(self) -> None:
        """Raise what the work has raised, if it has.  Never waits."""
        if self._error is not None:
            raise self._error

    def join(self) -> None:
        """Until the work is done; raises what it raised."""
        self._thread.join()
        self.check()
