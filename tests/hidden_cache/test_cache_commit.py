"""A sample is visible after its commit and not before, whenever the writer dies; and what may be
deleted.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_samples import (
    CODE,
    MATH,
    fill,
    flip,
    get,
    open_writer,
    put,
    row_key_of,
    rows_of,
    snapshot,
)

from mtopd.hidden_cache import (
    HiddenCacheReader,
    HiddenCacheWriter,
    Recovery,
    collect_garbage,
    committed,
    merge_index,
    recover,
    remove,
)
from mtopd.hidden_cache import reader as reader_module
from mtopd.hidden_cache import writer as writer_module
from mtopd.hidden_cache.durable import publish_if_absent
from mtopd.hidden_cache.index import IndexRow, load_index
from mtopd.hidden_cache.layout import SegmentLayout
from mtopd.hidden_cache.segment import SegmentWriter
from mtopd.types import MtopdError


def test_uncommitted_is_absent(tmp_path: Path) -> None:
    root = tmp_path / "c"
    assert list(HiddenCacheReader(root).missing([row_key_of(0)])) == [row_key_of(0)]  # no cache yet
    writer = open_writer(root)
    put(writer, 0, n=70000)  # a shard is on disk already
    assert HiddenCacheReader(root).lookup(*row_key_of(0)) is None
    writer.commit()
    assert HiddenCacheReader(root).missing([row_key_of(0)]) == {}
    put(writer, 1)
    writer.abort()
    writer.commit()  # nothing is left to commit
    assert list(HiddenCacheReader(root).missing([row_key_of(0), row_key_of(1)])) == [row_key_of(1)]


def test_an_exception_commits_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    root = tmp_path / "c"
    fill(root, 0)
    before = snapshot(root)
    with pytest.raises(KeyError), open_writer(root) as writer:
        put(writer, 1, n=70000)
        raise KeyError("the teacher pass failed")
    assert snapshot(root) == before


def test_a_failed_append_drops_the_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "c"
    writer, writev = open_writer(root), os.writev
    put(writer, 0)

    def full_disk(fd: int, buffers: list[memoryview]) -> int:
        writev(fd, [buffers[0][:100]])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "writev", full_disk)
    with pytest.raises(MtopdError, match="No space"):
        put(writer, 1, n=3000)
        writer.commit()  # the thread's own exception
    monkeypatch.undo()
    put(writer, 2, n=3000)
    writer.commit()
    reader = HiddenCacheReader(root)
    assert list(reader.missing(map(row_key_of, (0, 1, 2)))) == [row_key_of(0), row_key_of(1)]
    assert np.array_equal(get(reader, 2), rows_of(2, n=3000))


def test_every_file_is_durable_before_the_next_step_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Power loss cannot be tested by killing a process, so the order of the system calls is."""
    events: list[tuple[str, Path]] = []

    def record(name: str, path_of: Callable[..., Any]) -> None:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            events.append((name, Path(path_of(*args))))
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)

    record("fsync", lambda fd: os.readlink(f"/proc/self/fd/{fd}"))
    record("mkdir", lambda path, *_: path)
    sources: dict[Path, Path] = {}
    for name in ("replace", "link"):
        record(
            name, lambda source, target: sources.setdefault(Path(target), Path(source)) and target
        )
    with open_writer(tmp_path / "run" / "c") as writer:
        put(writer, 0, n=70000)  # two shards
    monkeypatch.undo()

    named = [
        (at, path) for at, (name, path) in enumerate(events) if name in ("replace", "link", "mkdir")
    ]
    index_at, index = named[-1]
    assert index.suffix == ".arrow" and named[-2][1].name == "zarr.json"
    assert (
        len([path for _, path in named if path.name == "0" and path.parent.parent.name == "c"]) >= 2
    )
    for at, path in named:
        if path in sources:
            assert ("fsync", sources[path]) in events[:at], path
        if path.name == "zarr.json" or path == index:
            for earlier_at, earlier in [event for event in named if event[0] < at]:
                assert ("fsync", earlier.parent) in events[earlier_at:at], (
                    earlier,
                    "is not durable before",
                    path,
                )
    assert ("fsync", index.parent) in events[index_at:]


