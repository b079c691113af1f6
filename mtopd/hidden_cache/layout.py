"""What the bytes of a segment are: a pure function of the number of rows and of what a row is.

Both sides use it, the writer to produce a segment and the reader to know what a sound one has to
look like.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import google_crc32c
import numpy as np

from mtopd.dtypes import numpy_dtype
from mtopd.types import MtopdError

LAYOUT_VERSION = 1
CHUNKS_PER_SHARD = 64
CRC_BYTES = 4
HIDDEN_DTYPES = ("bfloat16", "float32")
_TARGET_CHUNK_BYTES = 1 << 20
_MIN_CHUNK_ROWS, _MAX_CHUNK_ROWS = 64, 1024
# offset and length that the shard index gives to a chunk that was never written
_ABSENT = (1 << 64) - 1


@dataclass(frozen=True)
class SegmentLayout:
    """What the rows of a segment are; fixes every byte of its files once the number of rows is
    known.
    """

    teacher_fingerprint: str
    hidden_size: int
    hidden_dtype: str  # one of HIDDEN_DTYPES

    @cached_property
    def dtype(self) -> np.dtype:
        return numpy_dtype(self.hidden_dtype)

    @cached_property
    def row_bytes(self) -> int:
        return self.hidden_size * self.dtype.itemsize

    @cached_property
    def chunk_bytes(self) -> int:
        return self.chunk_rows * self.row_bytes

    @cached_property
    def chunk_rows(self) -> int:
        """The power of two nearest to 1 MiB of rows, within [64, 1024]."""
        rows = _TARGET_CHUNK_BYTES / self.row_bytes
        return 1 << round(math.log2(min(max(rows, _MIN_CHUNK_ROWS), _MAX_CHUNK_ROWS)))

    @cached_property
    def shard_rows(self) -> int:
        return self.chunk_rows * CHUNKS_PER_SHARD

    @cached_property
    def stored_chunk_bytes(self) -> int:
        """Bytes of one chunk on disk, its crc32c included."""
        return self.chunk_bytes + CRC_BYTES

    def num_chunks(self, rows: int) -> int:
        return -(-rows // self.chunk_rows)

    def num_shards(self, rows: int) -> int:
        return -(-rows // self.shard_rows)

    def num_bytes(self, rows: int) -> int:
        """Bytes of all shard files."""
        footers = self.num_shards(rows) * len(self.shard_index(0))
        return self.num_chunks(rows) * self.stored_chunk_bytes + footers

    def shard_index(self, num_chunks: int) -> bytes:
        """The zarr shard index that ends a shard file of ``num_chunks`` chunks: (offset, length)
        pairs and a crc32c.
        """
        pairs = np.full((CHUNKS_PER_SHARD, 2), _ABSENT, "<u8")
        pairs[:num_chunks, 0] = np.arange(num_chunks) * self.stored_chunk_bytes
        pairs[:num_chunks, 1] = self.stored_chunk_bytes
        return pairs.tobytes() + stored_crc(pairs)

    def metadata(self, rows: int, segment: str, chunk_crcs: list[int]) -> dict[str, Any]:
        """The content of zarr.json.  ``segment``: the folder's name, so that no segment passes for
        another; ``chunk_crcs``: so that no shard or chunk does.
        """
        # Uncompressed: hidden states give back less than a third, for about a core-second a GB.
        codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        sharding = {
            "chunk_shape": [self.chunk_rows, self.hidden_size],
            "codecs": codecs,
            "index_codecs": codecs,
            "index_location": "end",
        }
        grid = {"chunk_shape": [self.shard_rows, self.hidden_size]}
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [rows, self.hidden_size],
            "data_type": self.dtype.name,
            "fill_value": 0,
            "dimension_names": ["token", "hidden"],
            "chunk_grid": {"name": "regular", "configuration": grid},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": {
                "hidden_dtype": self.hidden_dtype,
                "teacher_fingerprint": self.teacher_fingerprint,
                "layout": LAYOUT_VERSION,
                "segment": segment,
                "chunk_crc32c": chunk_crcs,
            },
        }


def check_hidden_dtype(hidden_dtype: str) -> None:
    if hidden_dtype not in HIDDEN_DTYPES:
        raise MtopdError(
            f"hidden dtype is {hidden_dtype!r}, needed one of {', '.join(HIDDEN_DTYPES)}"
        )


def crc32c(rows_NE: np.ndarray) -> int:
    """crc32c of the bytes of a C-contiguous array."""
    return google_crc32c.value(rows_NE.reshape(-1).view(np.uint8))


def joined_crc32c(left: int, right: int, right_bytes: int) -> int:
    """crc32c of two byte strings in a row, from their own; fast for few different ``right_bytes``."""
    for bit, column in enumerate(_zeros_appended(right_bytes)):
        if left >> bit & 1:
            right ^= column
    return right


@cache
def _zeros_appended(num_bytes: int) -> list[int]:
    """What appending zeros makes of each bit of a crc32c; it is linear, so this decides it for
    every value.
    """
    zeros = np.zeros(num_bytes, np.uint8)
    crc_of_zeros = google_crc32c.value(zeros)
    return [google_crc32c.extend(1 << bit, zeros) ^ crc_of_zeros for bit in range(32)]


def stored_crc(array: np.ndarray) -> bytes:
    return crc32c(array).to_bytes(CRC_BYTES, "little")
