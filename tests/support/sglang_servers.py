"""Real SGLang servers on this CPU for tests: one zygote, forked servers, free ports.

`make sglang` makes the environment that they run in.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import REPOSITORY

PYTHON = REPOSITORY / ".venv-sglang" / "bin" / "python"
_FLAGS = {
    "--dtype": "float32",
    "--device": "cpu",
    "--attention-backend": "torch_native",
    "--host": "127.0.0.1",
    "--cuda-graph-backend-decode": "disabled",
    "--cuda-graph-backend-prefill": "disabled",
    # Of the memory that is free, and other processes take some while a server starts.
    "--mem-fraction-static": "0.9",
    "--max-total-tokens": "8192",
    "--max-running-requests": "64",
    "--load-format": "dummy",  # config.json alone: weights come from the trainer
    "--skip-server-warmup": None,
    "--skip-tokenizer-init": None,
    "--incremental-streaming-output": None,
    "--enable-deterministic-inference": None,
}
_IMPORT_S, _START_S = 400, 300  # a busy machine


@dataclass
class RunningServer:
    """One server's main process, which leads a process group."""

    url: str
    pid: int
    log: Path
    line: dict[str, Any]  # that it was forked by

    def wait_ready(self) -> None:
        deadline = time.monotonic() + _START_S
        while True:
            with (
                contextlib.suppress(urllib.error.URLError, OSError),
                urllib.request.urlopen(self.url + "/health", timeout=30) as answer,
            ):
                if answer.status == 200:
                    return
            if time.monotonic() > deadline or not _is_alive(self.pid):
                raise AssertionError(f"no server at {self.url}:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.2)

    def kill(self) -> None:
        """SIGKILL its whole process group, and wait until the port is free."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        while _is_alive(self.pid):
            time.sleep(0.02)


class Zygote:
    """What servers are forked from."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log = open(folder / "zygote.log", "w")  # noqa: SIM115
        self._process = subprocess.Popen(
            [str(PYTHON), "-u", str(Path(__file__).parent / "sglang_cpu" / "zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        )
        self.servers: list[RunningServer] = []
        self._answer("ready")

    def start(
        self,
        serving: Path,
        *,
        port: int | None = None,
        tp: int = 1,
        flags: Mapping[str, str | None] | None = None,
    ) -> RunningServer:
        """Fork a server for a folder; it is not ready yet.  A flag with False is left out."""
        port = port or free_port()
        wanted = {**_FLAGS, "--model-path": str(serving), "--port": str(port), **(flags or {})}
        environment = {}
        if tp > 1:
            wanted["--tp"] = str(tp)
            environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(["0", "1"] * tp)[: 2 * tp - 1]
        log = self._folder / f"server-{len(self.servers)}.log"
        arguments = [
            part for flag, value in wanted.items() for part in (flag, value) if part is not None
        ]
        line = {"log": str(log), "arguments": arguments, "environment": environment}
        server = RunningServer(f"http://127.0.0.1:{port}", self._fork(line), log, line)
        self.servers.append(server)
        return server

    def restart(self, server: RunningServer) -> None:
        """Kill it if it lives, and fork it again at its address; it is not ready yet."""
        server.kill()
        server.pid = self._fork(server.line)

    def _fork(self, line: dict[str, Any]) -> int:
        """Its process id."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()
        return int(self._answer("pid "))

    def _answer(self, start: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(start):
                return line.removeprefix(start).strip()
        raise AssertionError(
            f"the zygote ended:\n{(self._folder / 'zygote.log').read_text()[-4000:]}"
        )

    def close(self) -> None:
        for server in self.servers:
            server.kill()
        self._process.kill()
        self._process.wait()
        self._log.close()


def free_port() -> int:
    """One below those that the system gives to connections: a server binds it half a minute later."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
