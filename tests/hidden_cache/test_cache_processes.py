"""What only real processes and a real full disk show."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY, on_small_disk
from tests.hidden_cache import kill_writers


def test_writers_killed_at_random_instants(tmp_path: Path) -> None:
    line = kill_writers.run(5, tmp_path, seed=7)
    assert line.startswith("cache writers: 5 SIGKILLs")


def test_a_full_disk_is_named_and_spares_what_was_committed(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = [*on_small_disk(disk, megabytes=8), sys.executable, "-W", "ignore"]
    command += ["-m", "tests.hidden_cache.full_disk", str(disk)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=REPOSITORY, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.startswith("full disk: refused "), done.stdout
