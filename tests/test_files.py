"""Files and folders appear whole or not at all, and what a kill leaves is cleaned up."""

from __future__ import annotations

import errno
import os
import signal
import stat
from pathlib import Path

import pytest

from mtopd import files
from mtopd.files import one_line_errors, read_json, remove_tree, replace_tree, sweep, write_atomic
from mtopd.run_dir import SEAL, RunDir
from mtopd.types import MtopdError


def test_a_failed_write_leaves_the_old_file_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    write_atomic(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_file_system_that_syncs_no_folders_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refusal, fsync = [errno.EINVAL], os.fsync

    def fsync_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(refusal[0], os.strerror(refusal[0]))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync_files)
    monkeypatch.setattr(files, "_TOLD", set())
    for _ in range(2):
        write_atomic(tmp_path / "x", b"new")
    said = capsys.readouterr().err
    assert said.count(f"{tmp_path} lies on a file system that syncs no folders (Invalid") == 1
    refusal[0] = errno.EIO  # a disk that fails is another matter
    with pytest.raises(OSError, match=f"Input/output error: '{tmp_path}'"):
        write_atomic(tmp_path / "x", b"new")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_refused_write_names_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The system's own error of a write names none."""

    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with (
        pytest.raises(MtopdError, match=f"^{tmp_path}/x: {os.strerror(number)}; "),
        one_line_errors(),
    ):
        write_atomic(tmp_path / "x", b"new")
    assert not list(tmp_path.iterdir())


def test_errors_of_the_system_are_one_line_and_bugs_are_not(tmp_path: Path) -> None:
    for number in (errno.ENOENT, errno.EMFILE, errno.ENAMETOOLONG, errno.ELOOP):
        with (
            pytest.raises(MtopdError, match=f"^/a -> /b: {os.strerror(number)}"),
            one_line_errors(),
        ):
            raise OSError(number, os.strerror(number), "/a", None, "/b")
    with (
        pytest.raises(MtopdError, match=r"^the system refused: Too many open files; raise"),
        one_line_errors(),
    ):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    with pytest.raises(MtopdError, match="memory"), one_line_errors():
        raise MemoryError
    for other in (ConnectionRefusedError(errno.ECONNREFUSED, "no"), KeyError(1), BrokenPipeError()):
        with pytest.raises(type(other)), one_line_errors():
            raise other


def test_sweep_takes_leftovers_only(tmp_path: Path) -> None:
    for name in (
        ".a.json.12-ab.tmp",
        "kept.json",
        "iterations/.000001.abcd.removed/x",
        "checkpoints/.000002.tmp/y",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    sweep(tmp_path)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == [
        "kept.json"
    ]


def test_remove_tree_goes_in_one_visible_step(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    remove_tree(tmp_path / "folder")
    remove_tree(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def _kill_at_rename(number: int) -> None:
    """SIGKILL instead of this process's rename number ``number``, from 0."""
    rename, done = os.replace, iter(range(number))

    def replace(*paths: Path) -> None:
        if next(done, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*paths)

    os.replace = replace


@pytest.mark.parametrize(("number", "survives"), [(0, "old"), (1, "old"), (2, "new"), (3, "new")])
def test_a_checkpoint_that_is_replaced_survives_a_kill_or_its_successor_does(
    tmp_path: Path, number: int, survives: str
) -> None:
    run = RunDir(tmp_path, generation=1)
    target, partial = run.checkpoint(3), run.checkpoint(3).with_name(".000003.tmp")
    for folder, text in ((target, "old"), (partial, "new")):
        folder.mkdir(parents=True)
        (folder / SEAL).write_text(text)
    child = os.fork()
    if not child:
        try:
            _kill_at_rename(number)
            replace_tree(partial, target)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) == (number < 3), "three renames: aside, into place, out of sight"
    for _ in range(2):
        sweep(tmp_path)
        assert [path.name for path in target.parent.iterdir()] == ["000003"] and (
            target / SEAL
        ).read_text() == survives


def test_what_its_writers_have_synced_is_not_synced_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial, synced = tmp_path / ".new", []
    (partial / "inner").mkdir(parents=True)
    for name in ("large", "small", "inner/large"):
        (partial / name).write_text(name)
    descriptor_path = "/proc/self/fd/{}"
    sync = os.fsync
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: (synced.append(os.readlink(descriptor_path.format(fd))), sync(fd))[1],
    )
    replace_tree(partial, tmp_path / "new", durable={"large"})
    found = sorted(str(Path(path).relative_to(tmp_path)) for path in synced)
    assert found == [".", ".new", ".new/inner", ".new/inner/large", ".new/small"]
    assert (tmp_path / "new" / "large").read_text() == "large"


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[" * 100_000, b"9" * 5000])
def test_a_file_that_is_no_json_is_named(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(MtopdError, match=r"x\.json is not valid JSON"):
        read_json(tmp_path / "x.json")
