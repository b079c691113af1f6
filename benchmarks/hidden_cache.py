"""Durable writes and verified reads of the hidden cache against plain system calls on the same bytes.

Every figure is a median of ratios within pairs: raw and ours alternate on the same disk in one run, because the speed
of a disk drifts.  1.0 is as fast as the bare system call; larger is better.

    write         put + commit (crc32c, journal, index, all durable) / pwrite + fsync
    read, warm    whole samples, or one quarter of the rows of each, in random order / pread
    read, cold    the same after posix_fadvise(DONTNEED) on every file
    extra memory  growth of the peak resident memory beyond the arrays that the caller holds, in a fresh process
    processes     4 writers, then 4 readers at once; every row is compared

    python benchmarks/hidden_cache.py [--quick] [--folder DIR] [--json PATH]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from mtopd.hidden_cache import HiddenCacheReader, HiddenCacheWriter, Read, Request, remove

SCHEMA_VERSION = 1
FINGERPRINT = hashlib.sha256(b"benchmark").hexdigest()
MIB = 1 << 20


def request_of(sample_id: int) -> Request:
    return Request(hashlib.sha256(str(sample_id).encode()).digest(), sample_id, 0)


def make_samples(count: int, mean_rows: int, hidden_size: int, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    lengths = random.integers(mean_rows // 2, mean_rows * 3 // 2, count)
    return [random.integers(0, 1 << 16, (int(n), hidden_size), np.uint16) for n in lengths]


def write_cache(root: Path, samples: list[np.ndarray], writer: str = "dp0", first_id: int = 0) -> None:
    with HiddenCacheWriter(root, writer=writer, generation=0, hidden_dtype="bfloat16") as cache:
        for sample_id, rows_NE in enumerate(samples, first_id):
            cache.put(FINGERPRINT, rows_NE.shape[1], *request_of(sample_id), rows_NE)


def write_raw(path: Path, samples: list[np.ndarray]) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    at = 0
    for rows_NE in samples:
        rest = memoryview(rows_NE).cast("B")
        while rest:
            done = os.pwrite(fd, rest, at)
            at, rest = at + done, rest[done:]
    os.fsync(fd)
    os.close(fd)


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def paired(repeats: int, raw: Callable[[], object], ours: Callable[[], object], before: Callable[[], object]) -> Any:
    """Ratio of raw to ours; the order within a pair alternates."""
    pairs = []
    for number in range(repeats + 1):
        taken = {}
        for call in (raw, ours) if number % 2 else (ours, raw):
            before()
            taken[call] = seconds(call)
        if number:  # the first pair warms up
            pairs.append((taken[raw], taken[ours]))
    ratios = [a / b for a, b in pairs]
    return {
        "ratio": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
        "raw_s": statistics.median(a for a, _ in pairs),
        "ours_s": statistics.median(b for _, b in pairs),
    }


def measure_write(folder: Path, samples: list[np.ndarray], repeats: int) -> Any:
    def clear() -> None:
        remove(folder / "cache")
        (folder / "raw").unlink(missing_ok=True)
        os.sync()

    result = paired(
        repeats, lambda: write_raw(folder / "raw", samples), lambda: write_cache(folder / "cache", samples), clear
    )
    return result


def forget(folder: Path) -> None:
    """Drop the pages of all files, so that the next read comes from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def measure_reads(folder: Path, samples: list[np.ndarray], repeats: int) -> dict[str, Any]:
    order = np.random.default_rng(1).permutation(len(samples))
    offsets = np.cumsum([0, *(rows_NE.nbytes for rows_NE in samples)])
    raw_out, our_out = ([np.empty_like(rows_NE) for rows_NE in samples] for _ in range(2))
    results: dict[str, Any] = {}
    with HiddenCacheReader(folder / "cache") as reader:
        entries = {entry.request.sample_id: entry for entry in reader.entries()}
        fd = os.open(folder / "raw", os.O_RDONLY)
        for what, parts in (("whole", 1), ("quarter", 4)):
            spans = {i: (len(samples[i]) // parts * (parts // 2), len(samples[i]) // parts) for i in order}

            def raw(spans: dict[int, tuple[int, int]] = spans) -> None:
                for i, (start, count) in spans.items():
                    row_bytes = samples[i].shape[1] * 2
                    out = memoryview(raw_out[i][:count]).cast("B")
                    assert os.preadv(fd, [out], int(offsets[i]) + start * row_bytes) == len(out)

            def ours(spans: dict[int, tuple[int, int]] = spans) -> None:
                reader.read_many(
                    Read(entries[i], start, start + count, our_out[i][:count]) for i, (start, count) in spans.items()
                )

            results[f"{what}_warm"] = paired(repeats, raw, ours, lambda: None)
            results[f"{what}_cold"] = paired(repeats, raw, ours, lambda: forget(folder))
            for i, (start, count) in spans.items():
                expected = samples[i][start : start + count]
                assert np.array_equal(our_out[i][:count], expected) and np.array_equal(raw_out[i][:count], expected)
        os.close(fd)
    return results


def child(what: str, root: Path, number: int, shape: tuple[int, int, int]) -> int:
    """Work of a fresh process.  Returns the bytes by which its peak memory grew beyond the caller's arrays."""
    count, mean_rows, hidden_size = shape
    samples = make_samples(count, mean_rows, hidden_size, seed=number)
    found = [np.ones_like(rows_NE) for rows_NE in samples] if what == "read" else []  # touched, so resident
    write_cache(root / f"warm{what}{number}", make_samples(1, 1, 8))  # imports and thread stacks do not count
    with HiddenCacheReader(root / f"warm{what}{number}") as reader:
        reader.verify()
    remove(root / f"warm{what}{number}")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = resident_bytes("VmRSS")
    first_id = number * count
    if what == "write":
        write_cache(root / "cache", samples, f"dp{number}", first_id)
    else:
        with HiddenCacheReader(root / "cache") as reader:
            entries = {entry.request.sample_id: entry for entry in reader.entries()}
            reader.read_many(Read(entries[first_id + i], 0, len(out), out) for i, out in enumerate(found))
    extra = resident_bytes("VmHWM") - before
    assert all(np.array_equal(a, b) for a, b in zip(found, samples, strict=False))
    return extra


def resident_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure_processes(folder: Path, num_processes: int, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Writers at once, then readers at once, each in a process of its own that checks what it read."""
    results: dict[str, Any] = {}
    for what in ("write", "read"):
        command = [sys.executable, __file__, "--child", what, "--folder", str(folder), "--shape", *map(str, shape)]
        started = time.perf_counter()
        processes = [
            subprocess.Popen([*command, "--number", str(number)], stdout=subprocess.PIPE, text=True)
            for number in range(num_processes)
        ]
        extra = []
        for process in processes:
            out, _ = process.communicate(timeout=600)
            assert process.returncode == 0, f"a {what} process failed"
            extra.append(int(out))
        results[what] = {"extra_bytes": extra, "seconds": time.perf_counter() - started}
    with HiddenCacheReader(folder / "cache") as reader:
        assert reader.verify() == {} and reader.refused == {}
        results["samples"] = len(reader.entries())
    remove(folder / "cache")
    return results


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--json", type=Path, metavar="PATH", help="default: to stdout")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="tiny and few: does it still run?  Asserts counts only")
    parser.add_argument("--child", choices=["write", "read"], help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=int, nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.child is not None:
        print(child(arguments.child, arguments.folder, arguments.number, tuple(arguments.shape)))
        return
    shape = (6, 60, 256) if arguments.quick else (37, 710, 4096)
    repeats = 1 if arguments.quick else arguments.repeats
    samples = make_samples(*shape)
    run: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "benchmark": "hidden_cache",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "protocol": {"pairs": repeats, "bytes": sum(s.nbytes for s in samples), "ratios": "raw seconds / our seconds"},
    }
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        run["write"] = measure_write(folder, samples, repeats)
        remove(folder / "cache")
        write_cache(folder / "cache", samples)
        write_raw(folder / "raw", samples)
        run["read"] = measure_reads(folder, samples, repeats)
        remove(folder / "cache")
        (folder / "raw").unlink()
        single = measure_processes(folder, 1, shape)
        run["extra_mib"] = {what: max(single[what]["extra_bytes"]) / MIB for what in ("write", "read")}
        run["processes"] = measure_processes(folder, 4, (shape[0] // 2, *shape[1:]))
        assert run["processes"]["samples"] == 4 * (shape[0] // 2)
    text = json.dumps(run, indent=2) + "\n"
    if arguments.json is None:
        print(text, end="")
    else:
        arguments.json.write_text(text)


if __name__ == "__main__":
    main()
