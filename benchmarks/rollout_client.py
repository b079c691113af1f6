"""What the client of SGLang servers costs beside a bare aiohttp loop that reads the same streams.

    python benchmarks/rollout_client.py --json benchmarks/results/rollout_client_2core_cpu.json
    python benchmarks/rollout_client.py --quick

64 requests are open at once, events hold 8 tokens.  The bare loop posts the requests, reads line by
line, parses each event with the standard library and counts its tokens; a second one parses with
orjson, as our client does.  Ours is the engine: it checks every event, keeps a token log (crc32c,
fdatasync every 100 ms) and hands responses on.  They take turns, which begins changes; medians of
rounds.  CPU is that of this process, all threads.

The server (``stream_server``) is a process of its own that has its responses ready:

    unpaced    it writes as fast as it is read, so events merge on the way: tokens a second are what
               a client can take
    paced      an event for each stream every 25 ms, 20,480 tokens/s: each is read by itself, as from
               servers that compute; what a client's CPU costs then
    slow disk  ours alone, unpaced, every commit 50 ms longer: in how many of them was nothing read
               that was read later
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import orjson
import stream_server
import torch

from mtopd.rollout.ending import Ending
from mtopd.rollout.engine import Request, Sampling
from mtopd.rollout.sglang import SGLangEngine, SGLangOptions
from mtopd.rollout.sglang_wire import Asking, Part, generate_body
from mtopd.rollout.token_log import TokenLog

OPEN = 64
PROMPT = np.arange(100, 120, dtype=np.int32)
PACES = {"unpaced": 0.0, "paced": 0.025}  # seconds between two events of a stream
_UNPACED = 8  # times as many responses: a round takes half a second
SLOW_DISK_S = 0.05
LIMITS = "tokens/s >= 0.95 of the bare loop's, CPU <= the bare loop's + 4 us/token"


@dataclass(frozen=True)
class Rate:
    """Of one round, or medians of rounds."""

    tokens_per_s: float
    cpu_us_per_token: float


@dataclass(frozen=True)
class Against:
    """Medians over the rounds' own."""

    tokens_per_s_ratio: float
    more_cpu_us_per_token: float


async def read_bare(url: str, responses: int, tokens: int, loads: Callable[[bytes], Any]) -> int:
    """Tokens that came."""
    asking = Asking(stream_server.VOCABULARY, frozenset({0}), "", True, stream_server.INTERVAL)
    numbers, got = iter(range(responses)), 0

    async def worker(session: aiohttp.ClientSession) -> None:
        nonlocal got
        for number in numbers:
            body = generate_body(asking, f"bare-{number:020d}", PROMPT, Part(tokens), number)
            async with session.post(url + "/generate", data=body) as response:
                response.raise_for_status()
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        got += len(loads(line[6:])["output_ids"])

    headers = {"Content-Type": "application/json"}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        connector=connector, read_bufsize=1 << 20, headers=headers
    ) as session:
        await asyncio.gather(*(worker(session) for _ in range(OPEN)))
    return got


class SlowDiskLog(TokenLog):
    """Counts what is appended while it commits."""

    num_appended = 0

    def __init__(self, path: Path) -> None:
        self.commits: list[tuple[int, int]] = []  # appended before and after each
        super().__init__(**log_arguments(path))

    def append(self, *values: Any, **more: Any) -> None:
        super().append(*values, **more)
        self.num_appended += 1

    def _write(self, data: bytes) -> None:
        before = self.num_appended
        time.sleep(SLOW_DISK_S)
        super()._write(data)
        self.commits.append((before, self.num_appended))


def log_arguments(path: Path) -> dict[str, Any]:
    versions = {0: stream_server.VERSION}
    return {"name": "bench", "path": path, "run": "bench", "engine": "sglang", "versions": versions}


class Client(SGLangEngine):
    """The product's engine, of a server that has its weights."""

    def __init__(self, url: str, tokens: int) -> None:
        no_tokenizer: Any = None  # only stop strings need it
        super().__init__(
            SGLangOptions([url], len(PROMPT) + tokens, most_open=OPEN),
            run_name="benchmark",
            vocab_size=stream_server.VOCABULARY,
            dtype=torch.float32,
            ending=Ending(no_tokenizer, [stream_server.VOCABULARY - 1]),
            is_client=True,
            apart=contextlib.nullcontext,
            score=lambda sequences: None,
        )
        assert self._client is not None
        servers = self._client.run(self._client._connected())
        servers.version = self.version = stream_server.VERSION
        for server in servers.all:
            servers.take_back(server)

    def answer(self, log: TokenLog, responses: int, tokens: int) -> int:
        """Tokens that came."""
        requests = [Request(i, f"prompt/{i}", PROMPT) for i in range(responses)]
        found = self.generate(requests, log, Sampling(tokens))
        got = sum(len(response.response_ids) for response in found)
        log.close()
        return got


