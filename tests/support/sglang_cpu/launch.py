"""`python -m sglang.launch_server` on a CPU: what ``rollout.python`` runs in tests.

    python launch.py -m sglang.launch_server FLAGS...

Run by the Python of .venv-sglang, in a server's own process; its workers are forked, not spawned, so
that all is imported once.
"""

from __future__ import annotations

import multiprocessing
import os
import sys

import shim  # noqa: F401  # isort: skip  # first

from sglang.launch_server import run_server
from sglang.srt.server_args import prepare_server_args


def main(arguments: list[str]) -> None:
    assert arguments[:2] == ["-m", "sglang.launch_server"], arguments
    flags = arguments[2:]
    if (tp := int(flags[flags.index("--tp-size") + 1])) > 1:
        os.environ["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(["0", "1"] * tp)[: 2 * tp - 1]
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda *_, **__: None  # type: ignore[assignment]
    run_server(prepare_server_args(flags))


if __name__ == "__main__":
    main(sys.argv[1:])
