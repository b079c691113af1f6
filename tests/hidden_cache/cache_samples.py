"""Samples of two teachers and short ways to put, get and break them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mtopd.hidden_cache import (
    HiddenCacheReader,
    HiddenCacheWriter,
    RowKey,
    sample_key,
)
from mtopd.trajectories import token_hash

MATH, CODE = "a1" * 32, "b2" * 32  # teacher fingerprints
SIZES = {MATH: 4, CODE: 6}


def row_key_of(sample_id: int, teacher: str = MATH, version: int = 7) -> RowKey:
    return RowKey(
        sample_key(teacher, token_hash([1, 2], [sample_id, 3], [1, 1]), "bfloat16"),
        sample_id,
        version,
    )


def rows_of(sample_id: int, teacher: str = MATH, n: int = 50) -> np.ndarray:
    return np.random.default_rng(sample_id).integers(1, 1 << 16, (n, SIZES[teacher]), np.uint16)


def open_writer(
    root: Path, generation: int = 0, hidden_dtype: str = "bfloat16"
) -> HiddenCacheWriter:
    return HiddenCacheWriter(root, writer="dp0", generation=generation, hidden_dtype=hidden_dtype)


def put(writer: HiddenCacheWriter, *sample_ids: int, teacher: str = MATH, n: int = 50) -> None:
    for sample_id in sample_ids:
        writer.put(
            teacher, SIZES[teacher], *row_key_of(sample_id, teacher), rows_of(sample_id, teacher, n)
        )


def fill(root: Path, *sample_ids: int, generation: int = 0, n: int = 50) -> Path:
    """Commits the samples in one segment and returns its folder."""
    before = set(root.glob("t/*/seg/*"))
    with open_writer(root, generation) as writer:
        put(writer, *sample_ids, n=n)
    (segment,) = set(root.glob("t/*/seg/*")) - before
    return segment


def get(reader: HiddenCacheReader, sample_id: int, teacher: str = MATH) -> np.ndarray:
    entry = reader.lookup(*row_key_of(sample_id, teacher))
    assert entry is not None, sample_id
    out_NE = np.empty((entry.n_tokens, entry.layout.hidden_size), entry.layout.dtype)
    reader.read(entry, out_NE)
    return out_NE


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def snapshot(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }
