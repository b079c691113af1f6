"""SIGKILL at random instants over several cache writers: what was committed stays, nothing else is
ever seen.

Run ``python -m tests.hidden_cache.kill_writers --kills 60``; ``run`` raises on any violation.

A round starts one process for each writer, which writes the samples of its share that the cache
lacks, a few for each commit.  Some of them are killed: at a moment after they announced a put, or
after they announced a commit (its segment is sealed, then published).  Then all that can be read is
compared, the cache is recovered and compared again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mtopd.hidden_cache import (
    HiddenCacheReader,
    HiddenCacheWriter,
    RowKey,
    merge_index,
    recover,
    sample_key,
)
from mtopd.trajectories import token_hash

WRITERS, SAMPLES, SAMPLES_A_COMMIT = 3, 96, 5
SIZES = {"a1" * 32: 256, "b2" * 32: 384}  # teacher fingerprint -> hidden size
TIMEOUT_S = 60
# Not fork: a child then starts clean, however many threads this process has; and it need not import
# torch again.
_CHILDREN = multiprocessing.get_context("forkserver")
_CHILDREN.set_forkserver_preload(["mtopd.hidden_cache", "numpy"])


class Strike(NamedTuple):
    """Kill ``delay`` seconds after the process announced a ``word`` for the ``count``-th time."""

    word: str
    count: int
    delay: float


class Said(NamedTuple):
    """What a writer announced, in order: puts of sample ids, "commit" before and "committed" after
    each commit.
    """

    words: list[tuple[str, float]]  # with the time of arrival
    exit_code: int


def run(kills: int, folder: Path, seed: int) -> str:
    """Kill ``kills`` writers in rounds, each followed by a recovery; one line of results."""
    chance = random.Random(seed)
    (said, *_) = _round(folder / "undisturbed", range(SAMPLES), 0, [None] * WRITERS)
    wanted = _rows(folder / "undisturbed")
    assert wanted.keys() == {_row_key(sample_id) for sample_id in range(SAMPLES)}, (
        "an undisturbed run lost samples"
    )
    assert all(
        np.array_equal(rows_NE, _draw(row_key.sample_id)) for row_key, rows_NE in wanted.items()
    )
    seconds = _seconds_of_phases(said.words)

    root, generation, present, killed = folder / "killed", 0, set[RowKey](), Counter[str]()
    survived = salvaged = finished = 0
    while killed.total() < kills:
        lacking = [i for i in range(SAMPLES) if _row_key(i) not in present]
        if not lacking:
            finished, present = finished + 1, set()
            shutil.rmtree(root)
            continue
        generation += 1
        victims = chance.sample(
            range(WRITERS), min(chance.randint(1, WRITERS), kills - killed.total())
        )
        strikes = [
            _strike(chance, lacking[i::WRITERS], seconds) if i in victims else None
            for i in range(WRITERS)
        ]
        put, may_be_committed, committed = set(present), set(present), set(present)
        for said in _round(root, lacking, generation, strikes):
            assert said.exit_code in (0, -signal.SIGKILL), f"a writer ended with {said.exit_code}"
            if said.exit_code:
                killed[_phase(said)] += 1
            pending: set[RowKey] = set()
            for word, _ in said.words:
                if word == "commit":
                    may_be_committed |= pending
                elif word == "committed":
                    committed |= pending
                    pending = set()
                else:
                    pending.add(_row_key(int(word.removeprefix("put "))))
                    put |= pending
        found = _rows(root)
        assert found.keys() >= committed, "a committed sample is gone"
        assert found.keys() <= may_be_committed, "a sample is visible that nobody committed"
        recovery = recover(root)
        after = _rows(root)
        assert after.keys() >= found.keys(), "recovery lost a committed sample"
        assert after.keys() <= put, "recovery found a sample that nobody put"
        for row_key, rows_NE in after.items():
            assert np.array_equal(rows_NE, wanted[row_key]), (
                f"sample {row_key.sample_id} is not what was put"
            )
        assert after.keys() == found.keys() | set(recovery.salvaged), (
            "recovery changed something else than it says"
        )
        assert not {*recovery.dropped} & after.keys(), "recovery says that it dropped what is there"
        assert not list(root.rglob("*.partial")) and not list(root.rglob("journal")), (
            "recovery left something"
        )
        survived, salvaged, present = (
            survived + len(found),
            salvaged + len(after) - len(found),
            set(after),
        )
    _round(
        root,
        [i for i in range(SAMPLES) if _row_key(i) not in present],
        generation + 1,
        [None] * WRITERS,
    )
    merge_index(root)  # as a pass does at its end
    found = _rows(root)
    assert found.keys() == wanted.keys(), "the next run did not finish"
    assert all(np.array_equal(found[row_key], wanted[row_key]) for row_key in wanted)
    phases = ", ".join(f"{count} while {phase}" for phase, count in sorted(killed.items()))
    return (
        f"cache writers: {killed.total()} SIGKILLs ({phases}), {survived} committed samples read "
        "after them, all "
        f"intact; {salvaged} more salvaged; {finished + 1} runs finished, equal to an undisturbed "
        "one"
    )


def _round(
    root: Path, sample_ids: list[int] | range, generation: int, strikes: list[Strike | None]
) -> list[Said]:
    """All writers at once, each with its share of the samples; those with a strike are killed."""
    writers = []
    for number in range(WRITERS):
        ours, theirs = _CHILDREN.Pipe(duplex=False)
        arguments = (root, number, generation, list(sample_ids)[number::WRITERS], theirs)
        process = _CHILDREN.Process(target=_write, args=arguments, daemon=True)
        process.start()
        theirs.close()
        writers.append((process, ours))
    with ThreadPoolExecutor(WRITERS) as pool:
        return list(pool.map(_follow, *zip(*writers, strict=True), strikes))


def _follow(process: BaseProcess, pipe: Connection, strike: Strike | None) -> Said:
    words: list[tuple[str, float]] = []
    try:
        with suppress(EOFError):
            while pipe.poll(TIMEOUT_S):
                words.append((pipe.recv_bytes().decode(), time.perf_counter()))
                if strike and words[-1][0].startswith(strike.word):
                    strike = strike._replace(count=strike.count - 1)
                    if strike.count == 0:
                        time.sleep(strike.delay)
                        process.kill()
        process.join(TIMEOUT_S)
        assert process.exitcode is not None, f"a writer hangs after {words[-3:]}"
        return Said(words, process.exitcode)
    finally:
        process.kill()


def _write(
    root: Path, number: int, generation: int, sample_ids: list[int], pipe: Connection
) -> None:
    """The body of a writer process; ends with the interpreter's status, 1 after an exception."""

    def say(word: str) -> None:
        pipe.send_bytes(word.encode())

    def commit() -> None:
        say("commit")
        writer.commit()
        say("committed")

    with HiddenCacheWriter(
        root, writer=f"w{number}", generation=generation, hidden_dtype="bfloat16"
    ) as writer:
        # A teacher's samples stand together, as in a teacher pass: another teacher begins another
        # segment.
        for teacher in SIZES:
            own = [sample_id for sample_id in sample_ids if _teacher(sample_id) == teacher]
            for count, sample_id in enumerate(own, 1):
                rows_NE, row_key = _draw(sample_id), _row_key(sample_id)
                say(f"put {sample_id}")
                writer.put(teacher, SIZES[teacher], *row_key, rows_NE)
                if count % SAMPLES_A_COMMIT == 0 or count == len(own):
                    commit()


