"""The safetensors container, read with suspicion and written in a chosen order.

The safetensors library picks the order of tensors itself; a teacher store needs a given one, so that a rank's part is
one contiguous range.  Reading checks what a hostile or truncated file could get wrong before any offset is used.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from mtopd.types import MtopdError

MAX_HEADER_BYTES = 100 << 20
ITEM_SIZE = {
    "F64": 8,
    "F32": 4,
    "BF16": 2,
    "F16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor stands: absolute byte range in the file."""

    name: str
    dtype: str  # safetensors' spelling
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> list[TensorEntry]:
    """Entries in file order.  Raises MtopdError when the file is truncated or its header does not fit its bytes."""

    def refuse(what: str) -> MtopdError:
        return MtopdError(f"{path} is not a whole safetensors file: {what}; copy or export it again")

    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise refuse(f"it has {size} bytes, the length of the header alone takes 8")
            (header_bytes,) = struct.unpack("<Q", prefix)
            if header_bytes > min(MAX_HEADER_BYTES, size - 8):
                raise refuse(f"its header claims {header_bytes} bytes in a file of {size}")
            header = json.loads(file.read(header_bytes))
    except OSError as error:
        raise MtopdError(f"cannot read {path}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise refuse("its header is not JSON") from None
    if not isinstance(header, dict):
        raise refuse("its header is not a table")
    base, entries = 8 + header_bytes, []
    for name, value in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (start, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
            well_formed = (
                dtype in ITEM_SIZE
                and all(type(n) is int and n >= 0 for n in (*shape, start, stop))
                and stop - start == prod(shape) * ITEM_SIZE[dtype]
            )
        except (TypeError, KeyError, ValueError):
            well_formed = False
        if not well_formed:
            raise refuse(f"the entry of tensor {name!r} is malformed: {str(value)[:200]}")
        entries.append(TensorEntry(name, dtype, shape, base + start, base + stop))
    entries.sort(key=lambda e: (e.start, e.stop))
    expected = base
    for entry in entries:
        if entry.start != expected:
            raise refuse(f"tensor {entry.name!r} starts at byte {entry.start}, the one before ends at {expected}")
        expected = entry.stop
    if expected != size:
        raise refuse(f"its tensors end at byte {expected}, the file at {size} (truncated?)")
    return entries


def header_bytes(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """The header for (name, dtype, shape) in the order in which their bytes will follow, padded to 64 bytes."""
    table, offset = {}, 0
    for name, dtype, shape in tensors:
        stop = offset + prod(shape) * ITEM_SIZE[dtype]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return struct.pack("<Q", len(text)) + text
