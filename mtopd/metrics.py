"""metrics.jsonl and TensorBoard: rank 0 appends one line for each thing that happened.

A line has a ``kind`` (a class of `mtopd.metrics_lines`) and the iteration; a train step also its
number, and a ``part`` tells apart what may happen more than once in an iteration (the pass of each
teacher, a phase of each start). What ran again after a resume writes its line again: readers take
the last line of each (kind, iteration, step, part).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from mtopd.metrics_lines import Line, line_of
from mtopd.types import MtopdError

L = TypeVar("L", bound=Line)


class MetricsWriter:
    """Appends to metrics.jsonl; scalars go to TensorBoard too, and with ``echo`` every line to
    standard output.

    Ranks other than 0 are not ``enabled``: they write nothing.
    """

    def __init__(self, path: Path, *, enabled: bool, echo: bool = False) -> None:
        self._file = self._board = None
        self._echo = echo
        self._path = path
        if enabled:
            from torch.utils.tensorboard import FileWriter

            _cut_half_line(path)
            self._file = open(path, "a", buffering=1)  # noqa: SIM115 - closed in close()
            self._board = FileWriter(str(path.parent / "tensorboard"))

    def write(
        self,
        line: Line,
        iteration: int,
        *,
        step: int | None = None,
        part: str | None = None,
    ) -> None:
        if self._file is None or self._board is None:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary

        which = {k: v for k, v in (("step", step), ("part", part)) if v is not None}
        values = line.values()
        fields = {"kind": line.kind, "iteration": iteration, **which, **values}
        text = json.dumps(fields, allow_nan=False) + "\n"
        try:
            self._file.write(text)
        except OSError as error:  # of an open file, which the system does not name
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        if self._echo:
            sys.stdout.write(text)
            sys.stdout.flush()
        # One event for the line: an event for each of its scalars would cost several milliseconds.
        scalars = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in _scalars(values, line.kind)
        ]
        self._board.add_summary(Summary(value=scalars), iteration if step is None else step)

    def close(self) -> None:
        for part in (self._file, self._board):
            if part is not None:
                part.close()


def _scalars(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}/{name}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}/{name}", float(value)


def _cut_half_line(path: Path) -> None:
    """A killed run may have left half a line: cut it off, so that the next line starts clean."""
    if path.exists():
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            with open(path, "r+b") as file:
                file.truncate(len(whole))


class Entry(NamedTuple, Generic[L]):
    """A line, and when it was written."""

    iteration: int
    step: int | None
    line: L


def read_metrics(path: Path) -> list[Entry[Line]]:
    """The last line of each (kind, iteration, step, part), in order of first appearance; half a
    last line is left out, as are lines of unknown kinds.

    Raises MtopdError that names file and line where another line is damaged.
    """
    entries: dict[tuple[Any, ...], Entry[Line]] = {}
    for number, text in enumerate(
        path.read_bytes().split(b"\n")[:-1] if path.exists() else (), start=1
    ):
        try:
            values = json.loads(text)
            kind, iteration, step = values["kind"], values["iteration"], values.get("step")
            if (line := line_of(kind, values)) is not None:
                entries[kind, iteration, step, values.get("part")] = Entry(iteration, step, line)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise MtopdError(
                f"{path}, line {number}: not a line of metrics; the file was damaged: remove the "
                "line"
            ) from None
    return list(entries.values())
