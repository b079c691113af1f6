"""What is put is what is read, under its own key only."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import zarr
from cache_samples import CODE, MATH, fill, get, open_writer, put, row_key_of, rows_of, snapshot

from mtopd.dtypes import dtype_name
from mtopd.hidden_cache import (
    CacheMiss,
    HiddenCacheReader,
    HiddenCacheWriter,
    Read,
    RowKey,
    sample_key,
    view_rows,
)
from mtopd.trajectories import token_hash
from mtopd.types import MtopdError


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tensors_round_trip_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    hidden_NE = torch.randn(5000, 8).to(dtype)
    hidden_NE[0, :3] = torch.tensor([float("nan"), float("-inf"), -0.0])
    row_key = row_key_of(0)
    with open_writer(tmp_path / "c", hidden_dtype=dtype_name(dtype)) as writer:
        writer.put(MATH, 8, *row_key, view_rows(hidden_NE[::2]))  # not contiguous
    with HiddenCacheReader(tmp_path / "c") as reader:
        entry = reader.lookup(*row_key)
        assert entry is not None
        found_NE = torch.zeros(2500, 8, dtype=dtype)
        reader.read(entry, view_rows(found_NE))
        assert torch.equal(
            found_NE.view(torch.uint8), hidden_NE[::2].contiguous().view(torch.uint8)
        )


def test_several_teachers_segments_and_shares(tmp_path: Path) -> None:
    root = tmp_path / "c"
    with open_writer(root) as writer:
        put(writer, 0, 1)
        put(writer, 2, 3, teacher=CODE)
        writer.commit()
        assert HiddenCacheReader(root).missing([row_key_of(0), row_key_of(1)]) == {}
        put(writer, 4, n=3000)
    reader = HiddenCacheReader(root)
    for sample_id, teacher, n in (
        (0, MATH, 50),
        (1, MATH, 50),
        (2, CODE, 50),
        (3, CODE, 50),
        (4, MATH, 3000),
    ):
        assert np.array_equal(get(reader, sample_id, teacher), rows_of(sample_id, teacher, n))
    entry = reader.lookup(*row_key_of(4))
    assert entry is not None
    shares = [np.empty((1000, 4), np.uint16) for _ in range(3)]
    for rank, share_NE in enumerate(shares):
        reader.read_rows(entry, rank * 1000, (rank + 1) * 1000, share_NE)
    assert np.array_equal(np.concatenate(shares), rows_of(4, n=3000))
    assert reader.verify() == {}


def test_the_folder_is_what_the_format_says(tmp_path: Path) -> None:
    root = tmp_path / "c"
    segment = fill(root, 0, 1)
    teacher = root / "t" / MATH[:16]
    assert json.loads((root / "FORMAT.json").read_text()) == {
        "format": 1,
        "kind": "mtopd.hidden_cache",
    }
    assert json.loads((teacher / "teacher.json").read_text()) == {
        "teacher_fingerprint": MATH,
        "hidden_size": 4,
        "hidden_dtype": "bfloat16",
        "state": "after final norm",
    }
    assert segment.parent == teacher / "seg" and segment.name.startswith("dp0-0-")
    table = pa.ipc.open_file(teacher / "index" / f"{segment.name}.arrow").read_all()
    names = (
        "sample_key",
        "sample_id",
        "student_version",
        "segment",
        "row",
        "n_tokens",
        "crc32c",
        "n_shards",
        "bytes",
    )
    assert tuple(table.schema.names) == names
    assert table["row"].to_pylist() == [0, 50] and table["n_tokens"].to_pylist() == [50, 50]
    assert (
        table["bytes"].to_pylist()
        == [sum(path.stat().st_size for path in segment.glob("c/*/0"))] * 2
    )
    assert table.schema.metadata[b"teacher_fingerprint"] == MATH.encode()
    assert np.array_equal(zarr.open(segment, mode="r")[50:100], rows_of(1))


def test_a_sample_without_rows_is_recorded(tmp_path: Path) -> None:
    fill(tmp_path / "c", 0, n=0)
    with HiddenCacheReader(tmp_path / "c") as reader:
        entry = reader.lookup(*row_key_of(0))
        assert entry is not None and entry.n_tokens == 0
        reader.read(entry, np.empty((0, 4), np.uint16))
        assert reader.missing([row_key_of(0)]) == {} and reader.bytes_read == 0


def test_bytes_read_counts_storage(tmp_path: Path) -> None:
    fill(tmp_path / "c", 0)
    reader = HiddenCacheReader(tmp_path / "c")
    get(reader, 0)
    assert reader.bytes_read == 1024 * 4 * 2 + 4  # the one chunk and its crc


def test_small_samples_of_a_chunk_are_read_at_once(tmp_path: Path) -> None:
    """Whole samples and slices, in any order, of two teachers; one sample lies in two chunks."""
    with open_writer(tmp_path / "c") as writer:
        put(writer, *range(30))
        put(writer, 0, 1, teacher=CODE)
    wanted = [(3, 0, 50), (0, 10, 20), (20, 0, 50), (1, 49, 50), (7, 0, 0), (29, 0, 50)]
    with HiddenCacheReader(tmp_path / "c") as reader:
        reads = [
            Read(reader.lookup(*row_key_of(i)), a, b, np.zeros((b - a, 4), np.uint16))
            for i, a, b in wanted
        ]
        others = [
            Read(reader.lookup(*row_key_of(i, CODE)), 0, 50, np.zeros((50, 6), np.uint16))
            for i in (1, 0)
        ]
        reader.read_many([*reads, *others])
        for (sample_id, start, stop), read in zip(wanted, reads, strict=True):
            assert np.array_equal(read.out_NE, rows_of(sample_id)[start:stop]), sample_id
        for sample_id, read in zip((1, 0), others, strict=True):
            assert np.array_equal(read.out_NE, rows_of(sample_id, CODE))
        math, code = 1024 * 4 * 2 + 4, 1024 * 6 * 2 + 4
        assert reader.bytes_read == 2 * math + code, "each chunk once"
        reader.read_many([*reads, *others])
        assert reader.bytes_read == 2 * math + code, "the last chunks are kept"


@pytest.mark.parametrize("sample_id", [3, 20])  # inside a chunk; in two
def test_rows_of_another_sample_are_refused_in_a_shared_chunk(
    tmp_path: Path, sample_id: int
) -> None:
    with open_writer(tmp_path / "c") as writer:
        put(writer, *range(30))
    with HiddenCacheReader(tmp_path / "c") as reader:
        (entry,) = reader.copies(row_key_of(sample_id))
        named_wrong = entry._replace(sample=entry.sample._replace(crc32c=entry.sample.crc32c ^ 1))
        reader._copies[entry.row_key] = [named_wrong]
        reads = [
            Read(reader.lookup(*row_key_of(i)), 0, 50, np.zeros((50, 4), np.uint16))
            for i in (sample_id, 0, 29)
        ]
        with pytest.raises(CacheMiss, match=f"sample {sample_id}: no sound copy.*another crc32c"):
            reader.read_many(reads)
        reader._copies[entry.row_key] = [named_wrong, entry]  # another copy serves
        reader.read_many(reads)
        assert np.array_equal(reads[0].out_NE, rows_of(sample_id))


def test_equal_tokens_of_several_samples_are_several_entries(tmp_path: Path) -> None:
    key = row_key_of(0).key
    row_keys = [RowKey(key, 0, 7), RowKey(key, 1, 7), RowKey(key, 1, 8)]
    with open_writer(tmp_path / "c") as writer:
        for row_key in row_keys:
            writer.put(MATH, 4, *row_key, rows_of(0))
    assert list(HiddenCacheReader(tmp_path / "c").missing([*row_keys, (key, 0, 8)])) == [
        (key, 0, 8)
    ]


def test_the_key_changes_with_everything_that_decides_the_rows() -> None:
    keys = [
        sample_key(MATH, token_hash([1, 2], [3, 4], [1, 1]), "bfloat16"),
        sample_key(CODE, token_hash([1, 2], [3, 4], [1, 1]), "bfloat16"),
        sample_key(MATH, token_hash([1, 5], [3, 4], [1, 1]), "bfloat16"),
        sample_key(MATH, token_hash([1, 2], [3, 5], [1, 1]), "bfloat16"),
        sample_key(MATH, token_hash([1, 2], [3, 4], [1, 0]), "bfloat16"),
        sample_key(MATH, token_hash([1, 2], [3, 4], [1, 1]), "float32"),
        # The same ids, split elsewhere.
        sample_key(MATH, token_hash([1], [2, 3, 4], [1, 1, 1]), "bfloat16"),
        sample_key(MATH, token_hash([1, 2, 3], [4], [1]), "bfloat16"),
        sample_key(MATH, token_hash([1, 2], [], []), "bfloat16"),
        sample_key(MATH, token_hash([1, 2], [3, 4], [1, 1]), "bfloat16", token_hash([5], [], [])),
    ]
    assert len(set(keys)) == len(keys) and {len(key) for key in keys} == {32}


def test_the_key_is_stable() -> None:
    """A cache on disk must stay valid: change the tag in key.py when this has to change."""
    # sha256 of the tag and five fields, each behind its length, computed apart from this code.
    expected = "8f031bb50f2c033bf91bd6b802bc84a539f850cc7952cd62ee653c1d3c439757"
    assert sample_key(MATH, token_hash([1, 2], [3, 4], [1, 1]), "bfloat16").hex() == expected


@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [("", "float32"), ("a1" * 31, "float32"), ("A1" * 32, "float32"), ("a1" * 32, "fp8")],
)
def test_the_key_refuses_nonsense(tokens: str, dtype: str) -> None:
    with pytest.raises(MtopdError):
        sample_key(MATH, tokens, dtype)


def key_of_version_1(sample_id: int) -> bytes:
    """As earlier versions computed it, from the tokens of ``row_key_of``."""
    digest = hashlib.sha256(b"mtopd.hidden_cache.key.1")
    texts = [text.encode() for text in (MATH, "bfloat16", "0..len-1")]
    tokens = [np.array(ids, "<i8").tobytes() for ids in ([1, 2], [sample_id, 3], [1, 1])]
    for field in (*texts, *tokens):
        digest.update(len(field).to_bytes(8, "little") + field)
    return digest.digest()


def test_rows_under_keys_of_an_older_version_are_computed_again(tmp_path: Path) -> None:
    assert key_of_version_1(3).hex().startswith("a9bbcb85c05095d5")
    with open_writer(tmp_path / "c") as writer:
        for sample_id in (0, 1):
            writer.put(MATH, 4, key_of_version_1(sample_id), sample_id, 7, rows_of(sample_id))
    expected = [row_key_of(sample_id) for sample_id in (0, 1)]
    causes = HiddenCacheReader(tmp_path / "c").missing(expected)
    assert list(causes) == expected
    assert all("another version" in cause for cause in causes.values())
    with open_writer(tmp_path / "c", generation=1) as writer:
        put(writer, 0, 1)
    reader = HiddenCacheReader(tmp_path / "c")
    assert not reader.missing(expected)
    for sample_id, row_key in enumerate(expected):
        rows_NE = np.empty((50, 4), np.uint16)
        reader.read(reader.lookup(*row_key), rows_NE)
        assert np.array_equal(rows_NE, rows_of(sample_id))


def test_another_sample_id_or_version_is_refused_with_the_cause(
    tmp_path: Path, caplog: Any
) -> None:
    fill(tmp_path / "c", 0)
    reader = HiddenCacheReader(tmp_path / "c")
    key = row_key_of(0).key
    with caplog.at_level(logging.WARNING):
        assert reader.lookup(key, 1, 7) is None
        assert reader.lookup(key, 0, 8) is None
        assert reader.lookup(row_key_of(0, CODE).key, 0, 7) is None
    for text, record in zip(
        ("sample 1", "version 8", "another teacher"), caplog.records, strict=True
    ):
        assert text in record.message
    caplog.clear()
    assert reader.lookup(*row_key_of(5)) is None and not caplog.records  # plain absence is no news
    assert list(reader.missing([(key, 0, 8), row_key_of(5), row_key_of(0)])) == [
        (key, 0, 8),
        row_key_of(5),
    ]


def test_a_teacher_folder_keeps_its_size_dtype_and_fingerprint(tmp_path: Path) -> None:
    root = tmp_path / "c"
    fill(root, 0)
    before = snapshot(root)
    with pytest.raises(MtopdError, match="Remove the cache folder"), open_writer(root) as writer:
        writer.put(MATH, 5, *row_key_of(1), np.ones((1, 5), np.uint16))
    with (
        pytest.raises(MtopdError, match="float32"),
        open_writer(root, hidden_dtype="float32") as writer,
    ):
        writer.put(MATH, 4, *row_key_of(1), np.ones((1, 4), np.float32))
    with pytest.raises(MtopdError, match="Remove the cache folder"), open_writer(root) as writer:
        writer.put(MATH[:16] + CODE[:48], 4, *row_key_of(1), np.ones((1, 4), np.uint16))
    assert snapshot(root) == before


@pytest.mark.parametrize(
    "rows", [np.ones((2, 4), np.float32), np.ones((2, 5), np.uint16), np.ones(4, np.uint16)]
)
def test_rows_of_another_kind_are_refused(tmp_path: Path, rows: np.ndarray) -> None:
    with pytest.raises(MtopdError, match="needed uint16"), open_writer(tmp_path / "c") as writer:
        writer.put(MATH, 4, *row_key_of(0), rows)


@pytest.mark.parametrize("fingerprint", ["../../../../etc", "A1" * 32, "a1", "a1" * 32 + "/"])
def test_a_fingerprint_is_never_a_path(tmp_path: Path, fingerprint: str) -> None:
    with pytest.raises(MtopdError, match="sha256"), open_writer(tmp_path / "c") as writer:
        writer.put(fingerprint, 4, *row_key_of(0), rows_of(0))
    assert list(tmp_path.rglob("*")) == [tmp_path / "c", tmp_path / "c" / "FORMAT.json"]


def test_a_writer_name_is_never_a_path(tmp_path: Path) -> None:
    for name in ("../x", "a/b", "", "."):
        with pytest.raises(MtopdError):
            HiddenCacheWriter(tmp_path / "c", writer=name, generation=0, hidden_dtype="bfloat16")