def measured(call: Callable[[], int]) -> Rate:
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    tokens = call()
    cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
    return Rate(tokens / wall_s, 1e6 * cpu_s / tokens)


def median(rates: list[Rate]) -> Rate:
    return Rate(
        statistics.median(rate.tokens_per_s for rate in rates),
        statistics.median(rate.cpu_us_per_token for rate in rates),
    )


def against(ours: list[Rate], bare: list[Rate]) -> Against:
    pairs = list(zip(ours, bare, strict=True))
    return Against(
        statistics.median(a.tokens_per_s / b.tokens_per_s for a, b in pairs),
        statistics.median(a.cpu_us_per_token - b.cpu_us_per_token for a, b in pairs),
    )


def compare(step_s: float, rounds: int, responses: int, tokens: int) -> dict[str, Any]:
    size = (responses, tokens)
    with (
        tempfile.TemporaryDirectory(prefix="mtopd-client-") as name,
        stream_server.running(tokens, step_s) as url,
    ):
        client, folder = Client(url, tokens), Path(name)
        calls: dict[str, Callable[[int], int]] = {
            "bare": lambda n: asyncio.run(read_bare(url, *size, json.loads)),
            "bare_orjson": lambda n: asyncio.run(read_bare(url, *size, orjson.loads)),
            "ours": lambda n: client.answer(TokenLog(**log_arguments(folder / f"{n}.bin")), *size),
        }
        rows: dict[str, list[Rate]] = {kind: [] for kind in calls}
        for number in range(rounds + 1):
            for kind in [*calls][:: 1 if number % 2 else -1]:
                rate = measured(lambda kind=kind, number=number: calls[kind](number))  # type: ignore[misc]
                if number:  # the first warms up
                    rows[kind].append(rate)
        client.close()
    return {
        "rates": {kind: asdict(median(rates)) for kind, rates in rows.items()},
        "against": {
            kind: asdict(against(rows["ours"], rows[kind])) for kind in ("bare", "bare_orjson")
        },
    }


def commits_waited_for(responses: int, tokens: int) -> tuple[int, int]:
    """Commits in which nothing was read although there was more, and all that there could be."""
    with (
        tempfile.TemporaryDirectory(prefix="mtopd-client-") as name,
        stream_server.running(tokens, 0.0) as url,
    ):
        client, log = Client(url, tokens), SlowDiskLog(Path(name) / "log.bin")
        client.answer(log, responses, tokens)
        client.close()
    while_reading = [(a, b) for a, b in log.commits[1:] if a < log.num_appended]
    return sum(a == b for a, b in while_reading), len(while_reading)


def processor() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one short round, for CI")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    arguments = parser.parse_args()
    rounds, responses, tokens = (1, 64, 64) if arguments.quick else (9, 128, 256)
    result: dict[str, Any] = {
        "machine": {
            "cpus": os.cpu_count(),
            "processor": processor(),
            "load_before": os.getloadavg()[0],
        },
        "sizes": {"open": OPEN, "interval": stream_server.INTERVAL, "rounds": rounds}
        | {"responses": responses, "responses_unpaced": _UNPACED * responses, "tokens": tokens},
    }
    for pace, step_s in PACES.items():
        count = responses if step_s else _UNPACED * responses
        found = result[pace] = compare(step_s, rounds, count, tokens)
        for kind, rate in found["rates"].items():
            line = "{tokens_per_s:9,.0f} tokens/s, {cpu_us_per_token:6.2f} us CPU/token"
            print(f"{pace:8s} {kind:12s}{line.format(**rate)}", flush=True)
        for kind, ratio in found["against"].items():
            line = "{tokens_per_s_ratio:.2f} of the tokens/s, {more_cpu_us_per_token:+.2f} us/token"
            print(f"{pace:8s} ours against {kind}: {line.format(**ratio)}", flush=True)
    waited, commits = commits_waited_for(4 * _UNPACED * responses, tokens)
    result["slow_disk"] = {"commits_waited_for": waited, "commits": commits}
    print(f"slow disk: reading stood still in {waited} of {commits} commits")
    print(f"limits: {LIMITS}, 0 commits waited for")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
