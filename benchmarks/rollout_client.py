"""What the client of SGLang servers costs beside a bare aiohttp loop that reads the same streams.

    python -m benchmarks.rollout_client --json benchmarks/results/rollout_client_2core_cpu.json

Needs `make sglang`.  One real server on this CPU; 64 requests at once, chunks of 8 tokens.  The bare
loop posts them, parses each event and counts its tokens; ours checks every chunk, keeps a token log
(crc32c, fdatasync every 100 ms) and hands responses on.  Alternating rounds, medians.  CPU is that of
this process, all threads; the server has its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp

from mtopd.rollout.engine import Request, Sampling
from mtopd.rollout.sglang_wire import Asking, Part, generate_body
from mtopd.rollout.token_log import TokenLog
from tests.sglang.conftest import EngineUnderTest, Place
from tests.support.sglang_servers import Zygote

OPEN = 64


async def bare(url: str, prompts: list[list[int]], tokens: int, round_: int) -> int:
    """Tokens that came."""
    asking = Asking(1 << 20, frozenset(), "", True, 8)

    async def one(session: aiohttp.ClientSession, number: int) -> int:
        part = Part(tokens, endless=True)
        rid = f"bare-{round_:04d}-{number:010d}"
        body = generate_body(asking, rid, prompts[number], part, 1000 * round_ + number)
        got = 0
        async with session.post(url + "/generate", data=body) as response:
            response.raise_for_status()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    got += len(json.loads(line[6:])["output_ids"])
        return got

    headers = {"Content-Type": "application/json"}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        connector=connector, read_bufsize=1 << 22, headers=headers
    ) as session:
        return sum(await asyncio.gather(*(one(session, i) for i in range(len(prompts)))))


def ours(
    engine: EngineUnderTest, prompts: list[list[int]], tokens: int, round_: int, folder: Path
) -> int:
    log = TokenLog(
        "bench",
        folder / f"log-{round_}.bin",
        run="bench",
        engine="sglang",
        versions={0: "run/1/0"},
    )
    # One more token than is kept from ending: a response is two attempts otherwise.
    sampling = Sampling(tokens, min_response=tokens + 1, seed=round_)
    requests = [Request(i, f"b/{i}", ids) for i, ids in enumerate(prompts)]
    got = sum(len(r.response_ids) for r in engine.generate(requests, log, sampling))
    log.close()
    return got


def measured(call: Callable[[], int]) -> tuple[float, float]:
    """Tokens a second, and microseconds of this process's CPU for a token."""
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    tokens = call()
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return tokens / wall, 1e6 * cpu / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        place, zygote = Place(root), Zygote(root)
        try:
            server = zygote.start(place.serving)
            server.wait_ready()
            engine = EngineUnderTest(place, [server.url], most_open=OPEN)
            engine.give(place.student, "run/1/0")
            prompts = [ids[:20] for ids in place.prompts(OPEN)]
            rows: dict[str, list[tuple[float, float]]] = {"bare": [], "ours": []}
            for round_ in range(options.rounds + 1):
                calls = {
                    "bare": lambda n=round_: asyncio.run(
                        bare(server.url, prompts, options.tokens, n)
                    ),
                    "ours": lambda n=round_: ours(engine, prompts, options.tokens, n, root),
                }
                for kind in ("bare", "ours") if round_ % 2 else ("ours", "bare"):
                    found = measured(calls[kind])
                    if round_:  # the first warms up
                        rows[kind].append(found)
            engine.close()
        finally:
            zygote.close()
    result: dict[str, dict[str, Any]] = {
        kind: {
            "tokens_per_s": statistics.median(speed for speed, _ in found),
            "cpu_us_per_token": statistics.median(cpu for _, cpu in found),
        }
        for kind, found in rows.items()
    }
    pairs = zip(rows["ours"], rows["bare"], strict=True)
    result["ratio"] = {"tokens_per_s": statistics.median(a / b for (a, _), (b, _) in pairs)}
    result["about"] = {
        "open": OPEN,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "machine": platform.processor() or platform.machine(),
    }
    for kind in ("bare", "ours"):
        row = result[kind]
        print(
            f"{kind}: {row['tokens_per_s']:7.0f} tokens/s, {row['cpu_us_per_token']:5.1f} us CPU/token"
        )
    more = result["ours"]["cpu_us_per_token"] - result["bare"]["cpu_us_per_token"]
    print(
        f"ours / bare: {result['ratio']['tokens_per_s']:.2f} of the tokens/s, {more:+.1f} us/token"
    )
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
