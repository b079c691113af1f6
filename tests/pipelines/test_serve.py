"""`mtopd serve` and ``rollout.servers: auto``: what is started, where it is known, that nothing stays.

A stand-in takes the place of SGLang; tests/sglang starts the real one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from mtopd.config import ConsolidateConfig
from mtopd.config_file import to_yaml, validate
from mtopd.pipelines import serve
from mtopd.rollout.sglang_launch import read_urls, write_urls
from mtopd.run_dir import SERVERS_LOCK, RunDir
from mtopd.types import MtopdError
from tests.conftest import REPOSITORY
from tests.rollout.stand_in_server import starts, write
from tests.rollout.test_sglang_launch import alive, left, wait_for
from tests.small_models import save_model


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "student"
    save_model(folder, seed=1, layers=1)
    return folder


def config_of(root: Path, student: Path, **rollout: Any) -> dict[str, Any]:
    """A config of a run in ``root`` that samples with servers; nothing of its teacher is there."""
    return {
        "run_dir": str(root / "run"),
        "student": {"model": str(student)},
        "teachers": [{"name": "t0", "store": str(root / "absent"), "route": {}}],
        "data": {
            "sources": [{"name": "words", "path": str(root / "absent.jsonl")}],
            "context_length": 64,
            "max_response": 16,
        },
        "rollout": {"prompts_per_iteration": 8, "engine": "sglang", **rollout},
        "train": {"num_iterations": 1, "micro_batch_size": 4, "optimizer": {"lr": 1e-3}},
    }


@pytest.fixture
def values(student: Path, tmp_path: Path) -> dict[str, Any]:
    return config_of(
        tmp_path,
        student,
        servers="auto",
        python=str(write(tmp_path / "python")),
        num_servers=2,
        server_args={"device": "cpu"},  # nothing that imports torch
        patience_s=100,
    )


def started(values: dict[str, Any]) -> tuple[ConsolidateConfig, RunDir]:
    """The config, and its run directory as a start has prepared it."""
    config = validate(values, ConsolidateConfig, "file")
    run = RunDir(config.run_dir)
    with run.lock():
        run.take_generation()
    run.config.write_text(to_yaml(config))
    return config, run


def pids(values: dict[str, Any]) -> list[int]:
    """Of all servers so far, and of their workers."""
    found = starts(Path(values["run_dir"]).with_name("python"))
    return [pid for *pair, _ in found for pid in pair]


# -- the verb --------------------------------------------------------------------------------------
@pytest.fixture
def going(values: dict[str, Any], tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`mtopd serve` on the command line; its standard error is in a file of that name."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "mtopd.pipelines.cli", "serve", str(tmp_path / "config.yaml")]
    with open(tmp_path / "stderr", "w") as errors:
        process = subprocess.Popen(command, cwd=REPOSITORY, stderr=errors, stdin=subprocess.DEVNULL)
    yield process
    process.kill()
    process.wait()


def test_the_verb_keeps_servers_up_until_sigterm(
    values: dict[str, Any], going: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    config = validate(values, ConsolidateConfig, "file")
    run = RunDir(config.run_dir)
    wait_for(lambda: going.poll() is not None or read_urls(run.servers) is not None, 240)
    assert going.poll() is None, (tmp_path / "stderr").read_text()
    urls = read_urls(run.servers)
    assert urls is not None and len(urls) == 2
    assert json.loads((run.serving / "config.json").read_text())["num_hidden_layers"] == 1
    logs = sorted(path.name for path in run.servers.glob("*.log"))
    assert logs == ["0.log", "1.log"]
    assert f"--model-path {run.serving}" in (run.servers / "0.log").read_text()

    with pytest.raises(MtopdError, match=rf"is served by host .* pid {going.pid};"):
        serve.serve(config)
    before = len(pids(values))
    with serve.servers_of(config, run):  # a run takes these
        assert len(pids(values)) == before == len(alive(pids(values))) == 4
    with run.lock():  # a start prepares a folder that servers were in before
        run.take_generation()

    assert {*pids(values)} <= {c.pid for c in psutil.Process(going.pid).children(recursive=True)}
    going.send_signal(signal.SIGTERM)
    assert going.wait(60) == 0, (tmp_path / "stderr").read_text()
    assert left(pids(values)) == [] and read_urls(run.servers) is None
    assert run.holder(SERVERS_LOCK) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"servers": ["http://h:1"], "python": None, "num_servers": 1, "server_args": {}},
            "has addresses of servers",
        ),
        (
            {
                "engine": "embedded",
                "servers": [],
                "python": None,
                "num_servers": 1,
                "server_args": {},
                "patience_s": 600,
            },
            "has engine embedded",
        ),
        ({"python": "/nowhere/python"}, "python /nowhere/python is no program"),
        ({"server_args": {"tp-size": 2}}, "say rollout.server_tp"),
    ],
)
def test_what_the_verb_refuses(values: dict[str, Any], change: dict[str, Any], said: str) -> None:
    values["rollout"] |= change
    with pytest.raises(MtopdError, match=said):
        serve.serve(validate(values, ConsolidateConfig, "file"))
    assert pids(values) == []


def test_a_folder_of_somebody_else_and_every_address_are_refused(values: dict[str, Any]) -> None:
    config = validate(values, ConsolidateConfig, "file")
    with pytest.raises(MtopdError, match=r"--host 0\.0\.0\.0 is every address"):
        serve.serve(config, host="0.0.0.0")
    config.run_dir.mkdir()
    (config.run_dir / "thesis.tex").touch()
    with pytest.raises(MtopdError, match="is no run directory"):
        serve.serve(config)
    assert [path.name for path in config.run_dir.iterdir()] == ["thesis.tex"]


def test_servers_get_the_gpus_behind_those_of_the_ranks(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    values["rollout"] |= {"server_tp": 2}
    assert serve._check_gpus(validate(values, ConsolidateConfig, "file"), 4) is None, "on CPU"
    values["rollout"]["server_args"] = {}
    assert serve._check_gpus(validate(values, ConsolidateConfig, "file"), 4) == 4
    with pytest.raises(
        MtopdError, match=r"has 8 GPUs; .* need 4 beside the 5 of the ranks: lower one"
    ):
        serve._check_gpus(validate(values, ConsolidateConfig, "file"), 5)


# -- a run -----------------------------------------------------------------------------------------
def test_a_run_has_servers_while_it_lasts(values: dict[str, Any]) -> None:
    config, run = started(values)
    with pytest.raises(KeyError), serve.servers_of(config, run):
        assert read_urls(run.servers) is not None and len(alive(pids(values))) == 4
        assert run.holder(SERVERS_LOCK) is not None
        raise KeyError("a rank failed")
    assert left(pids(values)) == [] and read_urls(run.servers) is None


def test_what_servers_die_of_ends_the_start(values: dict[str, Any]) -> None:
    values["rollout"]["server_args"] |= {"behave": "fails"}
    config, run = started(values)
    with (
        pytest.raises(MtopdError, match=r"before it was ready: .*No module named 'sglang'"),
        serve.servers_of(config, run),
    ):
        raise AssertionError("ranks started")
    assert left(pids(values)) == []


HOLD = """
import sys, time
from pathlib import Path
from mtopd.config import ConsolidateConfig
from mtopd.config_file import load_config
from mtopd.pipelines.serve import servers_of
from mtopd.run_dir import RunDir
run = RunDir(Path(sys.argv[1]))
with servers_of(load_config(run.config, [], ConsolidateConfig), run):
    print("up", flush=True)
    time.sleep(300)
