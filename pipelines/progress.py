"""The progress display of rank 0: one bar over the iterations, the phase, tokens per second of
training.

On a terminal it is a rich bar; elsewhere a line every few seconds, so that logs stay readable.
"""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

_LINE_EVERY_S = 15.0


class Progress:
    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._started = self._last_line = time.perf_counter()
        self._tokens = 0
        self._bar: RichProgress | None = None
        if enabled and sys.stdout.isatty():
            columns = (
                TextColumn("{task.description:<24}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
            )
            self._bar = RichProgress(*columns, TextColumn("{task.fields[rate]}"), console=Console())
            self._task = self._bar.add_task("starting", total=None, rate="")
            self._bar.start()

    def phase(self, name: str, done: int, total: int) -> None:
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.update(self._task, description=name, completed=done, total=total)
        elif time.perf_counter() - self._last_line > _LINE_EVERY_S:
            self._last_line = time.perf_counter()
            print(f"{done}/{total} {name}  {self._rate()}", flush=True)

    def advance(self, tokens: int) -> None:
        self._tokens += tokens
        if self._bar is not None:
            self._bar.update(self._task, rate=self._rate())

    def _rate(self) -> str:
        return f"{self._tokens / (time.perf_counter() - self._started):,.0f} tokens/s"

    def note(self, text: str) -> None:
        """A line that stays, e.g. the result of an evaluation."""
        if self._bar is not None:
            self._bar.console.print(text)
        elif self._enabled:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
