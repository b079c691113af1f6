"""SGLang servers of this host as child processes: their start, their restarts, their end.

What is promised:
* Every server leads a session of its own; when it dies, and at the end, all of its group is killed,
  and the group's number is not free before that.  A server gets SIGKILL when this process dies.
* A port stays a server's own from before its first start to the end: a restart has the same URL.
* A server that ends before it ever was ready ends all; one that dies later is started again, a
  bounded number of times.  One that hangs is left alone: its client sees more than an outsider,
  e.g. that it is in the middle of an update of weights.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

from mtopd.child_process import with_parent
from mtopd.files import read_json, write_json
from mtopd.rollout.sglang_command import Launch, command, environment, hold_port
from mtopd.rollout.sglang_wire import check_server
from mtopd.types import MtopdError

_FILE, _SCHEMA = "servers.json", 1
MOST_RESTARTS = 5  # of one server
_RESTART_AFTER_S = (1.0, 2.0, 4.0, 8.0, 16.0)
_LOOK_EVERY_S = 0.2
_SAY_EVERY_S = 15.0
_ANSWER_S = 5.0  # of a server that is asked whether it is ready
_GRACE_S = 15.0  # from SIGTERM to SIGKILL: SGLang looks at its signals every 5 s
# Not through a proxy that the environment names: servers are near.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


# -- a server --------------------------------------------------------------------------------------
class _Server:
    """One server through all its starts."""

    def __init__(self, launch: Launch, index: int) -> None:
        port = launch.first_port + index if launch.first_port else 0
        self._launch = launch
        self._held = hold_port(launch.host, port)
        port = self._held.getsockname()[1]
        self._command = command(launch, index, port)
        self._environment = environment()  # as it is now: restarts are the same
        host = f"[{launch.host}]" if ":" in launch.host else launch.host
        self.url = f"http://{host}:{port}"
        self.log = launch.logs / f"{index}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.is_ready = False
        self.num_restarts = 0
        self.when = 0.0  # it must be ready by then; without a process: it is started then

    def start(self) -> None:
        with open(self.log, "ab") as log:
            log.write(f"+ {shlex.join(self._command)}\n".encode())
            log.flush()
            self.process = subprocess.Popen(
                with_parent(self._command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )
        self.is_ready = False
        self.when = time.monotonic() + self._launch.patience_s

    def ended(self) -> str | None:
        """How its process ended, which is not waited for yet; None while it runs."""
        assert self.process is not None
        found = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is None:
            return None
        if found.si_code == os.CLD_EXITED:
            return f"ended with exit code {found.si_status}"
        return f"was killed by {signal.Signals(found.si_status).name}"

    def signal(self, signum: int) -> None:
        """To its whole group, whose number is its own as long as its leader was not waited for."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signum)

    def clean_up(self) -> None:
        """Kill what is left of its group."""
        assert self.process is not None
        self.signal(signal.SIGKILL)
        self.process.wait()
        self.process = None

    def look(self) -> None:
        """See whether it has become ready.  Raises MtopdError when it is not what was started."""
        if self.is_ready:
            return
        try:
            server_info, model_info = self._get("/server_info"), self._get("/model_info")
        except (OSError, ValueError, HTTPException):  # not yet
            return
        check_server(
            self.url,
            server_info,
            model_info,
            context_length=self._launch.context_length,
            seeded=self._launch.seeded,
        )
        self.is_ready = True

    def _get(self, path: str) -> Any:
        with _open(self.url + path, timeout=_ANSWER_S) as answer:
            return json.load(answer)

    def last_words(self) -> str:
        """The last error in its log, or its last line."""
        with open(self.log, "rb") as log:
            log.seek(max(0, os.path.getsize(self.log) - 65536))
            text = log.read().decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        errors = [line for line in lines if re.search(r"\w(Error|Exception)\b", line)]
        return (errors or lines)[-1][:500]

    def close(self) -> None:
        self._held.close()


# -- all servers -----------------------------------------------------------------------------------
def run_servers(
    launch: Launch,
    stop: threading.Event,
    on_ready: Callable[[list[str]], None],
    say: Callable[[str], None],
) -> None:
    """Start the servers, call ``on_ready`` with their URLs once all are ready, and keep them up until
    ``stop`` is set.  None of their processes is left then, nor after an error.

    Raises MtopdError when one is not ready within the patience, and when all have died too often.
    The caller's thread must last: servers die with it.
    """
    servers: list[_Server] = []
    try:
        for index in range(launch.num_servers):
            servers.append(_Server(launch, index))
        for server in servers:
            server.start()
        if _wait_until_ready(servers, launch.patience_s, stop, say):
            on_ready([server.url for server in servers])
            _keep_up(servers, stop, say)
    finally:
        _end(servers)


