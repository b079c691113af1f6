"""The commit record: one Arrow IPC file that names every sample of a sealed segment.

A sample exists if and only if an index file names it.  Arrow has no checksum, so the file carries a
sha256 over its own rows: a flipped ``row`` would otherwise hand out the hidden states of another
sample.  A file that fails any check is refused whole.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from mtopd.hidden_cache.durable import lost_file_raises
from mtopd.hidden_cache.layout import SegmentLayout
from mtopd.types import MtopdError

KEY_BYTES = 32
_MAX_INDEX_BYTES = 1 << 28
_SEGMENT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,150}-\d{1,19}-[0-9a-f]{8}")  # never a path
_SCHEMA = pa.schema(
    [
        pa.field("sample_key", pa.binary(KEY_BYTES), nullable=False),
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("student_version", pa.int64(), nullable=False),
        pa.field("segment", pa.utf8(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("n_tokens", pa.int64(), nullable=False),
        pa.field("crc32c", pa.uint32(), nullable=False),
        pa.field("n_shards", pa.int64(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
    ]
)


class IndexDamaged(MtopdError):
    """An index file is not what its writer published; its samples count as absent."""


class IndexRow(NamedTuple):
    """One sample, in the order of the file's columns."""

    sample_key: bytes
    sample_id: int
    student_version: int
    segment: str  # name of the segment's folder
    row: int  # of its first token in the segment
    n_tokens: int
    crc32c: int  # of the sample's bytes
    n_shards: int  # shard files of the whole segment
    segment_bytes: int  # of these files together; column "bytes"


def dump_index(rows: list[IndexRow], teacher_fingerprint: str) -> bytes:
    """The content of an index file."""
    schema = _SCHEMA.with_metadata(_metadata(rows, teacher_fingerprint))
    table = pa.table([list(column) for column in zip(*rows, strict=True)], schema=schema)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as file:
        file.write_table(table)
    return sink.getvalue().to_pybytes()


def load_index(path: Path, layout: SegmentLayout) -> list[IndexRow]:
    """The rows of an index file, or IndexDamaged."""

    def damaged(found: str) -> IndexDamaged:
        return IndexDamaged(
            f"hidden cache index {path}: {found}; its samples have to be computed again"
        )

    with lost_file_raises(damaged), path.open("rb") as file:
        content = file.read(_MAX_INDEX_BYTES + 1)
    if len(content) > _MAX_INDEX_BYTES:
        raise damaged(f"larger than {_MAX_INDEX_BYTES} bytes")
    try:
        table = pa.ipc.open_file(pa.BufferReader(content)).read_all()
        table.validate(full=True)
        if not table.schema.equals(_SCHEMA):
            raise damaged(
                f"columns are {table.schema.names}, needed {_SCHEMA.names} with their types"
            )
        if any(column.null_count for column in table.columns):
            raise damaged("it has empty fields")
        rows = list(map(IndexRow._make, zip(*table.to_pydict().values(), strict=True)))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise damaged(f"not a sound Arrow file ({error})") from error
    if table.schema.metadata != _metadata(rows, layout.teacher_fingerprint):
        raise damaged(
            f"format, teacher fingerprint (needed {layout.teacher_fingerprint}) or sha256 of the "
            "rows differ"
        )
    # Many rows name one segment: each name is matched once.
    segment_names = {row.segment for row in rows}
    sound_names = {name for name in segment_names if _SEGMENT_NAME.fullmatch(name)}
    row_bytes = layout.row_bytes
    for row in rows:
        fits = (
            row.row >= 0 <= row.n_tokens
            and (row.row + row.n_tokens) * row_bytes <= row.segment_bytes
        )
        if not (fits and row.segment in sound_names):
            raise damaged(
                f"sample {row.sample_id} points outside: segment {row.segment!r}, row {row.row}"
            )
    return rows


def _metadata(rows: list[IndexRow], teacher_fingerprint: str) -> dict[bytes, bytes]:
    facts = {
        "format": "1",
        "kind": "mtopd.hidden_cache.index",
        "teacher_fingerprint": teacher_fingerprint,
    }
    content = repr((sorted(facts.items()), [tuple(row) for row in rows]))
    facts["sha256"] = hashlib.sha256(content.encode()).hexdigest()
    return {name.encode(): value.encode() for name, value in facts.items()}
