"""Real SGLang servers on a CPU for the imports of one: import once, fork a server a line of stdin.

Run by the Python of .venv-sglang.  A line is a JSON object: the server's "log" file, its "arguments"
and "environment".  The answer is a line "pid N" of its main process, which leads a process group of
its own.  Other lines of stdout are chatter.  All ends with stdin, and with the process behind it.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import sys

import shim  # noqa: F401  # isort: skip  # first

# What every server imports, before the first is forked.
import sglang.srt.entrypoints.http_server
import sglang.srt.managers.detokenizer_manager
import sglang.srt.managers.scheduler
import sglang.srt.models.qwen3  # noqa: F401
from sglang.launch_server import run_server
from sglang.srt.server_args import prepare_server_args


def die_with_parent() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def serve(log: str, arguments: list[str], environment: dict[str, str]) -> None:
    """The forked process: one server, until it is killed."""
    die_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    run_server(prepare_server_args(arguments))


def main() -> None:
    die_with_parent()
    multiprocessing.set_start_method("fork", force=True)
    # SGLang asks for spawn, and each of its processes would import all of it again.
    multiprocessing.set_start_method = lambda *_, **__: None  # type: ignore[assignment]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    print("ready", flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        pid = os.fork()
        if pid == 0:
            serve(**wanted)
            os._exit(0)
        print(f"pid {pid}", flush=True)


if __name__ == "__main__":
    main()
