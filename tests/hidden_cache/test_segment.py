"""A segment is a standard zarr array, and no damage to it ever reads as data."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from mtopd.hidden_cache.layout import SegmentLayout, stored_crc
from mtopd.hidden_cache.segment import SegmentDamaged, SegmentReader, SegmentWriter

BF16 = SegmentLayout("a" * 64, 4, "bfloat16")  # 1024 rows a chunk, 65536 a shard
FP32 = SegmentLayout("b" * 64, 3, "float32")


def random_rows(layout: SegmentLayout, n: int) -> np.ndarray:
    """Random bits, NaN patterns among them."""
    bits = np.random.default_rng(n).integers(0, 256, n * layout.row_bytes, np.uint8)
    return bits.view(layout.dtype).reshape(n, layout.hidden_size)


def write(
    path: Path, layout: SegmentLayout, rows_NE: np.ndarray, pieces: tuple[int, ...] = ()
) -> None:
    writer = SegmentWriter(path, layout)
    for piece_NE in np.split(rows_NE, pieces):
        writer.append(piece_NE)
    writer.seal()


def read(path: Path, layout: SegmentLayout, start: int, stop: int) -> np.ndarray:
    out_NE = np.empty((stop - start, layout.hidden_size), layout.dtype)
    SegmentReader(path, layout).read(start, stop, out_NE)
    return out_NE


@pytest.mark.parametrize("layout", [BF16, FP32], ids=lambda layout: layout.hidden_dtype)
@pytest.mark.parametrize("n", [0, 1, 1023, 1024, 1025, 65536, 2 * 65536 + 777])
def test_zarr_and_our_reader_see_the_same_bits(
    tmp_path: Path, layout: SegmentLayout, n: int
) -> None:
    rows_NE = random_rows(layout, n)
    write(
        tmp_path / "s", layout, rows_NE, pieces=tuple(p for p in (1, 5, 1100, 5000, 70000) if p < n)
    )
    array = zarr.open(tmp_path / "s", mode="r")
    assert array.shape == rows_NE.shape and array.dtype == layout.dtype
    assert array[:].tobytes() == rows_NE.tobytes()
    attributes = dict(array.attrs)
    assert len(attributes.pop("chunk_crc32c")) == layout.num_chunks(n)
    assert attributes == {
        "hidden_dtype": layout.hidden_dtype,
        "teacher_fingerprint": layout.teacher_fingerprint,
        "layout": 1,
        "segment": "s",
    }
    assert array.metadata.dimension_names == ("token", "hidden")
    assert read(tmp_path / "s", layout, 0, n).tobytes() == rows_NE.tobytes()
    assert sum(path.stat().st_size for path in tmp_path.glob("s/c/*/0")) == layout.num_bytes(n)
    assert not list(tmp_path.rglob("*.partial"))


def test_any_range_of_rows(tmp_path: Path) -> None:
    n = 65536 + 5000
    rows_NE = random_rows(BF16, n)
    write(tmp_path / "s", BF16, rows_NE)
    edges = (0, 1, 1023, 1024, 1025, 3000, 65535, 65536, 65537, n - 1, n)
    for start in edges:
        for stop in (edge for edge in edges if edge >= start):
            assert (
                read(tmp_path / "s", BF16, start, stop).tobytes() == rows_NE[start:stop].tobytes()
            ), (start, stop)


def test_a_read_touches_only_the_chunks_it_needs(tmp_path: Path) -> None:
    write(tmp_path / "s", BF16, random_rows(BF16, 5000))
    out_NE = np.empty((10, 4), np.uint16)
    assert SegmentReader(tmp_path / "s", BF16).read(1500, 1510, out_NE) == BF16.stored_chunk_bytes


def test_a_reader_keeps_no_file_open(tmp_path: Path) -> None:
    write(tmp_path / "s", BF16, random_rows(BF16, 70000))
    before = os.listdir("/proc/self/fd")
    reader = SegmentReader(tmp_path / "s", BF16)
    reader.read(0, 70000, np.empty((70000, 4), np.uint16))
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(
    ("hidden_size", "hidden_dtype", "chunk_rows"),
    [
        (512, "bfloat16", 1024),
        (4096, "bfloat16", 128),
        (7168, "bfloat16", 64),
        (4096, "float32", 64),
        (5120, "bfloat16", 128),
        (8, "float32", 1024),
    ],
)
def test_chunk_rows(hidden_size: int, hidden_dtype: str, chunk_rows: int) -> None:
    layout = SegmentLayout("a" * 64, hidden_size, hidden_dtype)
    assert (layout.chunk_rows, layout.shard_rows) == (chunk_rows, 64 * chunk_rows)


def test_short_reads_and_writes_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writev, preadv = os.writev, os.preadv
    monkeypatch.setattr(os, "writev", lambda fd, buffers: writev(fd, [buffers[0][:777]]))
    monkeypatch.setattr(
        os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:555]], offset)
    )
    rows_NE = random_rows(BF16, 3000)
    write(tmp_path / "s", BF16, rows_NE)
    assert read(tmp_path / "s", BF16, 10, 2990).tobytes() == rows_NE[10:2990].tobytes()


def test_a_flipped_byte_is_found_wherever_it_is(tmp_path: Path) -> None:
    rows_NE = random_rows(BF16, 1000)  # one chunk with padding, its crc, the index and its crc
    write(tmp_path / "s", BF16, rows_NE)
    reader, out_NE = SegmentReader(tmp_path / "s", BF16), np.empty_like(rows_NE)
    shard = tmp_path / "s" / "c" / "0" / "0"
    sound = shard.read_bytes()
    fd = os.open(shard, os.O_WRONLY)
    for position in (
        *range(0, BF16.stored_chunk_bytes - 4, 11),
        *range(BF16.stored_chunk_bytes - 4, len(sound)),
    ):
        os.pwrite(fd, bytes([sound[position] ^ (1 << position % 8)]), position)
        with pytest.raises(SegmentDamaged):
            reader.read(0, 1000, out_NE)
        os.pwrite(fd, sound[position : position + 1], position)
    os.close(fd)
    reader.read(0, 1000, out_NE)
    assert out_NE.tobytes() == rows_NE.tobytes()


def truncate(size: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, size)


def append_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def drop_a_middle_chunk(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: BF16.stored_chunk_bytes] + content[2 * BF16.stored_chunk_bytes :])


def swap_two_chunks_of_the_index(path: Path) -> None:
    """An index with a right crc32c that points elsewhere: zarr would return the wrong rows."""
    pairs = np.frombuffer(BF16.shard_index(3)[:-4], "<u8").reshape(-1, 2).copy()
    pairs[[0, 1]] = pairs[[1, 0]]
    path.write_bytes(
        path.read_bytes()[: 3 * BF16.stored_chunk_bytes] + pairs.tobytes() + stored_crc(pairs)
    )


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        truncate(0),
        truncate(1000),
        truncate(3 * BF16.stored_chunk_bytes),
        append_byte,
        drop_a_middle_chunk,
        swap_two_chunks_of_the_index,
        become_a_folder,
        Path.unlink,
        lambda path: shutil.rmtree(path.parents[1]),
    ],
)
def test_a_damaged_shard_is_never_zeros(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    rows_NE = random_rows(BF16, 3000)
    write(tmp_path / "s", BF16, rows_NE)
    assert read(tmp_path / "s", BF16, 0, 1).tobytes() == rows_NE[:1].tobytes()
    damage(tmp_path / "s" / "c" / "0" / "0")
    with pytest.raises(SegmentDamaged, match="computed again"):
        read(tmp_path / "s", BF16, 0, 1)


def test_a_shard_in_the_place_of_another_is_the_wrong_size(tmp_path: Path) -> None:
    write(tmp_path / "s", BF16, random_rows(BF16, 65536 + 10))
    shutil.copy(tmp_path / "s/c/0/0", tmp_path / "s/c/1/0")
    with pytest.raises(SegmentDamaged, match="bytes, needed"):
        read(tmp_path / "s", BF16, 65536, 65546)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [3001.0, 4]},
        {"shape": [-1, 4]},
        {"shape": [True, 4]},
        {"shape": []},
        {"shape": [3000, 5]},
        {"data_type": "float16"},
        {"fill_value": 1},
        {"codecs": []},
        {
            "attributes": {
                "hidden_dtype": "bfloat16",
                "teacher_fingerprint": "c" * 64,
                "layout": 1,
                "segment": "s",
            }
        },
        {
            "attributes": {
                "hidden_dtype": "bfloat16",
                "teacher_fingerprint": "a" * 64,
                "layout": 2,
                "segment": "s",
            }
        },
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1024, 4]}}},
    ],
)
def test_other_metadata_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    write(tmp_path / "s", BF16, random_rows(BF16, 3000))
    metadata = tmp_path / "s" / "zarr.json"
    SegmentReader(tmp_path / "s", BF16)
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | change))
    with pytest.raises(SegmentDamaged):
        SegmentReader(tmp_path / "s", BF16)


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", "1", "null", '{"shape": 3}', "[" * 50000, "\xff"]
)
def test_unreadable_metadata_is_refused(tmp_path: Path, text: str | None) -> None:
    write(tmp_path / "s", BF16, random_rows(BF16, 10))
    metadata = tmp_path / "s" / "zarr.json"
    metadata.unlink()
    if text is not None:
        metadata.write_text(text, "latin-1")
    with pytest.raises(SegmentDamaged):
        SegmentReader(tmp_path / "s", BF16)


def test_a_shard_that_shrinks_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "s", BF16, random_rows(BF16, 10))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: 0)
    with pytest.raises(SegmentDamaged, match="gave 0 of 8196 bytes"):
        read(tmp_path / "s", BF16, 0, 10)


def test_padding_is_zero(tmp_path: Path) -> None:
    # The last chunk's memory held row 0.
    write(tmp_path / "s", BF16, random_rows(BF16, 2010), pieces=(1000, 2000))
    padding = (tmp_path / "s/c/0/0").read_bytes()[
        BF16.stored_chunk_bytes + 986 * 8 : 2 * BF16.stored_chunk_bytes - 4
    ]
    assert padding == bytes(38 * 8)


def test_rows_beyond_the_end_are_damage(tmp_path: Path) -> None:
    write(tmp_path / "s", BF16, random_rows(BF16, 1000))  # rows 1000 to 1023 are padding
    with pytest.raises(SegmentDamaged, match="holds rows 0 to 1000"):
        read(tmp_path / "s", BF16, 990, 1001)


@pytest.mark.parametrize(("code", "raised"), [(errno.EIO, SegmentDamaged), (errno.EMFILE, OSError)])
def test_a_failing_disk_is_damage_and_a_failing_process_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, raised: type[Exception]
) -> None:
    write(tmp_path / "s", BF16, random_rows(BF16, 10))

    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(raised):
        read(tmp_path / "s", BF16, 0, 10)


def test_an_unsealed_or_aborted_segment_is_not_readable(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path / "s", BF16)
    writer.append(random_rows(BF16, 70000))
    with pytest.raises(SegmentDamaged):
        SegmentReader(tmp_path / "s", BF16)
    with pytest.raises(FileExistsError):
        SegmentWriter(tmp_path / "s", BF16)  # one writer
    writer.abort()
    assert not (tmp_path / "s").exists()