def kill_at(root: Path, step: int) -> bool:
    """Run a writer in a child that is SIGKILLed before its system call number ``step``; whether it
    was killed.
    """
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    calls = 0

    def countdown(name: str) -> None:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == step:
                if name == "writev":
                    real(args[0], [args[1][0][:100]])  # torn
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(os, name, call)

    status = 1
    try:
        for name in ("fsync", "mkdir", "replace", "link", "unlink", "write", "writev"):
            countdown(name)
        with open_writer(root) as writer:
            put(writer, 0, 1)
            put(writer, 2, teacher=CODE)
        status = 0
    finally:
        os._exit(status)


def test_sigkill_at_every_step_leaves_whole_commits_and_rewriting_works(tmp_path: Path) -> None:
    commits = [[(0, MATH), (1, MATH)], [(2, CODE)]]
    counts, step, killed = [], 0, True
    while killed:
        step += 1
        root = tmp_path / str(step)
        killed = kill_at(root, step)
        with HiddenCacheReader(root) as reader:
            present = [
                [
                    reader.lookup(*row_key_of(sample_id, teacher)) is not None
                    for sample_id, teacher in commit
                ]
                for commit in commits
            ]
            assert all(len(set(commit)) == 1 for commit in present), "half a commit is visible"
            counts.append(sum(commit[0] for commit in present))
            assert present == [
                [number < counts[-1]] * len(commit) for number, commit in enumerate(commits)
            ]
            assert reader.verify() == {} and reader.refused == {}
            row_keys = [
                row_key_of(sample_id, teacher)
                for commit in commits
                for sample_id, teacher in commit
            ]
            todo = set(reader.missing(row_keys))
        recover(root)
        with open_writer(root, generation=1) as writer:
            for sample_id, teacher in (sample for commit in commits for sample in commit):
                if row_key_of(sample_id, teacher) in todo:
                    put(writer, sample_id, teacher=teacher)
        with HiddenCacheReader(root) as reader:
            for sample_id, teacher in (sample for commit in commits for sample in commit):
                assert np.array_equal(get(reader, sample_id, teacher), rows_of(sample_id, teacher))
        assert not list(root.rglob("*.partial"))
        assert len(list(root.glob("t/*/seg/*"))) == len(list(root.glob("t/*/index/*.arrow")))
        remove(root)
    assert counts == sorted(counts) and set(counts) == {0, 1, 2} and step > 40


def test_remove_deletes_our_folder_and_can_be_repeated(tmp_path: Path) -> None:
    fill(tmp_path / "c", 0)
    remove(tmp_path / "c")
    remove(tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_removal_cut_short_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "c", 0)

    def stop(self: Path, missing_ok: bool = False) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", stop)
    with pytest.raises(KeyboardInterrupt):
        remove(tmp_path / "c")
    monkeypatch.undo()
    assert not (tmp_path / "c" / "t").exists()
    remove(tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    "mark", [None, "{}", '{"format": 2, "kind": "mtopd.hidden_cache"}', '{"format": 1}']
)
def test_a_foreign_folder_is_refused_and_left_alone(tmp_path: Path, mark: str | None) -> None:
    (tmp_path / "precious").write_text("data")
    if mark is not None:
        (tmp_path / "FORMAT.json").write_text(mark)
    before = snapshot(tmp_path)
    for use in (remove, recover, HiddenCacheReader, open_writer):
        with pytest.raises(MtopdError, match=r"FORMAT\.json"):
            use(tmp_path)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links_has_caches_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """CIFS and exFAT answer EPERM, FUSE systems the others."""

    def refuse(source: object, target: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    publish_if_absent(tmp_path / "teacher.json", b"first")
    publish_if_absent(tmp_path / "teacher.json", b"second")
    assert (tmp_path / "teacher.json").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["teacher.json"]
    monkeypatch.setattr(os, "link", lambda source, target: os.stat("/nowhere"))
    with pytest.raises(FileNotFoundError):
        publish_if_absent(tmp_path / "other.json", b"first")
    assert [path.name for path in tmp_path.iterdir()] == ["teacher.json"]


def test_a_link_to_a_cache_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "c", 0)
    (tmp_path / "link").symlink_to(tmp_path / "c")
    with pytest.raises(MtopdError, match="link"):
        remove(tmp_path / "link")
    assert HiddenCacheReader(tmp_path / "c").verify() == {}


