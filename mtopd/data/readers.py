"""Records of a data file, each with the place where it stands: JSON Lines, a JSON array, Parquet.

Read strictly: what two readers could take in two ways is refused by file and line.  NaN, which is
how tables write a gap, is null.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mtopd.files import LFS_POINTER
from mtopd.types import MtopdError

Record = Mapping[str, Any]

FORMATS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".parquet")
# Columns that may hold more than one value: read whole.  Of others only values are of use.
NESTED = ("prompt", "messages", "tools", "answer", "reward_model")
_CODECS = {".gz": "gzip", ".zst": "zstd"}
_BEGINNINGS = {  # what a file is, whatever its name says
    b"\x1f\x8b": (".jsonl.gz", "gzip"),
    b"\x28\xb5\x2f\xfd": (".jsonl.zst", "Zstandard"),
    b"PAR1": (".parquet", "Parquet"),
}
_FLOAT_DIGITS = 17  # that tell any two floats apart
_LONGEST_LINE = 64 << 20  # bytes; bounds what a small compressed file can become in memory


def read_records(path: Path) -> Iterator[tuple[str, Record]]:
    """Pairs of (where, record) in the file's order.  A value that is neither null, text, a number
    nor a boolean stands for itself in the columns NESTED, for its type in others.

    Raises MtopdError for a file of another format, or one that is damaged.
    """
    ending = format_of(path)
    if ending == ".parquet":
        return _read_parquet(path)
    return _read_json(path) if ending == ".json" else _read_lines(path, Path(ending).suffix)


def format_of(path: Path) -> str:
    """The one of FORMATS that a file has by its name.  Raises MtopdError for another, and for what
    ``check_file`` refuses.
    """
    ending = next((e for e in FORMATS if path.name.lower().endswith(e)), None)
    if ending is None:
        raise MtopdError(
            f"{path} is none of {', '.join(FORMATS)}; convert it to one of them, or name it so"
        )
    start = check_file(path)
    for beginning, (fitting, kind) in _BEGINNINGS.items():
        if start.startswith(beginning) and ending != fitting:
            raise MtopdError(
                f"{path} is {kind} by its first bytes; name it {fitting}, or give the unpacked file"
            )
    return ending


def check_file(path: Path) -> bytes:
    """How a file begins.  Raises MtopdError unless ``path`` is one that can be opened and ends: no
    folder, no device.
    """
    if path.is_dir():
        raise MtopdError(f"{path} is a folder; give one file of it, and further ones as sources")
    if not path.is_file():
        raise MtopdError(f"{path} does not exist or is no file; correct the path")
    try:
        with open(path, "rb") as file:
            start = file.read(len(LFS_POINTER))
    except OSError as error:
        raise MtopdError(
            f"{path} cannot be read ({error.strerror}); change its permissions"
        ) from None
    if start == LFS_POINTER:
        raise MtopdError(f"{path} is a git-lfs pointer, not the data; fetch it with git lfs pull")
    return start


# -- JSON ------------------------------------------------------------------------------------------
def _read_json(path: Path) -> Iterator[tuple[str, Record]]:
    """One array of objects; or, as some hubs name it, JSON Lines."""
    try:
        text = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise MtopdError(f"{path} cannot be read ({error.strerror}); copy it again") from None
    if not text.lstrip().startswith(b"["):
        yield from _read_lines(path, "")
        return
    for number, record in enumerate(parse_json(text, str(path), _exact)):
        yield _object(record, f"{path}, item {number}")


def _read_lines(path: Path, ending: str) -> Iterator[tuple[str, Record]]:
    for number, line in numbered_lines(path, ending):
        where = f"{path}, line {number}"
        yield _object(parse_json(line, where, _exact), where)


def numbered_lines(
    path: Path, ending: str, at: Callable[[int], None] = lambda position: None
) -> Iterator[tuple[int, bytes]]:
    """Number, from 1, and bytes of each line that is not blank; ``ending``: .gz or .zst where the
    file is compressed.  ``at`` is told how many bytes of the file were read.
    """
    number = 0
    try:
        raw = open(path, "rb")  # noqa: SIM115 - closed with what reads from it
        with closing(_decompressed(raw, _CODECS.get(ending))) as file:
            while line := file.readline(_LONGEST_LINE + 1):
                number += 1
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if len(line) > _LONGEST_LINE:
                    where = f"{path}, line {number}"
                    raise MtopdError(f"{where} is longer than {_LONGEST_LINE} bytes; split it")
                if line.strip():
                    at(raw.tell())
                    yield number, line
    except (OSError, pa.ArrowException) as error:
        raise MtopdError(
            f"{path}, after line {number}: cannot be read on ({error}); copy or write it again"
        ) from None


def parse_line(line: bytes, where: str) -> tuple[str, Record]:
    """(where, record) of a line that must hold one JSON object.  Raises MtopdError."""
    return _object(parse_json(line, where), where)


def _decompressed(raw: io.BufferedReader, codec: str | None) -> io.BufferedReader:
    if codec is None:
        return raw
    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw), codec))


def parse_json(text: bytes, where: str, number: Callable[[str], float] | None = None) -> Any:
    """Strictly: UTF-8, no key twice, no infinity; NaN is null.  ``number`` makes one of a text with a
    point or an exponent.  Raises MtopdError.
    """
    try:
        return json.loads(
            text.decode(),
            object_pairs_hook=_unique,
            parse_constant=_constant,
            parse_float=number or _finite,
        )
    except UnicodeDecodeError as error:
        raise MtopdError(
            f"{where}: byte {error.start} is not UTF-8; save the file as UTF-8"
        ) from None
    except RecursionError:
        raise MtopdError(f"{where}: lists or objects are nested too deeply; flatten it") from None
    except ValueError as error:
        raise MtopdError(f"{where}: no valid JSON ({error}); correct or remove it") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return table


def _constant(name: str) -> None:
    if name != "NaN":
        raise ValueError(f"{name} is no JSON")


class LongNumber(float):
    """A number with more digits than a float has, and all of them: an answer may be compared by
    them.
    """

    def __init__(self, written: str) -> None:
        self.written = Decimal(written)


def _exact(text: str) -> float:
    value = _finite(text)
    if len(text) > _FLOAT_DIGITS and len(Decimal(text).as_tuple().digits) > _FLOAT_DIGITS:
        return LongNumber(text)
    return value


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text:.80} is larger than any number of 64 bits")
    return value


def _object(record: Any, where: str) -> tuple[str, Record]:
    if not isinstance(record, dict):
        raise MtopdError(f"{where}: found {type(record).__name__}, each must be an object")
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # no encoding has half a surrogate pair
        half = error.object[error.start : error.end].encode("unicode_escape").decode()
        raise MtopdError(f"{where}: {half} is half a character; write both halves") from None
    return where, record


# -- Parquet ---------------------------------------------------------------------------------------
def _read_parquet(path: Path) -> Iterator[tuple[str, Record]]:
    try:
        table = pq.ParquetFile(path).read()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise MtopdError(f"{path}: no readable Parquet file ({error}); write it again") from None
    names = table.column_names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise MtopdError(f"{path}: column '{twice[0]}' stands twice; rename one of them")
    columns = [_values(table[name], name, path) for name in names]
    for number, values in enumerate(zip(*columns, strict=True)):
        yield f"{path}, row {number}", dict(zip(names, values, strict=True))


def _values(column: pa.ChunkedArray, name: str, path: Path) -> list[Any]:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (_is_scalar(kind) or name in NESTED):
        return [kind if is_filled else None for is_filled in _is_filled(column)]
    try:
        values: list[Any] = column.to_pylist(maps_as_pydicts="strict")
    # what Python has no value for: dates out of its range, a key twice in a map
    except (pa.ArrowException, ValueError, OverflowError, KeyError) as error:
        raise MtopdError(
            f"{path}: column '{name}' cannot be read ({error}); write it as text"
        ) from None
    if "float" in str(kind):  # or in a name in it, which only costs time
        values = [_shortened(value, kind) for value in values]
    if name not in NESTED or _is_scalar(kind):
        return [None if isinstance(v, float) and math.isnan(v) else v for v in values]
    kept = ("content",) if name in ("prompt", "messages") else ()  # templates ask for it
    return [_without_gaps(value, kept) for value in values]


def _shortened(value: Any, kind: pa.DataType) -> Any:
    """0.1 as float32 is 0.1, not the 0.10000000149011612 that float64 calls it; whole numbers keep
    every digit: the shortest text of 65504 as float16 is 65500.  So in lists and structs.
    """
    if isinstance(value, float) and not value.is_integer():
        width = {pa.float16(): np.float16, pa.float32(): np.float32}.get(kind, float)
        return float(str(width(value)))
    if isinstance(value, list):
        return [_shortened(item, kind.value_type) for item in value]
    if isinstance(value, dict):
        of = {n: kind.item_type if pa.types.is_map(kind) else kind.field(n).type for n in value}
        return {name: _shortened(item, of[name]) for name, item in value.items()}
    return value


def _is_filled(column: pa.ChunkedArray) -> list[bool]:
    """By row, whether there is a value; a list without items is none."""
    filled = column.is_valid()
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        filled = pc.fill_null(pc.greater(pc.list_value_length(column), 0), False)
    found: list[bool] = filled.to_pylist()
    return found


def _is_scalar(kind: pa.DataType) -> bool:
    tests = ("boolean", "integer", "floating", "decimal", "string", "large_string", "string_view")
    return any(getattr(pa.types, f"is_{test}")(kind) for test in tests)


def _without_gaps(value: Any, kept: tuple[str, ...] = ()) -> Any:
    """Every struct of a column has all keys that one of them has: null is how a missing key is
    stored.  ``kept`` keys of the outermost structs stay.
    """
    if isinstance(value, list):
        return [_without_gaps(item, kept) for item in value]
    if not isinstance(value, dict):
        return value
    return {k: _without_gaps(v) for k, v in value.items() if v is not None or k in kept}
