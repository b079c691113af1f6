"""Rows of another harness: every file format gives the same rows, and whatever is wrong is named."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mtopd.trajectories.rows import Row, read_rows
from mtopd.types import MtopdError
from tests.trajectories.row_files import row, write_rows

FULL = row(
    3, route={"domain": "a"}, teacher_prompt_ids=[4, 5], reward=0.5, rollout_log_probs=[-0.1, -1, 0]
)


@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.gz", "r.JSONL.zst", "r.parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    rows = [row(0), FULL, *(row(k) for k in range(4, 200))]
    path = write_rows(tmp_path / name, rows)
    seen: list[int] = []
    found = [*read_rows(path, at=seen.append)]
    first = 0 if name.endswith("parquet") else 1
    assert [number for number, _ in found] == list(range(first, first + len(rows)))
    assert [found_row for _, found_row in found] == [Row(**values) for values in rows]
    assert sorted(seen) == seen and seen[-1] == path.stat().st_size

    skipped = [*read_rows(path, skip=100)]
    assert [found_row for _, found_row in skipped] == [None] * 100 + [r for _, r in found[100:]]
    assert [number for number, _ in skipped] == [number for number, _ in found]


def test_a_number_may_be_written_with_more_digits_than_it_has(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", [row(0, rollout_log_probs=[-0.5, -0.25, -0.125])])
    path.write_text(path.read_text().replace("-0.25", "-0.69314718055994528623"))
    ((_, found),) = read_rows(path)
    assert isinstance(found, Row) and found.rollout_log_probs == [-0.5, -0.6931471805599453, -0.125]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"extra": 1}, ("extra", "is no column of mtopd-trajectory-1; leave it out")),
        ({"prompt_ids": None}, ("prompt_ids", "is missing")),
        ({"format": "mtopd-trajectory-2"}, ("format", "'mtopd-trajectory-2'; this version")),
        ({"sample_id": True}, ("sample_id", "is a boolean; needed is an integer")),
        ({"sample_id": "7"}, ("sample_id", "is text; needed is an integer")),
        ({"prompt_ids": "56"}, ("prompt_ids", "is text; needed is a list of integers")),
        ({"prompt_ids": [[5, 6]]}, ("prompt_ids", "a list with a list at [0]")),
        ({"response_ids": [8, 9.0, 1]}, ("response_ids", "a list with a float at [")),
        ({"loss_mask": [True, False, True]}, ("loss_mask", "a list with a boolean at [0]")),
        ({"rollout_log_probs": [-1, None, -1]}, ("rollout_log_probs", "with null at [1]")),
        ({"route": {"domain": ["a"]}}, ("route", "an object that holds a list")),
        ({"reward": "good"}, ("reward", "is text; needed is a number")),
        ({"teacher": 0}, ("teacher", "is an integer; needed is text")),
    ],
)
@pytest.mark.parametrize("name", ["r.jsonl", "r.parquet"])
def test_every_wrong_column_is_named(tmp_path: Path, name: str, changes, problem) -> None:
    path = write_rows(tmp_path / name, [row(0, **changes)])
    ((_, found),) = read_rows(path)
    assert isinstance(found, list)
    assert [column for column, _ in found] == [problem[0]]
    assert problem[1] in found[0][1]


def test_all_that_is_wrong_with_a_row_is_named(tmp_path: Path) -> None:
    wrong = row(0, extra=1, prompt_ids=None, sample_id="0")
    ((_, found),) = read_rows(write_rows(tmp_path / "r.jsonl", [wrong]))
    assert [column for column, _ in found] == ["sample_id", "extra", "prompt_ids"]


def test_a_damaged_line_does_not_hide_those_behind_it(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", [row(0), row(1), row(2)])
    lines = path.read_text().splitlines()
    lines[1] = lines[1].replace("-0.5", "-Infinity")
    path.write_text("\n\n".join(lines))
    found = dict(read_rows(path))
    assert isinstance(found[1], Row) and isinstance(found[5], Row)
    assert [column for column, _ in found[3]] == ["JSON"] and "Infinity" in found[3][0][1]


def test_types_of_a_table_that_hold_the_same_numbers_are_taken(tmp_path: Path) -> None:
    """Large lists, 64-bit integers, half floats, a map, text in a dictionary."""
    table = pa.table(
        {
            **{n: pa.array([v]) for n, v in FULL.items()},
            "prompt_ids": pa.array([FULL["prompt_ids"]], pa.large_list(pa.uint64())),
            "loss_mask": pa.array([FULL["loss_mask"]], pa.list_(pa.int8(), 3)),
            "rollout_log_probs": pa.array([[-0.5, -1.0, 0.0]], pa.list_(pa.float16())),
            "route": pa.array([[("domain", "a")]], pa.map_(pa.string(), pa.string())),
            "teacher": pa.array(["t0"]).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "r.parquet")
    ((_, found),) = read_rows(tmp_path / "r.parquet")
    assert found == Row(**{**FULL, "rollout_log_probs": [-0.5, -1.0, 0.0]})


@pytest.mark.parametrize("name", ["r.jsonl.gz", "r.parquet"])
def test_a_file_that_breaks_off_is_named(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path / name, [row(k) for k in range(50)])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(MtopdError, match=name):
        list(read_rows(path))


def test_files_of_another_format_are_refused(tmp_path: Path) -> None:
    for name in ("r.json", "r.csv"):
        (tmp_path / name).write_text("[]")
        with pytest.raises(MtopdError, match=rf"{name} is none of \.jsonl"):
            list(read_rows(tmp_path / name))
    with pytest.raises(MtopdError, match="does not exist"):
        list(read_rows(tmp_path / "r.jsonl"))
