"""The safetensors container, read with suspicion and written in a chosen order.

The safetensors library picks the order of tensors itself; a teacher store needs a given one, so
that a rank's part is one contiguous range.  Reading checks what a hostile or truncated file could
get wrong before any offset is used.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtopd.dtypes import is_safetensors_name, item_size
from mtopd.types import MtopdError

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER_BYTES = 100 << 20


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor stands: absolute byte range in the file."""

    name: str
    dtype: str  # safetensors' spelling
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> list[TensorEntry]:
    """Entries in file order.  Raises MtopdError when the file is truncated or its header does not
    fit its bytes.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            data = file.read(8)
            data += file.read(header_length(str(path), data, size) - 8)
    except OSError as error:
        raise MtopdError(f"cannot read {path}: {error.strerror}") from None
    return parse_header(str(path), data, size)


def header_length(label: str, prefix: bytes, size: int) -> int:
    """Bytes of the header, its 8 bytes of length included, from the first 8 bytes of a file of
    ``size``.
    """
    if len(prefix) < 8:
        raise _refusal(label, f"it has {size} bytes, the length of the header alone takes 8")
    (claimed,) = struct.unpack("<Q", prefix[:8])
    # Checked before the header is read: a hostile length must not allocate memory.
    if claimed > min(MAX_HEADER_BYTES, size - 8):
        raise _refusal(label, f"its header claims {claimed} bytes in a file of {size}")
    return 8 + int(claimed)


def parse_header(label: str, data: bytes, size: int) -> list[TensorEntry]:
    """Entries, in file order, of a file of ``size`` that begins with the whole header ``data``."""

    def refuse(problem: str) -> MtopdError:
        return _refusal(label, problem)

    if header_length(label, data, size) != len(data):
        raise refuse(f"its header does not end at byte {len(data)}, where its manifest says")
    try:
        header = json.loads(data[8:])
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise refuse("its header is not JSON") from None
    if not isinstance(header, dict):
        raise refuse("its header is not a table")
    rows = []
    for name, value in header.items():
        if name == "__metadata__":
            continue
        try:
            rows.append((name, value["dtype"], value["shape"], *value["data_offsets"]))
        except (TypeError, KeyError):
            raise refuse(f"the entry of tensor {name!r} is malformed: {str(value)[:200]}") from None
        # No damage: the format gains dtypes, of quantised codes for the most part.
        if isinstance(value["dtype"], str) and not is_safetensors_name(value["dtype"]):
            raise MtopdError(
                f"{label}: tensor {name!r} has dtype {value['dtype'][:40]!r}, which is not read; "
                "convert the checkpoint to bfloat16 or float32 first"
            )
    return checked_entries(rows, len(data), size, refuse)


def checked_entries(
    rows: Iterable[Sequence[Any]], header: int, size: int, refuse: Callable[[str], MtopdError]
) -> list[TensorEntry]:
    """Entries in file order from (name, dtype, shape, start, stop), bytes counted after the header
    of ``header`` bytes.  Raises what ``refuse`` makes of the reason unless they fill a file of
    ``size``.
    """
    entries = []
    for row in rows:
        try:
            name, dtype, shape, start, stop = row
            well_formed = (
                is_safetensors_name(dtype)
                and all(type(n) is int and n >= 0 for n in (*shape, start, stop))
                and stop - start == prod(shape) * item_size(dtype)
            )
        except (TypeError, ValueError):
            well_formed = False
        if not well_formed:
            raise refuse(f"the entry of tensor {row[0]!r} is malformed: {str(row)[:200]}")
        entries.append(TensorEntry(name, dtype, tuple(shape), header + start, header + stop))
    entries.sort(key=lambda e: (e.start, e.stop))
    # No gap, no overlap: every byte of the file belongs to exactly one tensor.
    expected = header
    for entry in entries:
        if entry.start != expected:
            raise refuse(
                f"tensor {entry.name!r} starts at byte {entry.start}, the one before ends at "
                f"{expected}"
            )
        expected = entry.stop
    if expected != size:
        raise refuse(f"its tensors end at byte {expected}, the file at {size} (truncated?)")
    return entries


def _refusal(label: str, problem: str) -> MtopdError:
    return MtopdError(
        f"{label} is not a whole safetensors file: {problem}; copy or export it again"
    )


def header_bytes(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str] | None = None
) -> bytes:
    """The header for (name, dtype, shape) in the order in which their bytes will follow, padded to
    64 bytes.
    """
    table: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for name, dtype, shape in tensors:
        stop = offset + prod(shape) * item_size(dtype)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return struct.pack("<Q", len(text)) + text


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """The library's ``save_file``, but with the mode of any other new file: the library's own is for
    its owner alone, whatever the umask says.
    """
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode & 0o777
    save_file(dict(tensors), path, metadata)
    path.chmod(mode)
