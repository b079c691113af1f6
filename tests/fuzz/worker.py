"""One process of the fuzz: imports the command line once, then runs a command for every line of
standard input.

A line is ``{"argv": [...], "cwd": folder, "ranks": bool}``; the answer, a line on the original
standard output, is ``{"code": int, "out": str}``.  With ``ranks`` a start's one rank runs in a
forked child, so that nothing is imported again.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import socket
import sys
import traceback
from pathlib import Path

MEMORY_LIMIT = 8 << 30  # an input that makes the product ask for more is a failure


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    import mtopd.convert.teacher
    import mtopd.pipelines.consolidate  # noqa: F401  what a rank runs
    from mtopd.pipelines import cli, start

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    for line in sys.stdin:
        job = json.loads(line)
        os.chdir(job["cwd"])
        start.launch = _fork_rank if job["ranks"] else _refuse_to_launch  # type: ignore[assignment]
        answers.write(json.dumps(_run(cli.main, job["argv"])) + "\n")


def _run(command, argv: list[str]) -> dict[str, object]:
    sys.argv = ["mtopd", *argv]
    out = io.StringIO()
    code: object = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            command()
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:  # pyo3's panics are no Exception
            code = 1
            out.write(traceback.format_exc())
    return {"code": code, "out": out.getvalue()}


def _refuse_to_launch(*arguments: object) -> None:
    raise AssertionError("a start with --check has started ranks")


def _fork_rank(world_size: int, target: str, run_dir: Path, generation: int, *rest: str) -> None:
    """What start.launch does for one rank, without a new interpreter."""
    from mtopd.pipelines import own_ranks
    from mtopd.types import MtopdError

    assert world_size == 1, world_size
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    errors = Path(run_dir).parent / f"error-{os.getpid()}"
    errors.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        rank = {
            "RANK": 0,
            "LOCAL_RANK": 0,
            "WORLD_SIZE": 1,
            "LOCAL_WORLD_SIZE": 1,
            "MASTER_PORT": port,
        }
        os.environ.update({name: str(value) for name, value in rank.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
        code = 1
        try:
            code = own_ranks.main([target, str(run_dir), str(generation), str(errors), *rest])
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code:
        message = errors.read_text() if errors.exists() else f"the rank ended with {code}"
        if code == 2:
            raise MtopdError(message)
        raise RuntimeError(message)


if __name__ == "__main__":
    main()
