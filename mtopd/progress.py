"""What a run says on the terminal: rank 0's progress display, single lines, errors.

The display is one bar over the iterations, the phase, answer tokens and positions of training
per second since the start.  On a terminal it is a rich bar; elsewhere a line every few seconds, so
that logs stay readable.
"""

from __future__ import annotations

import os
import sys
import time
import warnings

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

console = Console(stderr=True)
_LINE_EVERY_S = 15.0
_LOG_JSON = "MTOPD_LOG_JSON"  # ranks inherit it


class Progress:
    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._started = self._last_line = time.perf_counter()
        self._tokens = self._positions = 0
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

    def advance(self, *, tokens: int, positions: int) -> None:
        """A train step was taken: on so many tokens of answers, read at so many positions."""
        self._tokens += tokens
        self._positions += positions
        if self._bar is not None:
            self._bar.update(self._task, rate=self._rate())

    def _rate(self) -> str:
        seconds = time.perf_counter() - self._started
        return (
            f"{self._tokens / seconds:,.0f} answer tokens/s, "
            f"{self._positions / seconds:,.0f} positions/s"
        )

    def note(self, text: str) -> None:
        """A line that stays, e.g. the result of an evaluation."""
        if self._bar is not None:
            self._bar.console.print(text)
        elif self._enabled:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def under_torchrun() -> bool:
    """torchrun, or `pipelines.own_ranks` with its library, started this process.  RANK and WORLD_SIZE
    prove nothing: schedulers set them for a whole job.
    """
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_first() -> bool:
    """This process speaks for the run: it is rank 0, or the only one there is."""
    return not under_torchrun() or os.environ.get("RANK", "0") == "0"


def log_as_json() -> None:
    """--log-json: this start prints metrics lines, on whatever rank prints, as if the config said
    log_json.  The run keeps its config as it was: a later start shows progress again.
    """
    os.environ[_LOG_JSON] = "1"


def logs_json(configured: bool) -> bool:
    """Whether metrics lines are printed instead of progress; ``configured``: the config's log_json."""
    return configured or os.environ.get(_LOG_JSON) == "1"


def say(text: str) -> None:
    """A line to the user about what is going on, once whatever the number of ranks."""
    if is_first():
        console.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)


def answer(text: str) -> None:
    """A line that a command was asked for: plain, on standard output."""
    Console(soft_wrap=True, highlight=False, markup=False).print(text)


def print_error(text: str) -> None:
    line = " ".join(text.split())  # one line, whatever the message holds
    console.print(f"[bold red]error:[/bold red] {escape(line)}", highlight=False, soft_wrap=True)


def quiet_libraries() -> None:
    """Keep libraries from printing what is of no use to the reader of a run's output."""
    for module in ("megatron", "mbridge", "torch", "transformers"):
        warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")
    warnings.filterwarnings("ignore", message=".*[Aa]pex.*")
    # The distributed optimizer looks at gradients of views.
    warnings.filterwarnings("ignore", message=".*a Tensor that is not a leaf.*")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
