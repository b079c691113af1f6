"""Damage on disk is a miss with a cause, never another row."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_samples import CODE, MATH, fill, flip, get, open_writer, put, row_key_of, rows_of

from mtopd.hidden_cache import (
    CacheMiss,
    HiddenCacheReader,
    Read,
    Recovery,
    SegmentDamaged,
    recover,
)
from mtopd.hidden_cache.folder import load_teacher
from mtopd.hidden_cache.index import IndexRow, dump_index, load_index
from mtopd.types import MtopdError


def break_data(segment: Path) -> None:
    flip(segment / "c/0/0", 20)


def break_metadata(segment: Path) -> None:
    (segment / "zarr.json").write_text("{}")


@pytest.mark.parametrize(
    "damage", [break_data, break_metadata, lambda segment: (segment / "c/0/0").unlink()]
)
def test_damage_is_missing_with_its_cause_and_is_mended_by_writing_again(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    root = tmp_path / "c"
    segment = fill(root, 0, 1)
    fill(root, 2)
    damage(segment)
    reader = HiddenCacheReader(root)
    causes = reader.missing(map(row_key_of, (0, 1, 2)))
    assert list(causes) == [row_key_of(0), row_key_of(1)] and causes == reader.verify()
    assert all(str(segment) in cause for cause in causes.values())
    with pytest.raises(CacheMiss, match="sample 0"):
        get(reader, 0)
    assert np.array_equal(get(reader, 2), rows_of(2))

    for generation in range(1, 4):  # whichever name sorts first, the sound copy is found
        fill(root, 0, 1, generation=generation)
    reader = HiddenCacheReader(root)
    assert reader.verify() == {}
    assert np.array_equal(get(reader, 0), rows_of(0))
    assert recover(root) == Recovery()  # a damaged segment is named, so it is no orphan


def test_damage_in_one_chunk_costs_the_samples_of_that_chunk(tmp_path: Path) -> None:
    segment = fill(tmp_path / "c", 0, 1, 2, n=1024)
    flip(segment / "c/0/0", 1024 * 4 * 2 + 4 + 10)  # in the second chunk
    assert list(HiddenCacheReader(tmp_path / "c").verify()) == [row_key_of(1)]


def test_damage_of_a_chunk_read_for_many_is_a_miss_or_the_next_copy(tmp_path: Path) -> None:
    segment = fill(tmp_path / "c", 0, 1, 2)
    flip(segment / "c/0/0", 20)

    def read_all(reader: HiddenCacheReader) -> list[np.ndarray]:
        entries = [reader.lookup(*row_key_of(sample_id)) for sample_id in range(3)]
        reads = [
            Read(entry, 0, 50, np.zeros((50, 4), np.uint16))
            for entry in entries
            if entry is not None
        ]
        reader.read_many(reads)
        return [read.out_NE for read in reads]

    with pytest.raises(CacheMiss, match="sample 0"):
        read_all(HiddenCacheReader(tmp_path / "c"))
    for generation in range(1, 4):
        fill(tmp_path / "c", 0, 1, 2, generation=generation)
    for sample_id, rows in enumerate(read_all(HiddenCacheReader(tmp_path / "c"))):
        assert np.array_equal(rows, rows_of(sample_id))


def test_a_sound_segment_in_the_place_of_another_is_found(tmp_path: Path) -> None:
    first, second = fill(tmp_path / "c", 0), fill(tmp_path / "c", 1)
    os.replace(second / "c/0/0", first / "c/0/0")  # every zarr checksum holds
    reader = HiddenCacheReader(tmp_path / "c")
    assert "not the one zarr.json names" in reader.verify()[row_key_of(0)]


def exchange(first: Path, second: Path) -> None:
    aside = first.with_name("aside")
    os.rename(first, aside)
    os.rename(second, first)
    os.rename(aside, second)


@pytest.mark.parametrize("n", [50, 2000])
def test_exchanged_segments_are_found_and_named_whatever_is_read(tmp_path: Path, n: int) -> None:
    root = tmp_path / "c"
    first, second = fill(root, 0), fill(root, 1, n=n)
    exchange(first, second)
    with HiddenCacheReader(root) as reader:
        causes = reader.verify()
        assert str(first) in causes[row_key_of(0)] and str(second) in causes[row_key_of(1)]
        entry = reader.lookup(*row_key_of(0))
        assert entry is not None
        with pytest.raises(CacheMiss, match="not describe this segment"):
            # A share has no checksum of its own.
            reader.read_rows(entry, 3, 5, np.empty((2, 4), np.uint16))


def test_a_segment_that_its_index_describes_otherwise_is_found(tmp_path: Path) -> None:
    root = tmp_path / "c"
    segment = fill(root, 0)
    (path,) = root.glob("t/*/index/*.arrow")
    rows = load_index(path, load_teacher(root / "t" / MATH[:16]))
    path.write_bytes(dump_index([row._replace(segment_bytes=10**6) for row in rows], MATH))
    with HiddenCacheReader(root) as reader:
        assert "zarr.json gives" in reader.verify()[row_key_of(0)] and reader.broken_segments() == [
            segment
        ]


def test_exchanged_teachers_are_found_and_named(tmp_path: Path) -> None:
    root = tmp_path / "c"
    with open_writer(root) as writer:
        put(writer, 0)
        put(writer, 1, teacher=CODE)
    math, code = (root / "t" / name[:16] for name in (MATH, CODE))
    exchange(math / "seg", code / "seg")
    with HiddenCacheReader(root) as reader:
        causes = reader.verify()
        assert str(math) in causes[row_key_of(0)] and str(code) in causes[row_key_of(1, CODE)]
    exchange(math / "seg", code / "seg")
    exchange(math / "index", code / "index")
    with HiddenCacheReader(root) as reader:
        assert len(reader.refused) == 2 and all(
            path.parents[1] in (math, code) for path in reader.refused
        )
        assert reader.entries() == []


def test_flipped_bytes_of_an_index_are_harmless(tmp_path: Path) -> None:
    """Refused whole, or (padding) of no effect: never another row."""
    root = tmp_path / "c"
    segment = fill(root, 0)
    fill(root, 1)
    index = root / "t" / MATH[:16] / "index" / f"{segment.name}.arrow"
    sound = index.read_bytes()
    logging.disable(logging.WARNING)
    refused = 0
    try:
        for position in range(0, len(sound), 7):
            index.write_bytes(
                sound[:position] + bytes([sound[position] ^ 4]) + sound[position + 1 :]
            )
            reader = HiddenCacheReader(root)
            assert np.array_equal(get(reader, 1), rows_of(1))
            if reader.refused:
                assert list(reader.refused) == [index]
                refused += 1
            else:
                assert np.array_equal(get(reader, 0), rows_of(0))
    finally:
        logging.disable(logging.NOTSET)
    assert refused > len(sound) // 28


@pytest.mark.parametrize("content", [b"", b"ARROW1\0\0", b"x" * 5000])
def test_an_unreadable_index_is_logged_and_not_there(
    tmp_path: Path, caplog: Any, content: bytes
) -> None:
    root = tmp_path / "c"
    segment = fill(root, 0)
    fill(root, 1)
    index = root / "t" / MATH[:16] / "index" / f"{segment.name}.arrow"
    index.write_bytes(content)
    with HiddenCacheReader(root) as reader:
        assert list(reader.refused) == [index] and str(index) in caplog.text
        assert list(reader.missing(map(row_key_of, (0, 1)))) == [row_key_of(0)]
    assert recover(root) == Recovery()  # its rows may be sound


def test_an_index_of_another_teacher_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "c"
    with open_writer(root) as writer:
        put(writer, 0)
        put(writer, 1, teacher=CODE)
    (index,) = (root / "t" / CODE[:16] / "index").iterdir()
    os.replace(index, root / "t" / MATH[:16] / "index" / index.name)
    assert list(HiddenCacheReader(root).missing([row_key_of(0), row_key_of(1, CODE)])) == [
        row_key_of(1, CODE)
    ]


GOOD = IndexRow(b"k" * 32, 0, 0, "dp0-0-0123abcd", 0, 10, 0, 1, 10_000)


@pytest.mark.parametrize(
    "bad",
    [
        {"segment": "../../../../outside-0-0123abcd"},
        {"segment": "/outside-0-0123abcd"},
        {"segment": ".."},
        {"segment": ""},
        {"segment": "a/b-0-0123abcd"},
        {"segment": "dp0-0-0123abcd\n"},
        {"row": -1},
        {"n_tokens": -1},
        {"row": 1 << 62},
        {"n_tokens": 1 << 62},
        {"segment_bytes": 79},
    ],
)
def test_an_index_that_points_outside_is_refused_whole(tmp_path: Path, bad: dict[str, Any]) -> None:
    root = tmp_path / "c"
    fill(root, 0)
    path = root / "t" / MATH[:16] / "index" / "forged.arrow"
    path.write_bytes(dump_index([GOOD], MATH))
    assert not HiddenCacheReader(root).refused
    path.write_bytes(dump_index([GOOD, GOOD._replace(**bad)], MATH))
    reader = HiddenCacheReader(root)
    assert "outside" in reader.refused[path] and reader.lookup(b"k" * 32, 0, 0) is None
    assert reader.missing([row_key_of(0)]) == {}


def test_an_index_with_empty_fields_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "c", 0)
    path = tmp_path / "c" / "t" / MATH[:16] / "index" / "forged.arrow"
    path.write_bytes(dump_index([GOOD._replace(row=None)], MATH))  # type: ignore[arg-type]
    assert "empty fields" in HiddenCacheReader(tmp_path / "c").refused[path]


def test_a_damaged_teacher_record_hides_its_samples(tmp_path: Path) -> None:
    fill(tmp_path / "c", 0)
    record = tmp_path / "c" / "t" / MATH[:16] / "teacher.json"
    for text in (
        "",
        "[]",
        "{}",
        record.read_text().replace("4", '"4"'),
        record.read_text().replace("a1", "a2"),
    ):
        record.write_text(text)
        reader = HiddenCacheReader(tmp_path / "c")
        assert len(reader.refused) == 1 and reader.lookup(*row_key_of(0)) is None


def test_a_teacher_folder_under_another_name_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "c", 0)
    os.rename(tmp_path / "c" / "t" / MATH[:16], tmp_path / "c" / "t" / CODE[:16])
    assert len(HiddenCacheReader(tmp_path / "c").refused) == 1


def test_damage_and_miss_are_errors_a_user_can_act_on() -> None:
    assert issubclass(SegmentDamaged, MtopdError) and issubclass(CacheMiss, MtopdError)