def _wait_until_ready(
    servers: Sequence[_Server], patience_s: float, stop: threading.Event, say: Callable[[str], None]
) -> bool:
    """False when they are to end before."""
    began = said = time.monotonic()
    while not stop.wait(_LOOK_EVERY_S):
        for server in servers:
            server.look()
            if not server.is_ready and (how := server.ended()):
                raise MtopdError(
                    f"SGLang server {server.url} {how} before it was ready: {server.last_words()}; "
                    f"its log is {server.log}"
                )
        num_ready = sum(server.is_ready for server in servers)
        waited = time.monotonic() - began
        if num_ready == len(servers):
            say(f"{_count(num_ready)} ready after {waited:.0f} s: {_urls(servers)}")
            return True
        if waited > patience_s:
            late = next(server for server in servers if not server.is_ready)
            raise MtopdError(
                f"SGLang server {late.url} is not ready after {waited:.0f} s: {late.last_words()}; "
                f"its log is {late.log}"
            )
        if time.monotonic() - said > _SAY_EVERY_S:
            said = time.monotonic()
            say(f"{num_ready} of {_count(len(servers))} ready after {waited:.0f} s")
    return False


def _keep_up(servers: Sequence[_Server], stop: threading.Event, say: Callable[[str], None]) -> None:
    while not stop.wait(_LOOK_EVERY_S):
        for server in servers:
            if server.process is None:
                if server.num_restarts < MOST_RESTARTS and time.monotonic() > server.when:
                    server.num_restarts += 1
                    server.start()
                continue
            how = server.ended()
            if how is None and not server.is_ready:
                server.look()
                if server.is_ready:
                    say(f"SGLang server {server.url} is ready again; it waits for weights")
                elif time.monotonic() > server.when:
                    how = "was started again and is not ready in time"
            if how is not None:
                server.clean_up()
                said = f"SGLang server {server.url} {how} (log: {server.log})"
                if server.num_restarts < MOST_RESTARTS:
                    wait_s = _RESTART_AFTER_S[server.num_restarts]
                    server.when = time.monotonic() + wait_s
                    said += (
                        f"; restart {server.num_restarts + 1} of {MOST_RESTARTS} in {wait_s:.0f} s"
                    )
                else:
                    said += f"; it was started again {MOST_RESTARTS} times, which is enough"
                say(said)
        if all(s.process is None and s.num_restarts == MOST_RESTARTS for s in servers):
            raise MtopdError(
                f"every SGLang server died {MOST_RESTARTS + 1} times; the last said: "
                f"{servers[-1].last_words()}; its log is {servers[-1].log}"
            )


def _end(servers: Sequence[_Server]) -> None:
    """Ask all to end, wait, kill what is left."""
    running = [server for server in servers if server.process is not None]
    for server in running:
        server.signal(signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_S
    while any(not server.ended() for server in running) and time.monotonic() < deadline:
        time.sleep(_LOOK_EVERY_S / 4)
    for server in running:
        server.clean_up()
    for server in servers:
        server.close()


def _count(number: int) -> str:
    return f"{number} SGLang server{'s' * (number != 1)}"


def _urls(servers: Sequence[_Server]) -> str:
    return ", ".join(server.url for server in servers)


# -- who finds them --------------------------------------------------------------------------------
def write_urls(folder: Path, urls: Sequence[str]) -> None:
    """Say in ``folder`` where the servers are that are kept up for a run."""
    write_json(folder / _FILE, {"schema": _SCHEMA, "urls": list(urls)})


def read_urls(folder: Path) -> list[str] | None:
    """Where they are; None while they are not ready.  Raises MtopdError for another schema."""
    if not (folder / _FILE).is_file():
        return None
    found = read_json(folder / _FILE)
    if found.get("schema") != _SCHEMA:
        raise MtopdError(
            f"{folder / _FILE} has schema {found.get('schema')!r}, this version reads {_SCHEMA}; end "
            "the `mtopd serve` that wrote it"
        )
    return [str(url) for url in found["urls"]]


def forget_urls(folder: Path) -> None:
    (folder / _FILE).unlink(missing_ok=True)
