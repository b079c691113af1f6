"""A sample is visible after its commit and not before, whenever the writer dies; and what may be deleted."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_samples import CODE, MATH, fill, get, open_writer, put, request_of, rows_of, snapshot

from mtopd.hidden_cache import (
    HiddenCacheReader,
    discard_orphans,
    remove,
)
from mtopd.types import MtopdError


def test_uncommitted_is_absent(tmp_path: Path) -> None:
    root = tmp_path / "c"
    assert list(HiddenCacheReader(root).missing([request_of(0)])) == [request_of(0)]  # no cache yet
    writer = open_writer(root)
    put(writer, 0, n=70000)  # a shard is on disk already
    assert HiddenCacheReader(root).lookup(*request_of(0)) is None
    writer.commit()
    assert HiddenCacheReader(root).missing([request_of(0)]) == {}
    put(writer, 1)
    writer.abort()
    writer.commit()  # nothing is left to commit
    assert list(HiddenCacheReader(root).missing([request_of(0), request_of(1)])) == [request_of(1)]


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
    with pytest.raises(OSError, match="No space"):
        put(writer, 1, n=3000)
    monkeypatch.undo()
    put(writer, 2, n=3000)
    writer.commit()
    reader = HiddenCacheReader(root)
    assert list(reader.missing(map(request_of, (0, 1, 2)))) == [request_of(0), request_of(1)]
    assert np.array_equal(get(reader, 2), rows_of(2, n=3000))


def test_every_file_is_durable_before_the_next_step_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        record(name, lambda source, target: sources.setdefault(Path(target), Path(source)) and target)
    with open_writer(tmp_path / "run" / "c") as writer:
        put(writer, 0, n=70000)  # two shards
    monkeypatch.undo()

    named = [(at, path) for at, (name, path) in enumerate(events) if name in ("replace", "link", "mkdir")]
    index_at, index = named[-1]
    assert index.suffix == ".arrow" and named[-2][1].name == "zarr.json"
    assert len([path for _, path in named if path.name == "0" and path.parent.parent.name == "c"]) >= 2
    for at, path in named:
        if path in sources:
            assert ("fsync", sources[path]) in events[:at], path
        if path.name == "zarr.json" or path == index:
            for earlier_at, earlier in [event for event in named if event[0] < at]:
                assert ("fsync", earlier.parent) in events[earlier_at:at], (earlier, "is not durable before", path)
    assert ("fsync", index.parent) in events[index_at:]


def kill_at(root: Path, step: int) -> bool:
    """Run a writer in a child that is SIGKILLed before its system call number ``step``; whether it was killed."""
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
        for name in ("fsync", "mkdir", "replace", "link", "unlink", "writev"):
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
                [reader.lookup(*request_of(sample_id, teacher)) is not None for sample_id, teacher in commit]
                for commit in commits
            ]
            assert all(len(set(commit)) == 1 for commit in present), "half a commit is visible"
            counts.append(sum(commit[0] for commit in present))
            assert present == [[number < counts[-1]] * len(commit) for number, commit in enumerate(commits)]
            assert reader.verify() == {} and reader.refused == {}
            requests = [request_of(sample_id, teacher) for commit in commits for sample_id, teacher in commit]
            todo = set(reader.missing(requests))
        discard_orphans(root)
        with open_writer(root, generation=1) as writer:
            for sample_id, teacher in (sample for commit in commits for sample in commit):
                if request_of(sample_id, teacher) in todo:
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


def test_a_removal_cut_short_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize("mark", [None, "{}", '{"format": 2, "kind": "mtopd.hidden_cache"}', '{"format": 1}'])
def test_a_foreign_folder_is_refused_and_left_alone(tmp_path: Path, mark: str | None) -> None:
    (tmp_path / "precious").write_text("data")
    if mark is not None:
        (tmp_path / "FORMAT.json").write_text(mark)
    before = snapshot(tmp_path)
    for use in (remove, discard_orphans, HiddenCacheReader, open_writer):
        with pytest.raises(MtopdError, match=r"FORMAT\.json"):
            use(tmp_path)
    assert snapshot(tmp_path) == before


def test_a_link_to_a_cache_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "c", 0)
    (tmp_path / "link").symlink_to(tmp_path / "c")
    with pytest.raises(MtopdError, match="link"):
        remove(tmp_path / "link")
    assert HiddenCacheReader(tmp_path / "c").verify() == {}


def test_orphans_are_discarded_and_the_committed_stay(tmp_path: Path) -> None:
    root = tmp_path / "c"
    segment = fill(root, 0)
    writer = open_writer(root)
    put(writer, 1, n=70000)
    leftover = root / "t" / MATH[:16] / "index" / ".x.arrow.0.partial"
    leftover.write_bytes(b"half")
    discarded = discard_orphans(root)
    assert len(discarded) == 1 and not leftover.exists()
    assert list(root.glob("t/*/seg/*")) == [segment]
    assert HiddenCacheReader(root).verify() == {}
    assert discard_orphans(tmp_path / "nothing") == []
    (index,) = root.glob("t/*/index/*.arrow")
    os.replace(index, index.with_name("merged.arrow"))  # what counts is what an index names
    assert discard_orphans(root) == [] and HiddenCacheReader(root).verify() == {}