def killed_writer(root: Path, *sample_ids: int, n: int) -> None:
    """A writer that is SIGKILLed after the samples have been appended, before any commit."""
    child = os.fork()
    if not child:
        put(open_writer(root, generation=1), *sample_ids, n=n)
        signal.pause()
        os._exit(1)
    deadline = time.monotonic() + 30
    while sum(path.read_bytes().count(b"\n") for path in root.glob("t/*/seg/*/journal")) < len(
        sample_ids
    ):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_what_a_killed_writer_left_whole_is_saved_bit_for_bit(tmp_path: Path) -> None:
    root = tmp_path / "c"
    segment = fill(root, 0)
    killed_writer(root, 1, 2, 3, n=30000)  # the end of the third was still in memory
    leftover = root / "t" / MATH[:16] / "index" / ".x.arrow.0.partial"
    leftover.write_bytes(b"half")
    assert HiddenCacheReader(root).lookup(*row_key_of(1)) is None
    found = recover(root)
    assert found.salvaged == [row_key_of(1), row_key_of(2)] and found.dropped == [row_key_of(3)]
    assert len(found.segments) == 1 and not leftover.exists()
    with HiddenCacheReader(root) as reader:
        assert reader.verify() == {} and len(reader.entries()) == 3
        for sample_id in (1, 2):
            assert np.array_equal(get(reader, sample_id), rows_of(sample_id, n=30000))
    assert (
        len(list(root.glob("t/*/seg/*"))) == 2
        and segment.is_dir()
        and not list(root.rglob("journal"))
    )
    assert recover(root) == Recovery() == recover(tmp_path / "nothing")
    (index, _) = sorted(root.glob("t/*/index/*.arrow"))
    os.replace(index, index.with_name("merged.arrow"))  # what counts is what an index names
    assert recover(root) == Recovery() and HiddenCacheReader(root).verify() == {}


def test_recovery_never_leaves_the_cache(tmp_path: Path) -> None:
    root, outside = tmp_path / "c", tmp_path / "outside"
    fill(root, 0)
    fill(outside, 1)
    (index,) = outside.glob("t/*/index/*.arrow")
    index.unlink()  # an orphan, and not in our cache
    before = snapshot(outside)
    teacher = root / "t" / MATH[:16]
    (teacher / "seg" / "linked-0-0123abcd").symlink_to(next(outside.glob("t/*/seg/*")))
    (teacher / "seg" / "note").write_text("not ours")
    (root / "t" / CODE[:16]).symlink_to(outside / "t" / MATH[:16])
    assert recover(root) == Recovery() and collect_garbage(root) == []
    assert snapshot(outside) == before and (teacher / "seg" / "note").exists()


