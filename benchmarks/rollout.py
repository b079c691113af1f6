"""What the rollout's own bookkeeping costs: the token log, the shards, reading both back.

    python benchmarks/rollout.py --json benchmarks/results/rollout_2core_cpu.json
    python benchmarks/rollout.py --quick

Sections:

    log      64 responses at once, in pieces of 1, 8 and 32 tokens as a server streams them, committed by the log's
             own clock: CPU microseconds and bytes a token of everything the log does (its thread too), over the
             CPU time of writing the same bytes into a flat file with one fdatasync for each commit
    samples  responses of 20 tokens, from the log's first word to the last sealed shard and back: CPU
             microseconds a sample at two sizes, of which the larger is 10 times the smaller

CPU times are process_time, which counts both threads; they do not depend on what else a machine
does as wall times would.  Only counts are asserted.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import tempfile
import time
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mtopd.rollout.engine import Request
from mtopd.rollout.shards import ShardWriter
from mtopd.rollout.token_log import (
    FormerLogs,
    TokenLog,
    log_path,
    logs_before,
    recover,
    samples_in,
)
from mtopd.trajectories import TokenStore
from mtopd.types import Prompt

STREAMS = 64
SHARD = 1000


@dataclass(frozen=True)
class LogCost:
    """Of the log alone, a token."""

    piece: int  # tokens of a response that come at once
    tokens: int
    cpu_us: float
    flat_cpu_us: float  # the same bytes in as many writes
    bytes: float
    commits: int
    read_cpu_us: float


@dataclass(frozen=True)
class SampleCost:
    """From the log to what training reads, CPU microseconds a sample."""

    samples: int
    log: float
    recover: float
    seal: float
    read: float


def new_log(folder: Path, generation: int = 1) -> TokenLog:
    return TokenLog(
        "benchmark",
        log_path(folder, generation, 0),
        run="benchmark",
        engine="none",
        versions={0: "benchmark/1/0"},
    )


def cpu_of(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measure_log(folder: Path, piece: int, tokens_each: int) -> LogCost:
    asked = [Request(i, f"p/{i}", (1,)) for i in range(STREAMS)]
    rng = np.random.default_rng(piece)
    ids = rng.integers(0, 150_000, (STREAMS, tokens_each), np.int32)
    probs = -rng.random((STREAMS, tokens_each), np.float32)
    log = new_log(folder)
    chunks = [  # as the client of servers has read them
        (
            i,
            array("i", ids[i, first : first + piece].tobytes()),
            array("f", probs[i, first : first + piece].tobytes()),
            "length" if first + piece == tokens_each else None,
        )
        for first in range(0, tokens_each, piece)
        for i in range(STREAMS)
    ]

    gc.collect()
    gc.freeze()  # looking through these chunks is none of the log's work

    def write() -> None:
        log.begin(asked)
        for i, chunk_ids, chunk_probs, reason in chunks:
            log.append(i, chunk_ids, chunk_probs, version=0, finish_reason=reason)
        log.close()

    cpu = cpu_of(write)
    data = log.path.read_bytes()
    flat = folder / "flat.bin"

    def write_flat() -> None:
        size = -(-len(data) // log.num_commits)
        file = os.open(flat, os.O_WRONLY | os.O_CREAT)
        for at in range(0, len(data), size):
            os.write(file, data[at : at + size])
            os.fdatasync(file)
        os.close(file)

    flat_cpu = cpu_of(write_flat)
    found = {}

    def read() -> None:
        paths = logs_before(folder, 2)
        found.update(recover(paths, run="benchmark", unsealed=range(STREAMS)).responses)

    read_cpu, tokens = cpu_of(read), STREAMS * tokens_each
    assert sum(response.length for response in found.values()) == tokens
    assert len(log.take()) == STREAMS
    return LogCost(
        piece,
        tokens,
        1e6 * cpu / tokens,
        1e6 * flat_cpu / tokens,
        len(data) / tokens,
        log.num_commits,
        1e6 * read_cpu / tokens,
    )


def measure_samples(folder: Path, samples: int) -> SampleCost:
    planned = {
        i: (Prompt(f"p/{i}", {"domain": "x"}, (1, 2, 3), 0), Request(i, f"p/{i}", (1, 2, 3)))
        for i in range(samples)
    }
    ids, probs = np.arange(20, dtype=np.int32), -np.ones(20, np.float32)
    log = new_log(folder)

    def write() -> None:
        for start in range(0, samples, STREAMS):
            chunk = [planned[i][1] for i in range(start, min(start + STREAMS, samples))]
            log.begin(chunk)
            for request in chunk:
                log.append(request.sample_id, ids, probs, version=0, finish_reason="length")
        log.close()
        log.take()

    def go_on() -> None:
        paths = logs_before(folder, 2)
        files = {p: samples_in(p, run="benchmark", unsealed=range(samples))[0] for p in paths}
        second = TokenLog(
            "again",
            log_path(folder, 2, 0),
            run="benchmark",
            engine="none",
            versions={},
            former=FormerLogs(files, "benchmark"),
        )
        second.begin(request for _, request in planned.values())
        responses.extend(second.take())
        second.close()

    def seal() -> None:
        shards = ShardWriter(folder / "trajectories", planned, SHARD, generation=2)
        for response in responses:
            shards.add(response)
        assert shards.sealed.samples == samples

    def read() -> None:
        store = TokenStore(folder / "trajectories")
        assert len(store.samples) == samples
        for sample_id in range(samples):
            assert len(store.tokens(sample_id).response_ids) == 20

    responses: list = []
    costs = [1e6 * cpu_of(work) / samples for work in (write, go_on, seal, read)]
    return SampleCost(samples, *costs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, for CI")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    arguments = parser.parse_args()
    tokens_each = 512 if arguments.quick else 8192
    sizes = (200, 2000) if arguments.quick else (10_000, 100_000)
    logs, samples = [], []
    for piece in (1, 8, 32):
        with tempfile.TemporaryDirectory(prefix="mtopd-rollout-") as name:
            cost = measure_log(Path(name), piece, tokens_each)
        logs.append(cost)
        print(
            f"log, pieces of {piece:2d}: {cost.cpu_us:5.2f} us CPU/token ({cost.flat_cpu_us:.2f} "
            f"for a flat file), {cost.bytes:5.2f} B/token, {cost.commits} commits, read back "
            f"{cost.read_cpu_us:.2f} us/token",
            flush=True,
        )
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="mtopd-rollout-") as name:
            each = measure_samples(Path(name), size)
        samples.append(each)
        print(
            f"{size:7,d} samples, us CPU each: log {each.log:.1f}, recover {each.recover:.1f}, seal "
            f"{each.seal:.1f}, read {each.read:.1f}",
            flush=True,
        )
    if arguments.json:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        machine = {
            "cpus": os.cpu_count(),
            "processor": found[1] if found else platform.machine(),
            "load": os.getloadavg()[0],
        }
        result = {
            "machine": machine,
            "log": [asdict(cost) for cost in logs],
            "samples": [asdict(each) for each in samples],
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
