"""`mtopd cache ls | verify | gc`, through the command line's own entry."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cache_samples import MATH, fill, flip

from mtopd.files import write_json
from mtopd.pipelines import cli
from mtopd.run_dir import RunDir


def mtopd(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["mtopd", *arguments])
    monkeypatch.setenv("COLUMNS", "300")
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def make_run(path: Path, *names: str) -> Path:
    path.mkdir()
    (path / "config.yaml").write_text("{}")
    teachers = [
        {"index": index, "name": name, "fingerprint": MATH}
        for index, name in enumerate(names or ("maths",))
    ]
    write_json(path / "manifest.json", {"schema": 2, "config": {}, "teachers": teachers})
    return RunDir(path).hidden_cache(3)


def test_a_damaged_sample_is_shown_named_mended_and_collected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    root = make_run(run)
    segment = fill(root, 0, 1)
    assert mtopd(monkeypatch, "cache", "verify", str(run)) == 0
    flip(segment / "c/0/0", 20)
    capfd.readouterr()
    assert mtopd(monkeypatch, "cache", "verify", str(run)) == 2
    found = capfd.readouterr()
    for sample_id in (0, 1):
        assert f"iteration 3: sample {sample_id}: no sound copy" in found.err
    assert "crc32c" in found.err and found.err.count("error:") == 1 and "teacher-pass" in found.err

    (segment / "c/0/0").write_bytes(b"")
    assert mtopd(monkeypatch, "cache", "ls", str(run)) == 0
    (line,) = [line for line in capfd.readouterr().out.splitlines() if "maths" in line]
    assert line.replace("\u2502", " ").split() == ["3", "maths", "2", "100", "9,224", "1", "1"]

    mended = fill(root, 0, 1, generation=1)
    with RunDir(run).lock():
        assert mtopd(monkeypatch, "cache", "gc", str(run)) == 2
        assert "in use" in capfd.readouterr().err and segment.is_dir()
    assert mtopd(monkeypatch, "cache", "gc", str(run)) == 0
    assert f"iteration 3: segment {segment.name} removed" in capfd.readouterr().out
    assert list(root.glob("t/*/seg/*")) == [mended]
    assert mtopd(monkeypatch, "cache", "verify", str(run)) == 0


def test_the_rows_of_one_store_bear_the_names_of_all_its_teachers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fill(make_run(tmp_path / "run", "sums", "proofs"), 0, 1)
    assert mtopd(monkeypatch, "cache", "ls", str(tmp_path / "run")) == 0
    assert "sums, proofs" in capfd.readouterr().out


def test_a_folder_that_is_no_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for verb in ("ls", "verify", "gc"):
        assert mtopd(monkeypatch, "cache", verb, str(tmp_path)) == 2
    assert not list(tmp_path.iterdir())