@pytest.mark.parametrize("place", ["chunk", "journal"])
def test_damage_ends_what_is_saved(tmp_path: Path, place: str) -> None:
    root = tmp_path / "c"
    killed_writer(root, 1, 2, 3, n=10240)  # ten chunks each
    (segment,) = root.glob("t/*/seg/*")
    if place == "chunk":
        flip(segment / "c/0/.0.partial", 15 * 8196)  # of the second sample
    else:
        flip(segment / "journal", len((segment / "journal").read_bytes()) // 2)
    assert recover(root).salvaged == [row_key_of(1)]
    with HiddenCacheReader(root) as reader:
        assert reader.verify() == {} and np.array_equal(get(reader, 1), rows_of(1, n=10240))
        assert reader.lookup(*row_key_of(2)) is None


def test_merging_leaves_one_index_and_every_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "c"
    for sample_id in range(4):
        fill(root, sample_id)
    assert len(committed(root)) == 4 and committed(tmp_path / "nothing") == []
    unlink = Path.unlink

    def stop(self: Path, missing_ok: bool = False) -> None:
        if len(list(self.parent.glob("*.arrow"))) < 4:
            raise KeyboardInterrupt
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", stop)
    with pytest.raises(KeyboardInterrupt):
        merge_index(root)
    monkeypatch.undo()
    for _ in range(3):
        with HiddenCacheReader(root) as reader:
            assert [len(reader.copies(row_key_of(sample_id))) for sample_id in range(4)] == [1] * 4
            assert reader.verify() == {}
        merge_index(root)
    (index,) = root.glob("t/*/index/*.arrow")
    assert committed(root) == [str(index.relative_to(root))]
    before = snapshot(root)
    merge_index(root)
    assert snapshot(root) == before and recover(root) == Recovery()
    index.write_bytes(b"damaged")
    # Its rows may be sound.
    assert recover(root) == Recovery() and len(list(root.glob("t/*/seg/*"))) == 4


def test_a_reader_sees_every_sample_while_indexes_are_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "c"
    for sample_id in range(3):
        fill(root, sample_id)
    merged = []

    def load_after_a_merge(path: Path, layout: SegmentLayout) -> list[IndexRow]:
        if not merged:
            merged.append(path)
            merge_index(root)
        return load_index(path, layout)

    monkeypatch.setattr(reader_module, "load_index", load_after_a_merge)
    with HiddenCacheReader(root) as reader:
        assert merged and reader.refused == {} and len(reader.entries()) == 3


def test_garbage_is_what_no_reader_will_ever_need(tmp_path: Path) -> None:
    root = tmp_path / "c"
    damaged, sound = fill(root, 0, 1), fill(root, 2)
    flip(damaged / "c/0/0", 20)
    assert collect_garbage(root) == []  # no better copy yet
    mended = fill(root, 0, 1, generation=1)
    killed_writer(root, 5, n=10)
    assert damaged.name in collect_garbage(root)
    assert set(root.glob("t/*/seg/*")) == {mended, sound}
    with HiddenCacheReader(root) as reader:
        assert reader.verify() == {} and reader.refused == {} and len(reader.entries()) == 3


def test_a_full_queue_makes_put_wait_and_a_large_sample_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, append = threading.Event(), SegmentWriter.append

    def slow(self: SegmentWriter, rows_NE: np.ndarray) -> tuple[int, int]:
        assert gate.wait(30)
        return append(self, rows_NE)

    monkeypatch.setattr(SegmentWriter, "append", slow)
    done = []

    def produce(writer: HiddenCacheWriter) -> None:
        for sample_id in range(4):
            put(writer, sample_id, n=700_000)  # 5.6 MB; two fit
            done.append(sample_id)

    with open_writer(tmp_path / "c") as writer:
        producer = threading.Thread(target=produce, args=[writer])
        producer.start()
        producer.join(1.0)
        assert done == [0, 1]
        gate.set()
        producer.join(30)
        put(writer, 4, n=2_000_000)  # larger than the queue
    assert HiddenCacheReader(tmp_path / "c").missing(map(row_key_of, range(5))) == {}


def test_a_segment_is_committed_after_its_time_or_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "c"
    writer = open_writer(root)
    monkeypatch.setattr(writer_module, "SEGMENT_SECONDS", 0.2)
    put(writer, 0)
    deadline = time.monotonic() + 30
    while HiddenCacheReader(root).lookup(*row_key_of(0)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    monkeypatch.setattr(writer_module, "SEGMENT_SECONDS", 1000)
    monkeypatch.setattr(writer_module, "SEGMENT_BYTES", 1000)
    put(writer, 1, 2, 3, n=100)  # 800 bytes each: the segment is full after two
    writer.commit()
    assert len(list(root.glob("t/*/seg/*"))) == 3
