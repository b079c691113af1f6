"""Servers as child processes: command lines, ports, deaths, and that nothing is left of them.

A stand-in takes the place of SGLang where processes alone matter; tests/sglang starts the real one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from mtopd.child_process import with_parent
from mtopd.rollout import sglang_launch
from mtopd.rollout.sglang_command import Launch, command
from mtopd.rollout.sglang_launch import run_servers
from mtopd.types import MtopdError
from tests.rollout.stand_in_server import starts, write


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    (tmp_path / "logs").mkdir()
    python = write(tmp_path / "python")
    serving = tmp_path / "serving"
    return Launch(python, serving, tmp_path / "logs", "float32", context_length=100, patience_s=30)


def alive(pids: Sequence[int]) -> list[int]:
    """Those of ``pids`` that run."""
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
    return found


def left(pids: Sequence[int]) -> list[int]:
    """Those that still run after a moment for the kernel to end them."""
    deadline = time.monotonic() + 5
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    return alive(pids)


def wait_for(happened: Callable[[], bool], limit_s: float = 30) -> None:
    deadline = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def run(launch: Launch, scenario: Callable[[list[str], list[str]], None]) -> list[str]:
    """Lines said while ``scenario(urls, lines)`` runs beside the servers, from when they are ready."""
    stop, lines, failed = threading.Event(), list[str](), list[BaseException]()

    def play(urls: list[str]) -> None:
        try:
            scenario(urls, lines)
        except BaseException as error:
            failed.append(error)
        stop.set()

    def on_ready(urls: list[str]) -> None:
        threading.Thread(target=play, args=(urls,), daemon=True).start()

    run_servers(launch, stop, on_ready, lines.append)
    if failed:
        raise failed[0]
    return lines


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


# -- the command line ------------------------------------------------------------------------------
def test_the_command_line_is_what_the_client_needs(launch: Launch) -> None:
    arguments = {"mem_fraction_static": 0.8, "attention-backend": "fa3", "cuda-graph-bs": [1, 2]}
    launch = replace(launch, arguments={**arguments, "enable_metrics": True}, tp=4, first_gpu=8)
    found = command(launch, 1, 30001)
    assert found[:3] == [str(launch.python), "-m", "sglang.launch_server"]
    text = " ".join(found)
    assert "--mem-fraction-static 0.8 --attention-backend fa3 --cuda-graph-bs 1 2" in text
    assert "--enable-metrics --model-path" in text, "a flag alone for true"
    needed = ["--load-format dummy", "--skip-tokenizer-init", "--incremental-streaming-output"]
    needed += ["--enable-deterministic-inference", "--dtype float32", "--tp-size 4"]
    needed += [
        "--base-gpu-id 12",
        "--host 127.0.0.1 --port 30001",
        f"--model-path {launch.serving}",
    ]
    assert [flag for flag in needed if flag not in text] == []
    length = int(found[found.index("--context-length") + 1])
    assert length >= 100 + 7, "SGLang keeps as many positions for itself"
    unseeded = command(replace(launch, seeded=False, first_gpu=None), 0, 1)
    assert not {"--enable-deterministic-inference", "--base-gpu-id"} & {*unseeded}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"dtype": "bfloat16"}, "it is student.dtype"),
        ({"tp": 2}, "say rollout.server_tp"),
        ({"skip_tokenizer_init": True}, "mtopd sets it"),
        ({"load-form": "auto"}, "mtopd sets it"),  # SGLang takes it for --load-format
        ({"trust_remote_code": True}, "runs code"),
        ({"--log-level": "info"}, "without the dashes"),
        ({"enable-metrics": False}, "is left out"),
        ({"enable-metrics": None}, "is null: a flag"),
        ({"cuda-graph-bs": []}, "is left out"),
        ({"cuda-graph-bs": [1, True]}, "is left out"),
    ],
)
def test_flags_that_a_config_must_not_give(
    launch: Launch, arguments: dict[str, object], said: str
) -> None:
    with pytest.raises(MtopdError, match=said) as caught:
        command(replace(launch, arguments=arguments), 0, 1)
    assert f"rollout.server_args.{next(iter(arguments))}" in str(caught.value)


# -- ports -----------------------------------------------------------------------------------------
def test_a_port_that_another_has_is_refused_before_anything_starts(launch: Launch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        with pytest.raises(MtopdError, match=f"port {taken} .*--port"):
            run_servers(replace(launch, first_port=taken), threading.Event(), print, print)
    with pytest.raises(MtopdError, match="does not have the address"):
        run_servers(replace(launch, host="192.0.2.1"), threading.Event(), print, print)
    assert starts(launch.python) == []


def test_ports_are_counted_up_from_a_given_one(launch: Launch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        first = other.getsockname()[1]

    def scenario(urls: list[str], lines: list[str]) -> None:
        assert list(map(port_of, urls)) == [first, first + 1]

    run(replace(launch, first_port=first, num_servers=2), scenario)


# -- processes -------------------------------------------------------------------------------------
def test_a_dead_server_comes_back_at_its_url_and_nothing_is_left_at_the_end(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")

    def scenario(urls: list[str], lines: list[str]) -> None:
        assert len(urls) == len({*urls}) == 2
        first = {port: pid for pid, _, port in starts(launch.python)}
        worker = {port: worker for _, worker, port in starts(launch.python)}
        port = port_of(urls[0])
        os.kill(first[port], signal.SIGKILL)
        wait_for(lambda: any("ready again" in line for line in lines))
        assert left([worker[port]]) == [], (
            "what a dead server leaves is ended before it starts again"
        )
        pid, _, again = starts(launch.python)[-1]
        assert again == port and pid != first[port]
        assert alive([first[port_of(urls[1])]]), "the other goes on"

    lines = run(replace(launch, num_servers=2), scenario)
    (ended,) = [line for line in lines if "was killed by SIGKILL" in line]
    assert "restart 1 of 5 in 1 s" in ended
    all_of_them = [pid for *pids, _ in starts(launch.python) for pid in pids]
    assert len(all_of_them) == 6 and left(all_of_them) == []


def test_a_server_that_ignores_sigterm_is_killed(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sglang_launch, "_GRACE_S", 0.5)
    run(replace(launch, arguments={"behave": "deaf"}), lambda urls, lines: None)
    ((pid, worker, _),) = starts(launch.python)
    assert left([pid, worker]) == []


def test_one_that_ends_before_it_was_ready_is_not_started_again(launch: Launch) -> None:
    launch = replace(launch, arguments={"behave": "fails"}, num_servers=2)
    with pytest.raises(MtopdError) as caught:
        run(launch, lambda urls, lines: None)
    said = str(caught.value)
    assert "ended with exit code 1 before it was ready" in said
    assert "No module named 'sglang'" in said and str(launch.logs) in said
    assert len(starts(launch.python)) <= 2
    assert left([pid for *pids, _ in starts(launch.python) for pid in pids]) == []
    assert (launch.logs / "0.log").read_text().startswith(f"+ {launch.python} -m sglang")


def test_python_that_is_none_is_a_clear_error(launch: Launch, tmp_path: Path) -> None:
    launch = replace(launch, python=tmp_path / "absent" / "python")
    with pytest.raises(MtopdError, match=r"absent/python: No such file"):
        run(launch, lambda urls, lines: None)


def test_the_wait_for_one_that_never_answers_is_bounded(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sglang_launch, "_SAY_EVERY_S", 0.2)
    lines: list[str] = []
    launch = replace(launch, arguments={"behave": "silent"}, patience_s=1.5)
    with pytest.raises(MtopdError, match=r"is not ready after [12] s"):
        run_servers(launch, threading.Event(), print, lines.append)
    assert lines and "0 of 1 SGLang server ready" in lines[0]
    ((pid, worker, _),) = starts(launch.python)
    assert left([pid, worker]) == []


def test_restarts_are_bounded(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_launch, "_RESTART_AFTER_S", [0.0] * 5)

    def scenario(urls: list[str], lines: list[str]) -> None:
        for number in range(1, 7):
            wait_for(lambda number=number: len(starts(launch.python)) == number)  # type: ignore[misc]
            os.kill(starts(launch.python)[-1][0], signal.SIGKILL)
        time.sleep(60)  # the end comes from the servers

    with pytest.raises(MtopdError, match="every SGLang server died 6 times"):
        run(launch, scenario)
    assert len(starts(launch.python)) == 6
    assert left([pid for *pids, _ in starts(launch.python) for pid in pids]) == []


def test_servers_die_with_who_started_them(launch: Launch, tmp_path: Path) -> None:
    """Killed, it can end nobody: the kernel does.  (Workers die with SGLang's own main process.)"""
    fields = ", ".join(
        f"Path({str(path)!r})" for path in (launch.python, launch.serving, launch.logs)
    )
    program = (
        "import threading; from pathlib import Path\n"
        "from mtopd.rollout.sglang_command import Launch\n"
        "from mtopd.rollout.sglang_launch import run_servers\n"
        f"launch = Launch({fields}, 'float32', 100)\n"
        "run_servers(launch, threading.Event(), lambda urls: print('up', flush=True), print)\n"
    )
    starter = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    wait_for(lambda: starter.stdout.readline() == "up\n")  # type: ignore[union-attr]
    ((pid, worker, _),) = starts(launch.python)
    try:
        assert alive([pid]) == [pid]
        starter.kill()
        assert left([pid]) == []
    finally:
        starter.kill()
        starter.wait()
        os.kill(worker, signal.SIGKILL)


def test_a_child_whose_parent_is_gone_already_does_not_begin(tmp_path: Path) -> None:
    wanted = with_parent(["touch", str(tmp_path / "begun")])
    gone = subprocess.Popen(["true"])
    gone.wait()
    wanted[wanted.index(str(os.getpid()))] = str(gone.pid)
    assert subprocess.run(wanted, timeout=30).returncode == 1
    assert not (tmp_path / "begun").exists()
