"""`mtopd serve`: the SGLang servers of a config, kept up in the foreground; and the servers of a run with
``rollout.servers: auto``.

Whoever keeps servers up for a run directory holds ``servers/lock`` in it and says in
``servers/servers.json`` where they are, from when all are ready to their end; their logs lie beside it.
A run takes those of `mtopd serve` where it is going.  Else its launcher starts a process that does the
same, gets SIGTERM when the launcher ends, however it ends, and then ends the servers.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mtopd.child_process import with_parent
from mtopd.config import ConsolidateConfig
from mtopd.config_file import load_config
from mtopd.files import one_line_errors
from mtopd.progress import print_error, say
from mtopd.rollout.sglang_command import LOOPBACK, Launch
from mtopd.rollout.sglang_launch import forget_urls, read_urls, run_servers, write_urls
from mtopd.run_dir import SERVERS_LOCK, RunDir
from mtopd.types import MtopdError

_READY, _ERROR = "ready", "error "  # how a line begins that the launcher is told
_ENDED_WITHIN_S = 60.0
_SAY_EVERY_S = 15.0


# -- the verb --------------------------------------------------------------------------------------
def serve(config: ConsolidateConfig, *, host: str = LOOPBACK, port: int | None = None) -> None:
    """Keep the servers of a config up until SIGINT or SIGTERM.  ``port``: the first server's, the
    others' follow; None: free ones.
    """
    from mtopd.tokenizer import load_tokenizer, vocab_size

    from .serving import check_engine, write_folder

    rollout = config.rollout
    if rollout.servers != "auto":
        found = f"engine {rollout.engine}" if not rollout.servers else "addresses of servers"
        raise MtopdError(
            f"the config's rollout has {found}, so it starts none; `mtopd serve` starts those of "
            "rollout.engine sglang with rollout.servers auto"
        )
    if host in ("0.0.0.0", "::"):
        raise MtopdError(
            f"--host {host} is every address of this machine, but a run needs one to reach it by, and "
            "whoever reaches a server can give it weights: name the address, or the host name"
        )
    run = RunDir(config.run_dir)

    def announce() -> None:
        say(f"a run in {run.path} takes them; end them with Ctrl-C or SIGTERM")

    with run.lock(SERVERS_LOCK):
        check_engine(config)
        write_folder(config, run, vocab_size(load_tokenizer(config.student.model)), say)
        _keep_up(config, run, 0, announce, host=host, port=port)


def _keep_up(
    config: ConsolidateConfig,
    run: RunDir,
    first_gpu: int,
    on_ready: Callable[[], None],
    *,
    host: str = LOOPBACK,
    port: int | None = None,
) -> None:
    """The caller holds the lock of servers, and is the main thread."""
    rollout = config.rollout
    assert rollout.python is not None, "checked with the config"
    launch = Launch(
        rollout.python,
        run.serving,
        run.servers,
        config.student.dtype,
        config.data.context_length,
        num_servers=rollout.num_servers,
        tp=rollout.server_tp,
        seeded=rollout.seeded,
        arguments=rollout.server_args,
        host=host,
        first_port=port,
        first_gpu=_check_gpus(config, first_gpu),
        patience_s=rollout.patience_s,
    )
    stop = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: stop.set())

    def known(urls: list[str]) -> None:
        write_urls(run.servers, urls)
        on_ready()

    forget_urls(run.servers)  # of one that was killed
    try:
        run_servers(launch, stop, known, say)
    finally:
        forget_urls(run.servers)


def _check_gpus(config: ConsolidateConfig, first: int) -> int | None:
    """The first server's first GPU; None where there is none.  Raises MtopdError where they are too
    few for the servers, behind ``first`` that ranks have.
    """
    rollout = config.rollout
    if rollout.server_args.get("device") == "cpu":
        return None
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not found:
        return None
    wanted = rollout.num_servers * rollout.server_tp
    if first + wanted > found:
        beside = f" beside the {first} of the ranks" if first else ""
        raise MtopdError(
            f"this host has {found} GPUs; rollout.num_servers {rollout.num_servers} of "
            f"rollout.server_tp {rollout.server_tp} need {wanted}{beside}: lower one, or keep servers up "
            "on another host (`mtopd serve --host`)"
        )
    return first


# -- a run -----------------------------------------------------------------------------------------
@contextlib.contextmanager
def servers_of(config: ConsolidateConfig, run: RunDir) -> Iterator[None]:
    """The servers that a run samples with are ready when the block begins; those that the run starts
    are gone when it has ended.  Raises MtopdError.
    """
    from .checks import ranks_on_node
    from .serving import await_servers

    rollout = config.rollout
    if rollout.servers != "auto":
        await_servers(config, run)
        yield
    elif holder := run.holder(SERVERS_LOCK):
        await_servers(config, run, _served(run, holder, rollout.patience_s))
        yield
    else:
        with _own(run, ranks_on_node(config.student)):
            yield


def _served(run: RunDir, holder: str, patience_s: float) -> list[str]:
    """Addresses of the servers that another process keeps up, once they are ready."""
    say(f"taking the SGLang servers that {holder} keeps up for {run.path}")
    began = said = time.monotonic()
    while (urls := read_urls(run.servers)) is None:
        now = time.monotonic()
        if run.holder(SERVERS_LOCK) is None:
            raise MtopdError(
                f"`mtopd serve` ({holder}) ended before its servers were ready; start it again, or "
                "start this command again, which then starts servers itself"
            )
        if now - began > patience_s:
            raise MtopdError(
                f"the SGLang servers of `mtopd serve` ({holder}) are not ready after "
                f"{patience_s:.0f} s (rollout.patience_s); their logs are in {run.servers}"
            )
        if now - said > _SAY_EVERY_S:
            said = now
            say(f"they are not ready after {now - began:.0f} s")
        time.sleep(0.5)
    return urls


@contextlib.contextmanager
def _own(run: RunDir, first_gpu: int) -> Iterator[None]:
    """Servers of a process of ours, below this one."""
    command = [sys.executable, "-P", "-m", "mtopd.pipelines.serve", str(run.path), str(first_gpu)]
    child = subprocess.Popen(
        with_parent(command, signal.SIGTERM),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,  # Ctrl-C is for us: ranks end first
    )
    try:
        assert child.stdout is not None
        lines = (line.strip() for line in child.stdout)
        told = next((line for line in lines if line.startswith((_READY, _ERROR))), None)
        if told != _READY:
            raise MtopdError((told or "").removeprefix(_ERROR) or "the servers' process was ended")
        yield
    finally:
        child.terminate()
        try:
            child.wait(_ENDED_WITHIN_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def main(arguments: list[str]) -> int:
    """The process that `_own` starts: run directory, number of GPUs that ranks have."""
    run = RunDir(Path(arguments[0]))
    waiting = True  # the launcher reads what we print

    def tell() -> None:
        nonlocal waiting
        print(_READY, flush=True)
        waiting = False

    try:
        with one_line_errors(), run.lock(SERVERS_LOCK):
            config = load_config(run.config, [], ConsolidateConfig)
            _keep_up(config, run, int(arguments[1]), tell)
    except MtopdError as error:
        line = " ".join(str(error).split())
        if waiting:
            print(f"{_ERROR}{line}", flush=True)
        else:
            print_error(line)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
