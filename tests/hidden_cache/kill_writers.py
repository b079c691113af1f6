"""SIGKILLs at random instants over real writer processes, then recovery; every claim is checked after each kill.

python -m tests.hidden_cache.kill_writers --kills 60
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mtopd.hidden_cache import HiddenCacheReader, HiddenCacheWriter, Request, merge_index, recover, sample_key

TEACHERS = {"a1" * 32: 256, "b2" * 32: 384}  # fingerprint: hidden size
SAMPLES, COMMIT_EVERY, WRITERS = 240, 20, 2
_TIMEOUT_S = 120.0


def request_of(sample_id: int) -> Request:
    return Request(sample_key(teacher_of(sample_id), [1], [sample_id], [1], "bfloat16"), sample_id, 0)


def teacher_of(sample_id: int) -> str:
    return list(TEACHERS)[sample_id % 4 // 2]


def rows_of(sample_id: int) -> np.ndarray:
    random_numbers = np.random.default_rng(sample_id)
    n = int(random_numbers.integers(0, 3000))
    return random_numbers.integers(0, 1 << 16, (n, TEACHERS[teacher_of(sample_id)]), np.uint16)


def write(root: Path, writer: int, generation: int) -> None:
    """What a replica does: the samples that are its own and not there yet."""
    with HiddenCacheReader(root) as reader:
        todo = [i for i in range(writer, SAMPLES, WRITERS) if reader.lookup(*request_of(i)) is None]
    with HiddenCacheWriter(root, writer=f"dp{writer}", generation=generation, hidden_dtype="bfloat16") as cache:
        for number, sample_id in enumerate(sorted(todo, key=teacher_of)):
            teacher = teacher_of(sample_id)
            cache.put(teacher, TEACHERS[teacher], *request_of(sample_id), rows_of(sample_id))
            if number % COMMIT_EVERY == COMMIT_EVERY - 1:
                cache.commit()


def start(root: Path, generation: int) -> list[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "tests.hidden_cache.kill_writers", "--root", str(root)]
    here = Path(__file__).parents[2]
    return [
        subprocess.Popen(
            [*command, "--writer", str(w), "--generation", str(generation)], cwd=here, stdout=subprocess.DEVNULL
        )
        for w in range(WRITERS)
    ]


def check(root: Path, known: set[int]) -> set[int]:
    """The samples that are visible: all of ``known``, each equal to its source; raises otherwise."""
    with HiddenCacheReader(root) as reader:
        if reader.refused or (bad := reader.verify()):
            raise AssertionError(f"damaged after a kill: {reader.refused or bad}")
        visible = {entry.request.sample_id for entry in reader.entries()}
        for entry in reader.entries():
            out_NE = np.empty((entry.n_tokens, entry.layout.hidden_size), np.uint16)
            reader.read(entry, out_NE)
            if not np.array_equal(out_NE, rows_of(entry.request.sample_id)):
                raise AssertionError(f"sample {entry.request.sample_id} has other rows than were put")
    if lost := known - visible:
        raise AssertionError(f"committed samples were lost: {sorted(lost)}")
    return visible


def run(kills: int, folder: Path, seed: int) -> str:
    """Kill writers ``kills`` times, starting over whenever a cache is complete; one line of results.

    Raises AssertionError on any violation: a committed sample lost or changed, something uncommitted or damaged
    visible, a finished cache that differs from an undisturbed one.
    """
    instants = random.Random(seed)
    done = salvaged = finished = 0
    generation, known, root = 0, set[int](), folder / "cache"
    while True:
        generation += 1
        processes = start(root, generation)
        try:
            if done < kills:
                deadline = time.monotonic() + _TIMEOUT_S
                while not list(root.glob(f"t/*/seg/*-{generation}-*")) and any(p.poll() is None for p in processes):
                    assert time.monotonic() < deadline, "the writers do not start"
                    time.sleep(0.005)
                for process in instants.sample(processes, WRITERS):
                    time.sleep(instants.uniform(0, 0.25))
                    if process.poll() is None:
                        process.send_signal(signal.SIGKILL)
                        done += 1
            codes = [process.wait(_TIMEOUT_S) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        assert set(codes) <= {0, -signal.SIGKILL}, f"a writer failed: {codes}"
        known = check(root, known)
        found = recover(root)
        salvaged += len(found.salvaged)
        visible = check(root, known)
        said = {request.sample_id for request in found.salvaged}
        assert visible == known | said, "recovery changed more than it says"
        known = visible
        assert not list(root.rglob("*.partial")) and not list(root.rglob("journal")), "recovery left something"
        if len(known) == SAMPLES:
            merge_index(root)
            check(root, known)
            finished += 1
            if done >= kills:
                return f"{done} kills, {salvaged} samples salvaged, {finished} caches finished, 0 lost, 0 changed"
            shutil.rmtree(root)
            known = set()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    for name in ("--writer", "--generation"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.root is not None:
        write(arguments.root, arguments.writer, arguments.generation)
        return
    with tempfile.TemporaryDirectory() as folder:
        print(run(arguments.kills, Path(folder), arguments.seed))


if __name__ == "__main__":
    main()
