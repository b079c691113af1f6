"""``make smoke`` from nothing: the real stages with few steps; it checks counts and files, not
accuracy.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


def smoke(folder: Path) -> str:
    command = [sys.executable, str(REPOSITORY / "launch" / "demo.py"), "smoke"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def check_specialist(run: Path, num_steps: int) -> None:
    """It ends with a report of its own, whose accuracy is a line of its metrics, too."""
    report = json.loads((run / "report.json").read_text())
    assert report["finished"] and report["train_steps"] == num_steps
    assert report["loss"]["last"] < report["loss"]["first"]
    assert report["positions"] > report["train_tokens"] > 0 and report["peak_host_bytes"] > 0
    assert "<html" in (run / "report.html").read_text()
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    (found,) = [line for line in lines if line["kind"] == "evaluation"]
    assert found["accuracy"] == report["accuracy"] and found["stopped"] == report["stopped"]
    assert "rot" in report["accuracy"]


def test_the_smoke_demo_ends_with_a_true_report(tmp_path: Path) -> None:
    output = smoke(tmp_path)
    assert (
        output.strip().splitlines()[-1]
        == "smoke done: runs/smoke/report.json, runs/smoke/report.html"
    )
    report = json.loads((tmp_path / "runs" / "smoke" / "report.json").read_text())
    assert report["finished"] and report["train_steps"] == 32 and report["waves"] == 1
    assert report["peak_resident_heads"] == 1
    assert all(check["ok"] for check in report["checks"].values()), report["checks"]
    for teacher in report["teachers"]:
        assert teacher["head_loads"] == 32
        assert teacher["bytes_read"] == teacher["stored_bytes"] > 0, (
            "three small teachers fit in host_budget: read once"
        )
        assert (
            teacher["bytes_kept"] == 7 * teacher["stored_bytes"]
            and teacher["probe"] == "transformers"
        )
    assert report["reverse_kl"]["last"] < 0.8 * report["reverse_kl"]["first"]
    assert set(report["domains"]) == {"rot", "rev", "spir"}
    page = (tmp_path / "runs" / "smoke" / "report.html").read_text()
    assert "<html" in page and "http://" not in page and "https://" not in page

    for name in ("base", "rot"):
        check_specialist(tmp_path / "runs" / "smoke" / name, {"base": 60, "rot": 30}[name])

    started = time.monotonic()
    assert "smoke done" in smoke(tmp_path)  # every stage is skipped: its sealed output is there
    assert json.loads((tmp_path / "runs" / "smoke" / "report.json").read_text()) == report
    assert (
        len(
            (tmp_path / "runs" / "smoke" / "consolidate" / "metrics.jsonl").read_text().splitlines()
        )
        > 32
    )
    print(f"second run took {time.monotonic() - started:.0f} s")
