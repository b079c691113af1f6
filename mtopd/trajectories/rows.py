"""Trajectories of another harness, one a row of JSON Lines or Parquet: docs/trajectories.md has every
column.

Rows are read one at a time, so that a file of any size needs the memory of its longest row.  Here a
row's columns and their types are checked; what it means to a run is `mtopd.trajectories.row_checks`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mtopd.data.readers import check_file, numbered_lines, parse_line
from mtopd.types import MtopdError, plain_text

ROW_FORMAT = "mtopd-trajectory-1"  # what the column ``format`` of every row says
ROW_FILES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
REQUIRED = {
    "format": "text",
    "sample_id": "an integer",
    "prompt_id": "text",
    "prompt_ids": "a list of integers",
    "response_ids": "a list of integers",
    "loss_mask": "a list of integers",
    "rollout_log_probs": "a list of numbers",
    "student_version": "an integer",
    "finish_reason": "text",
}
OPTIONAL = {
    "teacher": "text",
    "route": "an object of text, numbers and booleans",
    "teacher_prompt_ids": "a list of integers",
    "reward": "a number",
}
_COLUMNS = {**REQUIRED, **OPTIONAL}
_BATCH = 64  # rows of a Parquet file in memory at once
_TYPES: Mapping[str, tuple[type, ...]] = {
    "text": (str,),
    "an integer": (int,),
    "a number": (int, float),
    "a list of integers": (int,),
    "a list of numbers": (int, float),
}
_NAMES = {type(None): "null", str: "text", bool: "a boolean", int: "an integer", float: "a float"}

Problem = tuple[str, str]  # the column, and what is wrong with it


@dataclass(frozen=True, slots=True)
class Row:
    """A row whose columns are all there and have the types they must have."""

    format: str
    sample_id: int
    prompt_id: str
    prompt_ids: list[int]
    response_ids: list[int]
    loss_mask: list[int]
    rollout_log_probs: list[float]
    student_version: int
    finish_reason: str
    teacher: str | None = None
    route: dict[str, str] | None = None
    teacher_prompt_ids: list[int] | None = None
    reward: float | None = None


def read_rows(
    path: Path, *, skip: int = 0, at: Callable[[int], None] = lambda position: None
) -> Iterator[tuple[int, Row | list[Problem] | None]]:
    """(number of the line or row, the row or what is wrong with it) in the file's order; None in place
    of the first ``skip``, which are not looked at.  ``at`` is told the bytes of the file read so far.

    Raises MtopdError for a file that cannot be read.
    """
    ending = row_file_ending(path)
    read = _read_parquet if ending == ".parquet" else _read_lines
    for count, (number, record) in enumerate(read(path, ending, at)):
        yield number, (None if count < skip else parse_row(record()))


def row_file_ending(path: Path) -> str:
    """Raises MtopdError for a file of another format, or none."""
    ending = next((e for e in ROW_FILES if path.name.lower().endswith(e)), None)
    if ending is None:
        raise MtopdError(
            f"{path} is none of {', '.join(ROW_FILES)}; write the trajectories as one of them"
        )
    check_file(path)
    return ending


def place(path: Path, number: int) -> str:
    """Where a row stands, for a message."""
    return f"{path}, {'row' if path.name.lower().endswith('.parquet') else 'line'} {number}"


# -- types -----------------------------------------------------------------------------------------
def parse_row(record: Mapping[str, Any] | MtopdError) -> Row | list[Problem]:
    """The row that a record is, or all that is wrong with its columns.  Null is no value."""
    if isinstance(record, MtopdError):
        return [("JSON", str(record))]
    problems: list[Problem] = []
    known = {}
    for name, value in record.items():
        if name not in _COLUMNS:
            problems.append((name, f"is no column of {ROW_FORMAT}; leave it out"))
        elif value is not None:
            known[name] = value
            if (found := _other_type(value, _COLUMNS[name])) is not None:
                problems.append((name, f"is {found}; needed is {_COLUMNS[name]}"))
    problems += [(name, "is missing") for name in REQUIRED if name not in known]
    if problems:
        return problems
    if known["format"] != ROW_FORMAT:
        found = known["format"]
        return [("format", f"is {found!r}; this version of mtopd reads {ROW_FORMAT!r}")]
    if (route := known.get("route")) is not None:
        known["route"] = {key: plain_text(v) for key, v in route.items() if v is not None}
    return Row(**known)


def _other_type(value: Any, needed: str) -> str | None:
    """What a value is that is not what is needed."""
    if needed.startswith("an object"):
        if not isinstance(value, dict):
            return _name(value)
        wrong = [v for v in value.values() if not isinstance(v, str | int | float | None)]
        return f"an object that holds {_name(wrong[0])}" if wrong else None
    allowed = _TYPES[needed]
    if not needed.startswith("a list"):
        return None if type(value) in allowed else _name(value)
    if not isinstance(value, list):
        return _name(value)
    if not {*map(type, value)} <= {*allowed}:  # one pass in C: rows are long
        index = next(i for i, item in enumerate(value) if type(item) not in allowed)
        return f"a list with {_name(value[index])} at [{index}]"
    return None


def _name(value: Any) -> str:
    return _NAMES.get(type(value), f"a {type(value).__name__}")


# -- files -----------------------------------------------------------------------------------------
Record = Callable[[], Mapping[str, Any] | MtopdError]


def _read_lines(path: Path, ending: str, at: Callable[[int], None]) -> Iterator[tuple[int, Record]]:
    for number, line in numbered_lines(path, Path(ending).suffix, at):

        def record(line: bytes = line) -> Mapping[str, Any] | MtopdError:
            try:
                return parse_line(line, "the line")[1]
            except MtopdError as error:  # the lines behind it are looked at all the same
                return error

        yield number, record


def _read_parquet(
    path: Path, ending: str, at: Callable[[int], None]
) -> Iterator[tuple[int, Record]]:
    number, size = 0, path.stat().st_size
    try:
        # A row group is read page by page: it may be the whole file.
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            total = file.metadata.num_rows
            names = file.schema_arrow.names
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise MtopdError(f"{path}: column '{twice[0]}' stands twice; rename one of them")
            for batch in file.iter_batches(_BATCH):
                for row in range(len(batch)):

                    def record(batch: pa.RecordBatch = batch, row: int = row) -> Mapping[str, Any]:
                        return {name: _value(batch.column(name)[row]) for name in names}

                    yield number, record
                    number += 1
                at(size * number // total)
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, MtopdError):
            raise
        raise MtopdError(
            f"{path}, after {number} rows: no readable Parquet file ({error}); write it again"
        ) from None


def _value(scalar: pa.Scalar) -> Any:
    if isinstance(scalar, pa.MapScalar):  # a list of pairs, too
        return scalar.as_py(maps_as_pydicts="strict")
    if isinstance(scalar, pa.ListScalar | pa.LargeListScalar) and scalar.is_valid:
        values = scalar.values
        kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
        if values.null_count or not any(kind(values.type) for kind in kinds):
            return values.to_pylist()
        return values.to_numpy(zero_copy_only=False).tolist()  # no Arrow scalar for each token
    value = scalar.as_py()
    return (
        None if isinstance(value, float) and math.isnan(value) else value
    )  # how tables write a gap
