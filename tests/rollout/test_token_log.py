"""The token log: what a kill leaves of it, and what later starts make of that."""

from __future__ import annotations

import os
import struct
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from mtopd.rollout import token_log
from mtopd.rollout.memory_log import turn_id
from mtopd.rollout.token_log import (
    FormerLogs,
    LogFile,
    TokenLog,
    carry_over,
    log_path,
    logs_before,
    read_log,
    recover,
    samples_in,
)
from mtopd.types import MtopdError


class Asked:
    def __init__(self, sample_id: int) -> None:
        self.sample_id = sample_id


def start(
    folder: Path,
    generation: int,
    former: FormerLogs | None = None,
    rank: int = 0,
    run: str = "r",
) -> TokenLog:
    return TokenLog(
        "work",
        log_path(folder, generation, rank),
        run=run,
        engine="embedded",
        versions={4: "r/1/4"},
        former=former,
    )


def ids_of(sample_id: int, count: int) -> np.ndarray:
    return (1000 * sample_id + np.arange(count)).astype(np.int32)


def log_tokens(
    log: TokenLog, sample_id: int, first: int, stop: int, reason: str | None = None
) -> None:
    ids = ids_of(sample_id, stop)[first:]
    log.append(sample_id, ids, -ids / 7, version=4, finish_reason=reason)


def unsealed(count: int = 10) -> range:
    return range(count)


@pytest.fixture
def slow_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is committed but by a flush, so that a test knows the records."""
    monkeypatch.setattr(token_log, "COMMIT_EVERY_S", 600.0)


def former_logs(folder: Path, generation: int) -> FormerLogs:
    """What the starts before have left, as a rank knows it."""
    paths = logs_before(folder, generation)
    return FormerLogs({p: samples_in(p, run="r", unsealed=unsealed())[0] for p in paths}, "r")


def logged(folder: Path, generation: int = 99) -> dict[int, int]:
    """Tokens of each sample that a start would find; every one is compared."""
    found = recover(logs_before(folder, generation), run="r", unsealed=unsealed())
    for sample_id, response in found.responses.items():
        ids = ids_of(sample_id, response.length)
        assert bytes(response.ids) == ids.tobytes()
        assert bytes(response.log_probs) == (-ids / 7).astype(np.float32).tobytes()
    return {sample_id: response.length for sample_id, response in found.responses.items()}


def test_a_log_names_every_student_before_its_tokens(tmp_path: Path) -> None:
    log = start(tmp_path, 1)
    log.begin([Asked(1)])
    log_tokens(log, 1, 0, 3)
    log.flush()
    size = log.num_bytes
    log.note_versions({4: "r/1/4"})
    assert log.num_bytes == size, "it is named already"
    log.note_versions({5: "r/1/5"})
    log.append(1, ids_of(1, 5)[3:], [-1.0, -1.0], version=5)
    log.close()
    found = read_log(log.path)
    assert found.about["versions"] == {"4": "r/1/4", "5": "r/1/5"} and found.about["run"] == "r"
    spans = recover([log.path], run="r", unsealed=unsealed()).responses[1].spans
    assert spans == [(0, 4), (3, 5)]


def test_a_tail_that_is_torn_at_any_byte_costs_that_record(
    tmp_path: Path, slow_clock: None
) -> None:
    log = start(tmp_path, 1)
    log.begin(map(Asked, range(3)))
    for sample_id in range(3):
        log_tokens(log, sample_id, 0, 5)
    log.flush()
    before = log.path.stat().st_size
    log_tokens(log, 0, 5, 8)
    log_tokens(log, 1, 5, 7, "stop")
    log.close()
    data = log.path.read_bytes()
    first = before + 8 + struct.unpack_from("<I", data, before)[0]
    assert before < first < len(data)
    for size in range(before, len(data) + 1):
        log.path.write_bytes(data[:size])
        wanted = {0: 8 if size >= first else 5, 1: 7 if size == len(data) else 5, 2: 5}
        assert logged(tmp_path) == wanted, f"{size} of {len(data)} bytes"
        assert read_log(log.path).num_torn == size - max(
            edge for edge in (before, first, len(data)) if edge <= size
        )
    # A tear in the first record: the file holds nothing.
    for size in (0, 1, 7, 8, 30):
        log.path.write_bytes(data[:size])
        assert logged(tmp_path) == {}


def test_a_damaged_byte_cuts_there(tmp_path: Path, slow_clock: None) -> None:
    log = start(tmp_path, 1)
    log.begin(map(Asked, range(2)))
    log_tokens(log, 0, 0, 5)
    log.flush()
    before = log.path.stat().st_size
    log_tokens(log, 0, 5, 8)
    log.close()
    data = bytearray(log.path.read_bytes())
    for at in range(before, len(data)):
        damaged = data.copy()
        damaged[at] ^= 0x10
        log.path.write_bytes(damaged)
        assert logged(tmp_path) == {0: 5}, f"byte {at}"


def test_a_later_start_goes_on_and_the_next_one_joins_both(tmp_path: Path) -> None:
    first = start(tmp_path, 1)
    first.begin(map(Asked, range(3)))
    log_tokens(first, 0, 0, 5)
    log_tokens(first, 1, 0, 4, "stop")
    first.close()
    assert [r.sample_id for r in first.take()] == [1]
    second = start(tmp_path, 2, former_logs(tmp_path, 2))
    held = second.begin(map(Asked, range(3)))
    assert [len(h.response_ids) for h in held] == [5, 4, 0]
    assert [h.finish_reason for h in held] == [None, "stop", None]
    (again,) = second.take()
    assert again.response_ids.tolist() == ids_of(1, 4).tolist() and again.finish_reason == "stop"
    assert second.num_continued_tokens == 9
    log_tokens(second, 0, 5, 9, "length")
    second.close()
    (response,) = second.take()
    assert response.response_ids.tolist() == ids_of(0, 9).tolist()
    assert logged(tmp_path) == {0: 9, 1: 4}
    assert read_log(second.path).records[0].start == 5, "what was there is not written again"


def test_two_starts_at_once_may_draw_the_same(tmp_path: Path, slow_clock: None) -> None:
    """The older one was not dead yet: both have written tokens 3 to 6, in other pieces."""
    old = start(tmp_path, 1)
    old.begin([Asked(0)])
    log_tokens(old, 0, 0, 3)
    old.flush()
    new = start(tmp_path, 2, former_logs(tmp_path, 2))
    new.begin([Asked(0)])
    log_tokens(new, 0, 3, 5)
    new.flush()
    log_tokens(old, 0, 3, 7)
    log_tokens(old, 0, 7, 9, "stop")
    old.close()
    log_tokens(new, 0, 5, 8)
    new.close()
    assert logged(tmp_path) == {0: 9}


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        ([0, 1, 2, 3, 99], None),  # another token
        ([0, 1, 2, 3], "stop"),  # an end where the other goes on
        ([0, 1, 2, 3, 4, 5, 6], None),  # the other has ended
    ],
)
def test_two_starts_that_drew_apart_are_refused(
    tmp_path: Path, ids: list[int], reason: str | None
) -> None:
    for generation in (1, 2):
        log = start(tmp_path, generation)
        log.begin([Asked(0)])
        if generation == 1:
            log_tokens(log, 0, 0, 5, "length")
        else:
            log.append(0, ids, [0.0] * len(ids), version=4, finish_reason=reason)
        log.close()
    with pytest.raises(
        MtopdError, match=r"log-000001-00000.bin and .*log-000002-00000.bin hold dif"
    ):
        logged(tmp_path)
    found = recover(logs_before(tmp_path, 3), run="r", unsealed={1})
    assert found.responses == {}, "of a sealed sample nothing is asked any more"


def test_tokens_behind_a_gap_are_left_out_and_counted(tmp_path: Path, slow_clock: None) -> None:
    """The first start's tail was lost after the second had read it."""
    first = start(tmp_path, 1)
    first.begin([Asked(0)])
    log_tokens(first, 0, 0, 3)
    first.flush()
    size = first.path.stat().st_size
    log_tokens(first, 0, 3, 5)
    first.close()
    second = start(tmp_path, 2, former_logs(tmp_path, 2))
    second.begin([Asked(0)])
    log_tokens(second, 0, 5, 9)
    second.close()
    os.truncate(first.path, size)
    found = recover(logs_before(tmp_path, 3), run="r", unsealed={0})
    assert found.responses[0].length == 3 and found.num_dropped == 4


