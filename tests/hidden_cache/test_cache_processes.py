"""What only real processes and a real full disk show."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.hidden_cache import kill_writers

FULL_DISK = """
import subprocess, sys
from pathlib import Path
import numpy as np
from cache_samples import fill, get, open_writer, put, request_of, rows_of
from mtopd.hidden_cache import HiddenCacheReader, recover

disk = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], check=True)
root = disk / "c"
fill(root, 0, n=20000)
try:
    with open_writer(root) as writer:
        for sample_id in range(1, 50):
            put(writer, sample_id, n=20000)
    raise SystemExit("the disk was not full")
except OSError as error:
    print(error)
assert len(list(root.glob("t/*/seg/*"))) == 1, "the failed segment holds disk space"
recover(root)
fill(root, 1, n=20000)
with HiddenCacheReader(root) as reader:
    assert reader.verify() == {} and reader.refused == {} and len(reader.entries()) == 2
    for sample_id in (0, 1):
        assert np.array_equal(get(reader, sample_id), rows_of(sample_id, n=20000))
"""


def test_writers_killed_at_random_instants(tmp_path: Path) -> None:
    line = kill_writers.run(5, tmp_path, seed=7)
    assert line.startswith("cache writers: 5 SIGKILLs")


def test_a_full_disk_is_an_error_and_harms_nothing_earlier(tmp_path: Path) -> None:
    command = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", FULL_DISK, str(tmp_path)]
    process = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120, check=False
    )
    assert process.returncode == 0, process.stderr
    assert "No space left on device" in process.stdout
