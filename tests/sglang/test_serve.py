"""Servers that the product starts itself: `mtopd serve`, ``rollout.servers: auto``.

``rollout.python`` is a script that runs SGLang with what a CPU lacks (tests/support/sglang_cpu).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from mtopd.pipelines.serve import servers_of
from mtopd.rollout.sglang_launch import read_urls
from mtopd.run_dir import RunDir
from tests.conftest import REPOSITORY
from tests.integration.test_kill_and_resume import make_workplace
from tests.pipelines.test_serve import config_of, started
from tests.rollout.test_sglang_launch import left, wait_for
from tests.sglang.conftest import CONTEXT, EngineUnderTest, Place
from tests.sglang.test_main_loop import SMALL, check_learns
from tests.support.sglang_servers import PYTHON

pytestmark = pytest.mark.timeout(1800)  # a server alone imports for half a minute, or longer
_SCRIPT = """#!/bin/sh
export OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo
exec {python} -u {launch} "$@"
"""


def on_cpu(folder: Path) -> dict[str, Any]:
    """Keys of a config's rollout for one server on this CPU."""
    script = folder / "python"
    launch = REPOSITORY / "tests" / "support" / "sglang_cpu" / "launch.py"
    script.write_text(_SCRIPT.format(python=PYTHON, launch=launch))
    script.chmod(0o755)
    arguments = {
        "device": "cpu",
        "attention-backend": "torch_native",
        "cuda-graph-backend-decode": "disabled",
        "cuda-graph-backend-prefill": "disabled",
        "mem-fraction-static": 0.2,
        "max-total-tokens": 8192,
        "max-running-requests": 64,
    }
    own = {"servers": "auto", "python": str(script), "server_args": arguments}
    return {**own, "patience_s": 900}


def sglang_processes() -> list[int]:
    """Of all children of this process."""
    return [process.pid for process in psutil.Process().children(recursive=True)]


def test_a_server_takes_weights_dies_and_takes_them_again(place: Place, tmp_path: Path) -> None:
    values = config_of(tmp_path, place.student, **on_cpu(tmp_path))
    values["data"]["context_length"] = CONTEXT
    config, run = started(values)
    os.symlink(place.serving, run.serving)
    with servers_of(config, run):
        urls = read_urls(run.servers)
        assert urls is not None
        engine = EngineUnderTest(place, urls, patience_s=900)
        try:
            engine.give(place.student, "1")
            assert 0 < engine.probe_difference < 1e-5
            (server,) = [
                p for p in psutil.Process().children(True) if "launch.py" in str(p.cmdline())
            ]
            before = [server.pid, *(p.pid for p in server.children(recursive=True))]
            assert len(before) == 3, "its scheduler and its detokenizer"
            os.kill(server.pid, signal.SIGKILL)
            assert left(before) == []
            log = run.servers / "0.log"
            wait_for(lambda: log.read_text().count("fired up and ready") == 2, 900)
            engine.give(place.other, "2")
            assert 0 < engine.probe_difference < 1e-5
        finally:
            engine.close()
        everyone = sglang_processes()
    assert len(everyone) >= 4 and left(everyone) == []


def test_a_run_starts_its_servers_and_ends_them(tmp_path: Path) -> None:
    make_workplace(tmp_path)
    path = tmp_path / "config.yaml"
    values = yaml.safe_load(path.read_text())
    values["rollout"] |= {"engine": "sglang", **on_cpu(tmp_path)}
    del values["data"]["sources"][0]["eval_path"]
    path.write_text(yaml.safe_dump(values))
    run = tmp_path / "run"
    command = [sys.executable, "-m", "mtopd.pipelines.cli", "consolidate", str(path)]
    command += [f"run_dir={run}", *SMALL]
    with open(tmp_path / "said", "w") as file:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=file, stderr=file)
        seen: set[int] = set()

        def ended() -> bool:
            seen.update(sglang_processes())
            return process.poll() is not None

        wait_for(ended, 1500)
    assert process.returncode == 0, (tmp_path / "said").read_text()[-4000:]
    check_learns(run)
    assert left(sorted(seen)) == [] and read_urls(RunDir(run).servers) is None
    assert "--load-format dummy" in (run / "servers" / "0.log").read_text()
