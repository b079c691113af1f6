"""Speed and memory of the hidden cache, beside plain system calls that move the same bytes.

    python benchmarks/hidden_cache.py --json benchmarks/results/hidden_cache_2core_cpu.json
    python benchmarks/hidden_cache.py --quick

Sections, for each shape (samples of 100 to 1300 tokens, random bits):

    write      until the samples are committed and durable, over one pwrite for each sample into one file and an fsync
    read       samples in random order into a mini-batch's buffer, over one pread for each sample from one flat file:
               whole samples, warm and cold (posix_fadvise DONTNEED), and a random quarter of each
               sample's rows, warm; the cache gets as many samples in one call as the buffer holds,
               the plain reader has one thread
    memory     growth of a fresh process's peak resident memory (VmHWM) while it writes, and while it reads all; without
               one sample's rows (writer: its caller's), without the buffer that is read into, and
               after one tiny sample, so that library code is loaded; freed arrays leave at once
               (MALLOC_MMAP_THRESHOLD_), because what glibc keeps of them depends on everything else
               in a process
    processes  the same with 4 writer and 4 reader processes at once, all bytes over the time from the first start to
               the last end; then writers and readers together, every row compared

A ratio is the speed of the cache over the plain one's: the median over pairs that were measured in
turn.  Only counts are asserted, never times.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from mtopd.dtypes import item_size, numpy_dtype
from mtopd.hidden_cache import (
    HiddenCacheReader,
    HiddenCacheWriter,
    Read,
    RowKey,
    remove,
    sample_key,
)
from mtopd.trajectories import token_hash

MIB = 1 << 20
TEACHER = "a1" * 32
PROCESSES = 4
# Not fork: a child then starts clean, however many threads this process has; and it need not import
# torch again.
_CHILDREN = multiprocessing.get_context("forkserver")
_CHILDREN.set_forkserver_preload(["mtopd.hidden_cache", "numpy"])
TARGETS = {
    "write": 0.7,
    "read_whole_warm": 0.35,
    "read_whole_cold": 0.7,
    "read_quarter_warm": 0.25,
    "extra_memory_mib": 16,
}


@dataclass(frozen=True)
class Spec:
    """What a section works on."""

    hidden_size: int
    hidden_dtype: str
    num_samples: int
    buffer_mib: int  # that is read into, as large as a rank's share of a mini-batch
    repeats: int

    @property
    def row_bytes(self) -> int:
        return self.hidden_size * item_size(self.hidden_dtype)


class Samples:
    """Samples of one process: contiguous views into a pool of random bits, each from a place of its
    own.
    """

    def __init__(self, spec: Spec, first: int = 0) -> None:
        draw = np.random.default_rng(first)
        lengths = draw.integers(100, 1301, spec.num_samples)
        pool_rows = max(1300 + spec.num_samples, 32 * MIB // spec.row_bytes)
        bits = draw.integers(0, 256, pool_rows * spec.row_bytes, np.uint8)
        pool_NE = bits.view(numpy_dtype(spec.hidden_dtype)).reshape(pool_rows, spec.hidden_size)
        starts = draw.choice(pool_rows - 1300, spec.num_samples, replace=False)
        self.spec = spec
        self.ids = list(range(first, first + spec.num_samples))
        self.rows = [pool_NE[start : start + n] for start, n in zip(starts, lengths, strict=True)]
        self.num_rows = int(lengths.sum())
        self.num_bytes = self.num_rows * spec.row_bytes
        self.pool_NE = pool_NE

    def row_key(self, index: int) -> RowKey:
        return RowKey(
            sample_key(TEACHER, token_hash([1], [self.ids[index]], [1]), self.spec.hidden_dtype),
            self.ids[index],
            0,
        )


# -- what is compared ------------------------------------------------------------------------------


def write_plain(samples: Samples, path: Path) -> None:
    """One file, one pwrite for each sample, one fsync at the end."""
    descriptor, offset = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 0
    for rows_NE in samples.rows:
        rest = rows_NE.data.cast("B")
        while rest:
            moved = os.pwrite(descriptor, rest, offset)
            offset, rest = offset + moved, rest[moved:]
    os.fsync(descriptor)
    os.close(descriptor)
    assert offset == samples.num_bytes


def write_cache(samples: Samples, root: Path, writer: str = "w") -> None:
    spec = samples.spec
    with HiddenCacheWriter(
        root, writer=writer, generation=0, hidden_dtype=spec.hidden_dtype
    ) as cache:
        for index, rows_NE in enumerate(samples.rows):
            cache.put(TEACHER, spec.hidden_size, *samples.row_key(index), rows_NE)


class Reading:
    """Samples in a random order into consecutive places of one buffer that is used again, as a
    mini-batch's is.
    """

    def __init__(self, samples: Samples, flat: Path, root: Path) -> None:
        spec = samples.spec
        self.samples, self.flat, self.root = samples, flat, root
        lengths = [len(rows_NE) for rows_NE in samples.rows]
        self.offsets = np.cumsum([0, *lengths[:-1]])
        self.order = np.random.default_rng(1).permutation(len(lengths)).tolist()
        # Of each sample one quarter, not always the first: [start, stop).
        quarters = np.random.default_rng(2).integers(0, 4, len(lengths)).tolist()
        self.quarters = [
            (q * n // 4, (q + 1) * n // 4) for q, n in zip(quarters, lengths, strict=True)
        ]
        self.wholes = [(0, n) for n in lengths]
        rows = max(spec.buffer_mib * MIB // spec.row_bytes, 1300)
        self.buffer_NE = np.full((rows, spec.hidden_size), 1, numpy_dtype(spec.hidden_dtype))
        self.reader = HiddenCacheReader(root)
        found = [self.reader.lookup(*samples.row_key(index)) for index in range(len(lengths))]
        self.entries = [entry for entry in found if entry is not None]
        assert len(self.entries) == len(lengths) and not self.reader.refused

    def places(
        self, parts: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[int, int, int, np.ndarray]]:
        """Sample index, its rows [start, stop), where they go."""
        at = 0
        for index in self.order:
            start, stop = parts[index]
            at = at if at + stop - start <= len(self.buffer_NE) else 0
            yield index, start, stop, self.buffer_NE[at : at + stop - start]
            at += stop - start

    def plain(self, parts: Sequence[tuple[int, int]]) -> int:
        """Rows read with one pread for each sample."""
        row_bytes, num_rows = self.samples.spec.row_bytes, 0
        descriptor = os.open(self.flat, os.O_RDONLY)
        for index, start, stop, out_NE in self.places(parts):
            rest, offset = out_NE.data.cast("B"), (int(self.offsets[index]) + start) * row_bytes
            while rest:
                moved = os.preadv(descriptor, [rest], offset)
                offset, rest = offset + moved, rest[moved:]
            num_rows += stop - start
        os.close(descriptor)
        return num_rows

    def cache(self, parts: Sequence[tuple[int, int]]) -> int:
        """Rows read from the cache, verified; as many samples in one call as the buffer holds."""
        num_rows, reads = 0, list[Read]()
        for index, start, stop, out_NE in self.places(parts):
            # The buffer is full: start again at its beginning.
            if reads and out_NE.ctypes.data == self.buffer_NE.ctypes.data:
                self.reader.read_many(reads)
                reads = []
            reads.append(Read(self.entries[index], start, stop, out_NE))
            num_rows += stop - start
        self.reader.read_many(reads)
        return num_rows

    def compare(self, parts: Sequence[tuple[int, int]]) -> int:
        """Read and compare every row; returns their number."""
        num_rows = 0
        for index, start, stop, out_NE in self.places(parts):
            out_NE[:] = 0
            self.reader.read_rows(self.entries[index], start, stop, out_NE)
            wanted_NE = self.samples.rows[index][start:stop]
            # Bits, not numbers: random bits hold NaNs.
            assert np.array_equal(out_NE.view(np.uint8), wanted_NE.view(np.uint8)), (
                f"wrong rows of sample {index}"
            )
            num_rows += stop - start
        return num_rows


def files(place: Path) -> list[Path]:
    return [path for path in place.rglob("*") if path.is_file()] if place.is_dir() else [place]


def drop_from_page_cache(*places: Path) -> None:
    for path in (path for place in places for path in files(place)):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def in_turn(
    repeats: int,
    num_bytes: int,
    plain: Callable[[], Any],
    cache: Callable[[], Any],
    before: Callable[[], None],
) -> dict[str, Any]:
    """Ratios of speed, cache over plain, of pairs measured in turn; a first pair is not counted."""
    times: dict[str, list[float]] = {"plain": [], "cache": []}
    calls = [("plain", plain), ("cache", cache)]
    for repeat in range(-1, repeats):
        for name, call in calls if repeat % 2 else calls[::-1]:
            before()
            started = time.perf_counter()
            seconds = call()
            taken = time.perf_counter() - started if seconds is None else seconds
            if repeat >= 0:
                times[name].append(taken)
    return compared(times, num_bytes)


def compared(times: dict[str, list[float]], num_bytes: int) -> dict[str, Any]:
    ratios = [plain / cache for plain, cache in zip(times["plain"], times["cache"], strict=True)]
    gb_per_s = {
        name: round(num_bytes / 1e9 / statistics.median(found), 3) for name, found in times.items()
    }
    spread = {
        "median": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
        "repeats": len(ratios),
    }
    return {"ratio": {k: round(v, 3) for k, v in spread.items()}, "gb_per_s": gb_per_s}


# -- one process -----------------------------------------------------------------------------------


def measure_write(spec: Spec, folder: Path) -> dict[str, Any]:
    samples = Samples(spec)
    flat, root = folder / "flat", folder / "cache"

    def clear() -> None:
        """Not timed: removing the files of the pair before, which the file system's journal else
        does with ours.
        """
        flat.unlink(missing_ok=True)
        remove(root)
        os.sync()

    result = in_turn(
        spec.repeats,
        samples.num_bytes,
        lambda: write_plain(samples, flat),
        lambda: write_cache(samples, root),
        clear,
    )
    write_cache(samples, root)
    write_plain(samples, flat)
    reading = Reading(samples, flat, root)
    assert reading.compare(reading.wholes) == samples.num_rows
    stored = sum(path.stat().st_size for path in files(root))
    clear()
    return {
        **result,
        "mib": round(samples.num_bytes / MIB, 1),
        "stored_over_rows": round(stored / samples.num_bytes, 4),
    }


def measure_read(spec: Spec, folder: Path) -> dict[str, Any]:
    samples = Samples(spec)
    flat, root = folder / "flat", folder / "cache"
    write_plain(samples, flat)
    write_cache(samples, root)
    reading = Reading(samples, flat, root)
    results = {}
    for name, parts, is_cold in (
        ("whole_warm", reading.wholes, False),
        ("whole_cold", reading.wholes, True),
        ("quarter_warm", reading.quarters, False),
    ):
        wanted = sum(stop - start for start, stop in parts)

        def before(is_cold: bool = is_cold) -> None:
            if is_cold:
                drop_from_page_cache(flat, root)

        def counted(call: Callable[..., int], parts: Any = parts, wanted: int = wanted) -> None:
            found = call(parts)
            assert found == wanted, (found, wanted)

        reads_before = reading.reader.bytes_read
        results[f"read_{name}"] = in_turn(
            spec.repeats,
            wanted * spec.row_bytes,
            partial(counted, reading.plain),
            partial(counted, reading.cache),
            before,
        )
        per_pass = (reading.reader.bytes_read - reads_before) / (spec.repeats + 1)
        results[f"read_{name}"]["bytes_read_over_rows"] = round(
            per_pass / (wanted * spec.row_bytes), 3
        )
        assert reading.compare(parts) == wanted
    reading.reader.close()
    flat.unlink()
    remove(root)
    return results


# -- memory, in a process of its own ---------------------------------------------------------------


def status_bytes(field: str) -> int:
    """A line of /proc/self/status: VmRSS, VmHWM."""
    (found,) = re.findall(
        rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE
    )
    return int(found) * 1024


def reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    return status_bytes("VmRSS")


def measure_memory(what: str, spec: Spec, folder: Path) -> int:
    """Bytes by which this process's peak grew beyond its caller's arrays."""
    samples, root, warm = Samples(spec), folder / "cache", folder / f"warm-{what}"
    tiny = Samples(Spec(8, spec.hidden_dtype, 1, 1, 1))
    write_cache(tiny, warm)
    with HiddenCacheReader(warm) as reader:
        assert reader.verify() == {}
    remove(warm)
    if what == "read":
        rows = max(spec.buffer_mib * MIB // spec.row_bytes, 1300)
        out_NE = np.full((rows, spec.hidden_size), 1, numpy_dtype(spec.hidden_dtype))
        before = reset_peak()
        with HiddenCacheReader(root) as reader:
            reads, at = list[Read](), 0
            for entry in reader.entries():
                if at + entry.n_tokens > rows:
                    reader.read_many(reads)
                    reads, at = [], 0
                reads.append(Read(entry, 0, entry.n_tokens, out_NE[at : at + entry.n_tokens]))
                at += entry.n_tokens
            reader.read_many(reads)
        return status_bytes("VmHWM") - before
    before = reset_peak()
    with HiddenCacheWriter(root, writer="m", generation=0, hidden_dtype=spec.hidden_dtype) as cache:
        for index, rows_NE in enumerate(samples.rows):
            # An array of its own for each put, as a pass makes it: what waits in the writer counts
            # as the writer's.
            cache.put(TEACHER, spec.hidden_size, *samples.row_key(index), rows_NE.copy())
    return status_bytes("VmHWM") - before - 1300 * spec.row_bytes


def memory_of_processes(spec: Spec, folder: Path) -> dict[str, Any]:
    extra = {}
    for what in ("write", "read"):
        request = json.dumps({"memory": what, "spec": asdict(spec), "folder": str(folder)})
        command = [sys.executable, "-W", "ignore", __file__, "--worker", request]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(256 << 10)}
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=600, env=environment
        )
        extra[what] = round(max(int(done.stdout), 0) / MIB, 1)
    remove(folder / "cache")
    return {"extra_mib": extra, "rows_mib": round(Samples(spec).num_bytes / MIB, 1)}


# -- several processes at once ---------------------------------------------------------------------


class Worker:
    """A process that carries out one request after another."""

    def __init__(self, number: int, spec: Spec, folder: Path) -> None:
        self._pipe, theirs = _CHILDREN.Pipe()
        self._process = _CHILDREN.Process(
            target=serve, args=(theirs, number, spec, folder), daemon=True
        )
        self._process.start()
        theirs.close()
        self.num_bytes, self.num_rows = self.ask("size")

    def ask(self, request: str, *arguments: float) -> Any:
        self._pipe.send((request, *arguments))
        if not self._pipe.poll(600):
            raise TimeoutError(f"a process did not finish {request} within 600 s")
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.close()  # ends its loop
        self._process.join(60)
        self._process.kill()


def serve(pipe: Connection, number: int, spec: Spec, folder: Path) -> None:
    """The body of a worker: its own samples and files, the cache's root is everybody's."""
    samples = Samples(spec, first=number * spec.num_samples)
    flat, root = folder / f"flat-{number}", folder / "cache"
    reading: Reading | None = None
    while True:
        try:
            request, *arguments = pipe.recv()
        except EOFError:
            return
        if request == "size":
            pipe.send((samples.num_bytes, samples.num_rows))
            continue
        if request == "open":
            reading = Reading(samples, flat, root)
        calls: dict[str, Callable[[], Any]] = {
            "open": lambda: 0,
            "write plain": lambda: write_plain(samples, flat),
            "write cache": lambda: write_cache(samples, root, writer=f"w{number}"),
            "write again": lambda: write_cache(samples, folder / "again", writer=f"w{number}"),
        }
        if reading is not None:
            calls["read plain"] = partial(reading.plain, reading.wholes)
            calls["read cache"] = partial(reading.cache, reading.wholes)
            calls["compare"] = partial(reading.compare, reading.wholes)
        time.sleep(max(0.0, arguments[0] - time.monotonic()))  # all start at once
        started = time.monotonic()
        count = calls[request]()
        pipe.send((started, time.monotonic(), count))


@contextmanager
def workers(spec: Spec, folder: Path) -> Iterator[list[Worker]]:
    with ThreadPoolExecutor(PROCESSES) as pool:
        started = list(pool.map(lambda number: Worker(number, spec, folder), range(PROCESSES)))
    try:
        yield started
    finally:
        for worker in started:
            worker.close()


def at_once(asked: Sequence[tuple[Worker, str]]) -> tuple[float, list[Any]]:
    """Seconds from the first start to the last end, and the counts."""
    start = time.monotonic() + 0.05
    with ThreadPoolExecutor(len(asked)) as pool:
        done = list(pool.map(lambda pair: pair[0].ask(pair[1], start), asked))
    return max(end for _, end, _ in done) - min(begin for begin, _, _ in done), [
        count for _, _, count in done
    ]


def measure_processes(spec: Spec, folder: Path) -> dict[str, Any]:
    # Together as many as one process alone.
    spec = replace(spec, num_samples=spec.num_samples // PROCESSES)
    root, results = folder / "cache", {}
    with workers(spec, folder) as first, workers(spec, folder) as second:
        num_bytes, num_rows = (
            sum(worker.num_bytes for worker in first),
            [worker.num_rows for worker in first],
        )

        def clear() -> None:
            remove(root)
            for path in folder.glob("flat-*"):
                path.unlink()
            os.sync()

        def all_do(request: str) -> Callable[[], float]:
            return lambda: at_once([(worker, request) for worker in first])[0]

        results["write_4_processes"] = in_turn(
            spec.repeats, num_bytes, all_do("write plain"), all_do("write cache"), clear
        )
        clear()
        for request in ("write plain", "write cache", "open"):
            at_once([(worker, request) for worker in first])
        results["read_4_processes"] = in_turn(
            spec.repeats, num_bytes, all_do("read plain"), all_do("read cache"), lambda: None
        )
        # Four writers and four readers together; then what was written meanwhile is compared, too.
        _, counts = at_once([(w, "compare") for w in first] + [(w, "write again") for w in second])
        assert counts[:PROCESSES] == num_rows, (counts, num_rows)
        remove(root)
        os.rename(folder / "again", root)
        at_once([(worker, "open") for worker in second])
        _, counts = at_once([(worker, "compare") for worker in second])
        assert counts == num_rows, (counts, num_rows)
        results["rows_compared"] = 2 * sum(num_rows)
    clear()
    return results


# -- the whole run ---------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {"cpus": os.cpu_count(), "processor": found[1] if found else platform.machine()}


def missed(results: dict[str, Any]) -> list[str]:
    """Targets that this run did not reach, for the reader of the output; never a failure."""
    found = []
    for shape, sections in results.items():
        ratios = {"write": sections["write"], **sections["read"]}
        for name, measured in ratios.items():
            if measured["ratio"]["median"] < TARGETS[name]:
                found.append(f"{shape} {name}: {measured['ratio']['median']} < {TARGETS[name]}")
        for name, mib in sections["memory"]["extra_mib"].items():
            if mib > TARGETS["extra_memory_mib"]:
                found.append(
                    f"{shape} extra memory of {name}: {mib} > {TARGETS['extra_memory_mib']} MiB"
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="small samples, few repeats: a smoke test of the code"
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument(
        "--folder", type=Path, help="where files are made (2 GiB); default: a temporary one"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        request = json.loads(arguments.worker)
        print(measure_memory(request["memory"], Spec(**request["spec"]), Path(request["folder"])))
        return
    repeats = 2 if arguments.quick else 9
    if arguments.quick:
        specs = [Spec(64, "bfloat16", 12, 1, repeats), Spec(32, "float32", 12, 1, repeats)]
    else:
        specs = [Spec(4096, "bfloat16", 48, 64, repeats), Spec(512, "float32", 192, 64, repeats)]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="hidden-cache-") as name:
        for spec in specs:
            shape = f"{spec.hidden_dtype}_{spec.hidden_size}"
            results[shape] = {"spec": asdict(spec)}
            for section, measure in (
                ("write", measure_write),
                ("read", measure_read),
                ("memory", memory_of_processes),
                ("processes", measure_processes),
            ):
                results[shape][section] = measure(spec, Path(name))
                print(shape, section, json.dumps(results[shape][section], indent=1), flush=True)
    for line in [] if arguments.quick else missed(results):
        print("target missed:", line)
    if arguments.json:
        when = datetime.now(UTC).isoformat(timespec="seconds")
        document = {
            "schema": 1,
            "when": when,
            "machine": machine(),
            "quick": arguments.quick,
            "targets": TARGETS,
        }
        arguments.json.write_text(json.dumps({**document, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