def _teacher(sample_id: int) -> str:
    return list(SIZES)[sample_id // WRITERS % len(SIZES)]


def _row_key(sample_id: int) -> RowKey:
    key = sample_key(_teacher(sample_id), token_hash([1, 2], [sample_id, 3], [1, 1]), "bfloat16")
    return RowKey(key, sample_id, student_version=7)


def _draw(sample_id: int) -> np.ndarray:
    """The rows of a sample, 100 to 1300, from its number alone."""
    draw = np.random.default_rng(sample_id)
    return draw.integers(
        0, 1 << 16, (draw.integers(100, 1301), SIZES[_teacher(sample_id)]), np.uint16
    )


def _rows(root: Path) -> dict[RowKey, np.ndarray]:
    """Every sample that the cache says it has; raises CacheMiss where one cannot be read soundly."""
    rows = {}
    with HiddenCacheReader(root) as reader:
        assert not reader.refused, reader.refused
        for row_key in map(_row_key, range(SAMPLES)):
            entry = reader.lookup(*row_key)
            if entry is not None:
                rows[row_key] = np.empty(
                    (entry.n_tokens, entry.layout.hidden_size), entry.layout.dtype
                )
                reader.read(entry, rows[row_key])
    return rows


def _strike(chance: random.Random, sample_ids: list[int], seconds: dict[str, float]) -> Strike:
    """Half of the kills while appending, half while sealing and committing, anywhere inside."""
    word = chance.choice(["put", "commit"])
    most = len(sample_ids) if word == "put" else -(-len(sample_ids) // SAMPLES_A_COMMIT)
    return Strike(word, chance.randint(1, max(most, 1)), chance.uniform(0, 1.2 * seconds[word]))


def _seconds_of_phases(words: list[tuple[str, float]]) -> dict[str, float]:
    """Mean seconds from an announcement to the next one."""
    spans: dict[str, list[float]] = {"put": [], "commit": []}
    for (word, begin), (_, end) in pairwise(words):
        if word != "committed":
            spans[word.split()[0]].append(end - begin)
    return {word: sum(found) / len(found) for word, found in spans.items()}


def _phase(said: Said) -> str:
    last = said.words[-1][0].split()[0] if said.words else "start"
    return {"put": "appending", "commit": "committing"}.get(last, "between commits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mtopd-kill-writers-") as folder:
        print(run(arguments.kills, Path(folder), arguments.seed))


if __name__ == "__main__":
    main()
