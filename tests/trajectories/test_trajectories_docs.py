"""docs/trajectories.md names every column, and its ten lines write rows that can be imported."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from mtopd.trajectories.rows import OPTIONAL, REQUIRED, ROW_FILES, ROW_FORMAT, Row, read_rows
from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "trajectories.md").read_text()


def test_every_column_and_ending_is_described() -> None:
    described = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", PAGE, re.MULTILINE))
    assert described.keys() == REQUIRED.keys() | OPTIONAL.keys()
    assert {n for n, kind in described.items() if "optional" in kind} == OPTIONAL.keys()
    for text in (ROW_FORMAT, *ROW_FILES):
        assert f"`{text}`" in PAGE


def test_the_example_writes_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    sample = SimpleNamespace(
        teacher="math", prompt=[5], tokens=[6, 1], mask=[1, 1], log_probs=[-1.0, -0.5], ended=True
    )
    exec(code, {"samples": [sample, sample]})
    found = [row for _, row in read_rows(tmp_path / "rows.jsonl.gz")]
    assert all(isinstance(row, Row) for row in found)
    assert [(row.sample_id, row.finish_reason, row.teacher) for row in found] == [
        (0, "stop", "math"),
        (1, "stop", "math"),
    ]
