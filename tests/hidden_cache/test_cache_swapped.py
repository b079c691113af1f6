"""Whole, sound files in the place of others: each exchange is found and named, and no row is ever
another sample's.

The exchanged files have the same size, dtype and number of rows, so only what they are bound to can
tell them apart. Every sample is read whole and in parts: a tensor-parallel rank reads only its
share of the rows.
"""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from mtopd.hidden_cache import (
    CacheMiss,
    HiddenCacheReader,
    HiddenCacheWriter,
    Recovery,
    RowKey,
    recover,
    sample_key,
)
from mtopd.trajectories import token_hash

MATH, CODE = "a1" * 32, "b2" * 32
SIZE, SAMPLES = 4, 4
CHUNK_ROWS, SHARD_ROWS = 1024, 65536


def row_key_of(teacher: str, sample_id: int) -> RowKey:
    number = sample_id + (100 if teacher == CODE else 0)
    return RowKey(
        sample_key(teacher, token_hash([1, 2], [number, 3], [1, 1]), "bfloat16"), number, 7
    )


def rows_of(teacher: str, sample_id: int, n: int) -> np.ndarray:
    return np.random.default_rng([len(teacher), teacher == CODE, sample_id]).integers(
        1, 1 << 16, (n, SIZE), np.uint16
    )


def fill(root: Path, teacher: str, sample_ids: range, n: int) -> Path:
    """Commits the samples in one segment and returns its folder."""
    seg = root / "t" / teacher[:16] / "seg"
    before = set(seg.glob("*"))
    with HiddenCacheWriter(root, writer="w", generation=1, hidden_dtype="bfloat16") as writer:
        for sample_id in sample_ids:
            writer.put(
                teacher, SIZE, *row_key_of(teacher, sample_id), rows_of(teacher, sample_id, n)
            )
    (segment,) = set(seg.glob("*")) - before
    return segment


def exchange(one: Path, other: Path) -> None:
    assert one.exists() and other.exists()
    aside = one.with_name("aside")
    os.rename(one, aside)
    os.rename(other, one)
    os.rename(aside, other)


def damage(root: Path, samples: dict[str, range], n: int) -> dict[tuple[str, int], str]:
    """What cannot be read, with the cause that is given; a wrong row fails the test."""
    found = {}
    with HiddenCacheReader(root) as reader:
        causes = reader.missing(
            [row_key_of(teacher, i) for teacher, ids in samples.items() for i in ids]
        )
        for teacher, sample_id in ((teacher, i) for teacher, ids in samples.items() for i in ids):
            row_key, wanted_NE = row_key_of(teacher, sample_id), rows_of(teacher, sample_id, n)
            if row_key in causes:
                hidden = [
                    cause for path, cause in reader.refused.items() if teacher[:16] in str(path)
                ]
                found[teacher, sample_id] = "; ".join([causes[row_key], *hidden])
            entry = reader.lookup(*row_key)
            if entry is None:
                assert row_key in causes, row_key
                continue
            cuts = sorted(
                {0, 1, n // 4, n // 2, CHUNK_ROWS, SHARD_ROWS, n - 1, n} & set(range(n + 1))
            )
            for start, stop in [(0, n), *pairwise(cuts)]:
                out_NE = np.empty((stop - start, SIZE), np.uint16)
                try:
                    reader.read_rows(entry, start, stop, out_NE)
                except CacheMiss as miss:
                    found.setdefault((teacher, sample_id), str(miss))
                    continue
                assert np.array_equal(out_NE, wanted_NE[start:stop]), (
                    f"wrong rows {start} to {stop} of {row_key}"
                )
    return found


@pytest.mark.parametrize("what", ["", "teacher.json", "index", "seg"])
def test_files_of_two_teachers_exchanged(tmp_path: Path, what: str) -> None:
    samples = {MATH: range(SAMPLES), CODE: range(SAMPLES)}
    segments = {
        teacher: fill(tmp_path / "c", teacher, ids, 700) for teacher, ids in samples.items()
    }
    assert damage(tmp_path / "c", samples, 700) == {}
    folders = [tmp_path / "c" / "t" / teacher[:16] for teacher in samples]
    exchange(folders[0] / what, folders[1] / what)
    found = damage(tmp_path / "c", samples, 700)
    assert len(found) == 2 * SAMPLES
    for (teacher, _), cause in found.items():
        named = {"": "teacher.json", "teacher.json": "teacher.json", "index": "index"}.get(
            what, segments[teacher].name
        )
        assert named in cause, cause


@pytest.mark.parametrize(
    "teachers", [(MATH, CODE), (MATH, MATH)], ids=["two teachers", "one teacher"]
)
def test_two_segments_exchanged(tmp_path: Path, teachers: tuple[str, str]) -> None:
    """Each under the other's name, between segments that stay what they are."""
    root, parts = tmp_path / "c", (range(SAMPLES), range(10, 10 + SAMPLES))
    segments = [fill(root, teacher, ids, 700) for teacher, ids in zip(teachers, parts, strict=True)]
    fill(root, MATH, range(20, 22), 700)
    exchange(*segments)
    for teacher, ids, segment in zip(teachers, parts, segments, strict=True):
        found = damage(root, {teacher: ids}, 700)
        assert set(found) == {(teacher, i) for i in ids}
        assert all(segment.name in cause for cause in found.values()), found
    assert damage(root, {MATH: range(20, 22)}, 700) == {}


@pytest.mark.parametrize("n", [SHARD_ROWS, 3000], ids=["a sample a shard", "many samples a shard"])
def test_two_shards_of_one_segment_exchanged(tmp_path: Path, n: int) -> None:
    """Shards full to the last row, so that both have the same size and the same shard index."""
    samples = {MATH: range(2 * SHARD_ROWS // n + 1)}
    segment = fill(tmp_path / "c", MATH, samples[MATH], n)
    assert damage(tmp_path / "c", samples, n) == {}
    exchange(segment / "c" / "0" / "0", segment / "c" / "1" / "0")
    found = damage(tmp_path / "c", samples, n)
    assert set(found) == {(MATH, i) for i in samples[MATH] if i * n < 2 * SHARD_ROWS}
    assert all(segment.name in cause for cause in found.values()), found


def test_two_index_files_exchanged(tmp_path: Path) -> None:
    """A row names its segment itself, so under another file name it still means the same, for
    recovery as well.
    """
    root = tmp_path / "c"
    one = fill(root, MATH, range(SAMPLES), 700)
    other = fill(root, MATH, range(10, 10 + SAMPLES), 700)
    index = root / "t" / MATH[:16] / "index"
    exchange(index / f"{one.name}.arrow", index / f"{other.name}.arrow")
    for _ in range(2):
        assert damage(root, {MATH: range(SAMPLES)}, 700) == {}
        assert damage(root, {MATH: range(10, 10 + SAMPLES)}, 700) == {}
        assert recover(root) == Recovery() and one.exists() and other.exists()


def test_two_index_files_of_two_teachers_exchanged(tmp_path: Path) -> None:
    root = tmp_path / "c"
    samples = {MATH: range(SAMPLES), CODE: range(SAMPLES)}
    segments = {teacher: fill(root, teacher, ids, 700) for teacher, ids in samples.items()}
    paths = [
        root / "t" / t[:16] / "index" / f"{segment.name}.arrow" for t, segment in segments.items()
    ]
    exchange(*paths)
    found = damage(root, samples, 700)
    assert len(found) == 2 * SAMPLES
    for (teacher, _), cause in found.items():
        assert str(paths[teacher == CODE]) in cause and "fingerprint" in cause, cause
