"""The command line of an SGLang server that mtopd starts, its environment, the port it will have."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtopd.rollout.sglang_wire import ALLOW_LONGER, RESERVED, server_flags
from mtopd.types import MtopdError

LOOPBACK = "127.0.0.1"
_BY_MTOPD = "mtopd sets it"
_FOR_US = {  # flag -> why a config must not say it
    **dict.fromkeys(("model-path", "load-format", "skip-tokenizer-init"), _BY_MTOPD),
    **dict.fromkeys(("incremental-streaming-output", "skip-server-warmup"), _BY_MTOPD),
    "enable-deterministic-inference": _BY_MTOPD,
    "dtype": "it is student.dtype",
    "context-length": "it follows from data.context_length",
    "host": "say `mtopd serve --host`",
    "port": "say `mtopd serve --port`",
    **dict.fromkeys(("tp-size", "tensor-parallel-size"), "say rollout.server_tp"),
    **dict.fromkeys(("dp-size", "data-parallel-size"), "say rollout.num_servers"),
    "base-gpu-id": "CUDA_VISIBLE_DEVICES says which GPUs servers take",
    **dict.fromkeys(
        ("pp-size", "pipeline-parallel-size", "nnodes", "node-rank", "dist-init-addr"),
        "a server of several nodes or stages was never tried: weights would not reach all of it",
    ),
    "config": "write its entries into rollout.server_args",
    **dict.fromkeys(
        ("api-key", "admin-api-key", "ssl-keyfile", "ssl-certfile"),
        "the client of a run speaks plain HTTP",
    ),
    "preferred-sampling-params": "it would change the distribution that responses are drawn from",
    "enable-custom-logit-processor": "it runs code that comes over the network",
    "trust-remote-code": "it runs code that comes with a model",
}


@dataclass(frozen=True)
class Launch:
    """What all servers of a start have in common."""

    python: Path  # of the environment that has SGLang
    serving: Path  # the folder that holds config.json
    logs: Path  # a folder
    dtype: str
    context_length: int  # tokens of the longest sample
    num_servers: int = 1
    tp: int = 1
    seeded: bool = True
    arguments: Mapping[str, Any] = field(default_factory=dict)  # further flags of SGLang
    host: str = LOOPBACK
    first_port: int | None = None  # None: free ones
    first_gpu: int | None = None  # of the first server; None: CPU
    patience_s: float = 1800.0  # until a server must be ready


def command(launch: Launch, index: int, port: int) -> list[str]:
    """The command line of a server.  Raises MtopdError for an argument that a config must not give."""
    line = [str(launch.python), "-m", "sglang.launch_server"]
    line += _given(launch.arguments)
    line += server_flags(launch.serving, seeded=launch.seeded)
    # No longer than needed: SGLang keeps a table as wide as its context.
    line += ["--context-length", str(launch.context_length + RESERVED)]
    # Warming up would be a request with text; it is ready without.
    line += ["--skip-server-warmup", "--dtype", launch.dtype, "--tp-size", str(launch.tp)]
    if launch.first_gpu is not None:
        line += ["--base-gpu-id", str(launch.first_gpu + index * launch.tp)]
    return [*line, "--host", launch.host, "--port", str(port)]


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise MtopdError for further flags that a config must not give."""
    list(_given(arguments))


def _given(arguments: Mapping[str, Any]) -> Iterator[str]:
    """Flags of SGLang as a config says them: with - or _, without the dashes in front."""
    for key, value in arguments.items():
        flag = key.replace("_", "-")
        if not re.fullmatch(r"[a-z][a-z0-9-]*", flag):
            raise MtopdError(
                f"rollout.server_args.{key}: a flag of SGLang is needed, without the dashes in "
                "front, e.g. mem-fraction-static"
            )
        # SGLang also takes the beginning of a flag for the flag.
        if ours := [name for name in _FOR_US if name.startswith(flag)]:
            raise MtopdError(f"rollout.server_args.{key}: {_FOR_US[ours[0]]}; leave it out")
        values = () if value is True else value if isinstance(value, list) else (value,)
        if value == [] or any(type(v) not in (str, int, float) for v in values):
            raise MtopdError(
                f"rollout.server_args.{key} is {json.dumps(value)}: a flag of SGLang takes a text, a "
                "number or a list of them; true is for a flag without a value, and one that is not to "
                "be given is left out"
            )
        yield f"--{flag}"
        yield from map(str, values)


def environment() -> dict[str, str]:
    """Of a server: ours without what torchrun gave a rank; torch would take it for its own."""
    ranks = r"TORCHELASTIC_.*|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)"
    kept = {name: value for name, value in os.environ.items() if not re.fullmatch(ranks, name)}
    return kept | {ALLOW_LONGER: "1"}


def hold_port(host: str, port: int) -> socket.socket:
    """A socket that is bound and never listens: nobody else is given the port, a server may still
    listen on it.  ``port`` 0: a free one.
    """
    try:
        family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        held = socket.socket(family, kind)
        try:
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.bind(where)
        except OSError:
            held.close()
            raise
    except OSError as error:
        raise MtopdError(
            f"no server can listen on {host} port {port} ({error.strerror}): another program has "
            "the port, or this machine does not have the address; choose another --host or --port"
        ) from None
    return held
