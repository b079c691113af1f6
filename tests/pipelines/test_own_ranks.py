"""Ranks that the launcher starts itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

START = """
from pathlib import Path
from mtopd.pipelines.own_ranks import launch
launch(1, "layouts:no_such_function", Path("."), 0)
"""


KERNELS = """
import sys, torch, types
from pathlib import Path
from mtopd.kernels.rows import select_row_kernels
from mtopd.pipelines.own_ranks import call
body = lambda run_dir, generation: select_row_kernels("auto", "cpu", torch.float64)
sys.modules["mtopd.pipelines.body"] = types.SimpleNamespace(main=body)
call("body:main", Path("."), 0)
"""


def test_a_rank_says_nothing_of_what_works(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KERNELS], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_folder_mtopd_where_one_stands_is_not_taken_for_the_package(tmp_path: Path) -> None:
    """As in a clone whose package was installed from it: there mtopd/ has no mtopd.pipelines."""
    (tmp_path / "mtopd").mkdir()
    (tmp_path / "mtopd" / "__init__.py").write_text("raise ImportError('found where one stands')")
    done = subprocess.run(
        [sys.executable, "-P", "-c", START],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "has no attribute 'no_such_function'" in done.stderr
    assert "found where one stands" not in done.stderr