"""


def test_a_killed_launcher_leaves_no_server(values: dict[str, Any]) -> None:
    _, run = started(values)
    command = [sys.executable, "-c", HOLD, str(run.path)]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert launcher.stdout is not None and launcher.stdout.readline() == "up\n"
        everyone = [p.pid for p in psutil.Process(launcher.pid).children(recursive=True)]
        assert {*pids(values)} < {*everyone}, "servers, workers and who keeps them up"
        os.kill(launcher.pid, signal.SIGKILL)
        wait_for(lambda: alive(everyone) == [], 40)
        assert read_urls(run.servers) is None, "they were ended in order"
    finally:
        launcher.kill()
        launcher.wait()


def test_the_wait_for_servers_of_another_process_is_bounded(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    values["rollout"]["patience_s"] = 1
    config, run = started(values)
    enter: Callable[[], object] = lambda: serve.servers_of(config, run).__enter__()  # noqa: E731
    with (
        run.lock(SERVERS_LOCK),
        pytest.raises(MtopdError, match=r"not ready after 1 s \(rollout\."),
    ):
        enter()
    holders = iter([f"host h pid {os.getpid()}"])
    monkeypatch.setattr(RunDir, "holder", lambda *_: next(holders, None))
    with pytest.raises(MtopdError, match="ended before its servers were ready"):
        enter()
    monkeypatch.undo()
    write_urls(run.servers, ["http://127.0.0.1:9"])
    began = time.monotonic()
    with (
        run.lock(SERVERS_LOCK),
        pytest.raises(MtopdError, match=r"http://127\.0\.0\.1:9 does not answer"),
    ):
        enter()
    assert time.monotonic() - began < 30
    (run.servers / "servers.json").write_text('{"schema": 7}')
    with run.lock(SERVERS_LOCK), pytest.raises(MtopdError, match="has schema 7"):
        enter()
    assert pids(values) == []