def test_a_rank_reads_the_files_of_what_it_goes_on_with(
    tmp_path: Path, slow_clock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three ranks of a first start, a batch each; the second start's rank 0 took the first batch
    over and was killed, too; shard of samples 4 and 5 is sealed.
    """
    for rank in range(3):
        log = start(tmp_path, 1, rank=rank)
        log.begin([Asked(2 * rank), Asked(2 * rank + 1)])
        log_tokens(log, 2 * rank, 0, 3)
        log_tokens(log, 2 * rank + 1, 0, 4, "stop")
        log.close()
    second = start(tmp_path, 2, former_logs(tmp_path, 2))
    second.begin([Asked(0), Asked(1)])
    log_tokens(second, 0, 3, 5)
    second.close()
    paths = logs_before(tmp_path, 3)
    held = [samples_in(path, run="r", unsealed=range(4))[0] for path in paths]
    assert held == [[0, 1], [2, 3], [], [0]]
    read: list[Path] = []

    def noted(path: Path) -> LogFile:
        read.append(path)
        return read_log(path)

    monkeypatch.setattr(token_log, "read_log", noted)
    former = FormerLogs(dict(zip(paths, held, strict=True)), "r")
    third = start(tmp_path, 3, former)
    assert read == []
    assert [len(h.response_ids) for h in third.begin([Asked(4), Asked(9)])] == [0, 0]
    assert read == [], "of these nothing is held"
    assert [len(h.response_ids) for h in third.begin([Asked(0), Asked(1)])] == [5, 4]
    assert read == [paths[0], paths[3]], "each once, the oldest first"
    assert former.responses == {}, "nothing of what other ranks go on with"
    assert [len(h.response_ids) for h in third.begin([Asked(3)])] == [4]
    assert [len(h.response_ids) for h in third.begin([Asked(2)])] == [3]
    assert read == [paths[0], paths[3], paths[1]]
    third.close()


def test_a_response_that_is_in_more_files_is_not_taken_from_one(
    tmp_path: Path, slow_clock: None
) -> None:
    """Samples 0 and 1 are in the first file, 0 goes on in the second: reading 1 leaves 0 alone."""
    first = start(tmp_path, 1)
    first.begin(map(Asked, range(2)))
    log_tokens(first, 0, 0, 3)
    log_tokens(first, 1, 0, 3)
    first.close()
    second = start(tmp_path, 2, former_logs(tmp_path, 2))
    second.begin([Asked(0)])
    log_tokens(second, 0, 3, 7)
    second.close()
    third = start(tmp_path, 3, former_logs(tmp_path, 3))
    assert [len(third.begin([Asked(i)])[0].response_ids) for i in (1, 0)] == [3, 7]
    third.close()


def test_a_log_of_another_run_or_format_is_refused(tmp_path: Path) -> None:
    start(tmp_path, 1, run="other").close()
    with pytest.raises(MtopdError, match="belongs to another run"):
        logged(tmp_path)
    path = log_path(tmp_path, 1, 0)
    text = path.read_bytes()[28:].replace(b'"format": 2', b'"format": 3')
    path.write_bytes(token_log._framed(b"\xff" * 8 + bytes(12) + text))
    with pytest.raises(
        MtopdError, match="token log of format 3, this version of mtopd reads 1 and 2"
    ):
        logged(tmp_path)


def test_a_file_has_one_writer(tmp_path: Path) -> None:
    start(tmp_path, 1).close()
    with pytest.raises(FileExistsError):
        start(tmp_path, 1)


def test_nothing_is_handed_on_before_its_commit(tmp_path: Path, slow_clock: None) -> None:
    log = start(tmp_path, 1)
    log.begin(map(Asked, range(2)))
    log_tokens(log, 0, 0, 5, "stop")
    log_tokens(log, 1, 0, 5)
    assert log.take() == [] and logged(tmp_path) == {}
    log.flush()
    assert [r.sample_id for r in log.take()] == [0] and log.take() == []
    assert logged(tmp_path) == {0: 5, 1: 5}
    log.close()


def test_who_appends_waits_for_no_commit(
    tmp_path: Path, slow_clock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor for who takes: streams are read on meanwhile."""
    log = start(tmp_path, 1)
    log.begin(map(Asked, range(2)))
    log_tokens(log, 0, 0, 5, "stop")
    writes, goes_on = threading.Event(), threading.Event()

    def slow_disk(file: int) -> None:
        writes.set()
        assert goes_on.wait(120)

    monkeypatch.setattr(os, "fdatasync", slow_disk)
    committing = threading.Thread(target=log.flush)
    committing.start()
    assert writes.wait(120)
    with log._changed:
        appending = threading.Thread(target=log_tokens, args=(log, 1, 0, 5, "stop"))
        appending.start()
        appending.join(60)
        assert not appending.is_alive()
    assert log.take() == []
    goes_on.set()
    committing.join(120)
    assert [r.sample_id for r in log.take()] == [0]
    log.close()
    assert logged(tmp_path) == {0: 5, 1: 5}


def test_the_clock_commits_whether_a_response_ended_or_not(tmp_path: Path) -> None:
    log = start(tmp_path, 1)
    log.begin([Asked(0)])
    log_tokens(log, 0, 0, 5)
    deadline = time.monotonic() + 120
    while logged(tmp_path) != {0: 5}:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    log_tokens(log, 0, 5, 6, "stop")
    log.wait(120)
    assert [r.sample_id for r in log.take()] == [0]
    log.close()


def test_a_full_disk_ends_it(tmp_path: Path, slow_clock: None) -> None:
    log = start(tmp_path, 1)
    log.begin(map(Asked, range(2)))
    log_tokens(log, 0, 0, 5)
    log.flush()
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, log._file)
    os.close(full)
    log_tokens(log, 0, 5, 6, "stop")
    message = r"token log cannot be written: .*log-000001-00000.bin: No space left .* free some"
    with pytest.raises(MtopdError, match=message):
        log.flush()
    for use in (log.take, lambda: log_tokens(log, 1, 0, 1), log.close):
        with pytest.raises(MtopdError, match=message):
            use()
    assert logged(tmp_path) == {0: 5}


def test_records_stay_within_their_count(tmp_path: Path, slow_clock: None) -> None:
    """A response of more tokens than a record holds, committed at once."""
    log = start(tmp_path, 1)
    log.begin([Asked(0)])
    for first in range(0, 140_000, 10_000):
        log_tokens(log, 0, first, first + 10_000)
    log.close()
    assert logged(tmp_path) == {0: 140_000}
    assert len(read_log(log.path).records) == 3


def count_calls(work) -> int:
    """Calls of Python and C functions, and bytes are not counted: what grows with the samples."""
    calls = 0

    def note(frame, event, argument) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


def test_work_is_linear_in_samples_and_free_of_tokens(tmp_path: Path, slow_clock: None) -> None:
    def work(name: str, samples: int, tokens: int) -> int:
        folder = tmp_path / name

        def write_and_read() -> None:
            log = start(folder, 1)
            for sample_id in range(samples):
                log.begin([Asked(sample_id)])
                log.append(sample_id, np.zeros(tokens), np.zeros(tokens), version=4)
                log.append(sample_id, [1], [0.0], version=4, finish_reason="stop")
                if sample_id % 100 == 0:
                    log.flush()
            log.flush()
            log.forget(r.sample_id for r in log.take())
            log.close()
            found = recover(logs_before(folder, 2), run="r", unsealed=range(samples))
            assert len(found.responses) == samples

        return count_calls(write_and_read)

    few, many, long = work("few", 500, 4), work("many", 2000, 4), work("long", 500, 400)
    assert many < 4.2 * few
    assert long < 1.02 * few


def test_what_is_carried_over_is_one_file_that_a_start_goes_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two starts' logs of samples 0 to 4, of which 1, 2 and 4 go on: one is over, one has a second turn
    behind a reply, of one there is no token.
    """
    monkeypatch.setattr(token_log, "_MAX_COUNT", 4)
    second_turn = turn_id(2, 1)
    first = start(tmp_path / "old", 1)
    first.begin(map(Asked, range(5)))
    log_tokens(first, 0, 0, 3, "stop")
    log_tokens(first, 1, 0, 3)
    log_tokens(first, 2, 0, 2, "stop")
    first.append_reply(2, b"reply")
    first.close()
    second = start(tmp_path / "old", 2, former_logs(tmp_path / "old", 2))
    second.begin([Asked(i) for i in (1, 3, second_turn)])
    second.note_versions({5: "r/2/5"})
    ids = ids_of(1, 11)[3:]
    second.append(1, ids[:4], -ids[:4] / 7, version=5)
    second.append(1, ids[4:], -ids[4:] / 7, version=5, finish_reason="length")
    log_tokens(second, 3, 0, 1)
    second.append(second_turn, [7, 8], [-1.0, -2.0], version=5)
    second.close()
    target, paths = log_path(tmp_path / "new", 0, 0), logs_before(tmp_path / "old", 3)
    kept = {1, 2, 4}
    tokens = carry_over(paths, target, run="r", engine="embedded", samples=kept)
    assert tokens == {1: 11, 2: 4} and tokens[4] == 0
    data = target.read_bytes()
    carry_over(paths, target, run="r", engine="embedded", samples=kept)
    assert target.read_bytes() == data, "again after a kill it is the same"
    assert read_log(target).about["versions"] == {"4": "r/1/4", "5": "r/2/5"}

    third = start(tmp_path / "new", 3, former_logs(tmp_path / "new", 3))
    found = third.begin([Asked(i) for i in (1, 2, 4, second_turn)])
    third.close()
    assert [len(held.response_ids) for held in found] == [11, 2, 0, 2]
    assert [held.finish_reason for held in found] == ["length", "stop", None, None]
    np.testing.assert_array_equal(found[0].response_ids, ids_of(1, 11))
    np.testing.assert_array_equal(found[0].log_probs, (-ids_of(1, 11) / 7).astype(np.float32))
    assert third.reply(2) == b"reply" and third.reply(second_turn) is None
    over = {response.sample_id: response for response in third.take()}
    assert over.keys() == {1, 2} and over[1].version_spans == ((0, 4), (3, 5))
