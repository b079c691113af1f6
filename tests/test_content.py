"""Contents of files: the same wherever they lie, read once as long as nothing changes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mtopd import content
from mtopd.content import ContentNotes, digest
from mtopd.types import MtopdError


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read, in order."""
    read: list[str] = []
    sha256 = content._sha256

    def counted(path: Path) -> str:
        read.append(path.name)
        return sha256(path)

    monkeypatch.setattr(content, "_sha256", counted)
    return read


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "_SETTLED_NS", -1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model" / "inner").mkdir(parents=True)
    for name in ("a.bin", "inner/b.bin", ".hidden", "inner/.hidden"):
        (tmp_path / "model" / name).write_bytes(name.encode())
    return tmp_path / "model"


@pytest.mark.usefixtures("settled")
def test_what_did_not_change_is_not_read_again(
    folder: Path, tmp_path: Path, reads: list[str]
) -> None:
    notes = ContentNotes(tmp_path / "notes.json")
    first = notes.content_of(folder)
    assert sorted(first) == ["a.bin", "inner/b.bin"] and reads == ["a.bin", "b.bin"]
    notes.save()
    again = ContentNotes(tmp_path / "notes.json")
    assert again.content_of(folder) == first and len(reads) == 2
    # The same size and the time put back: the time of the inode tells.
    before = (folder / "a.bin").stat()
    (folder / "a.bin").write_bytes(b"A.bin")
    os.utime(folder / "a.bin", ns=(before.st_atime_ns, before.st_mtime_ns))
    changed = again.content_of(folder)
    assert reads[2:] == ["a.bin"] and digest(changed) != digest(first)
    assert changed["inner/b.bin"] == first["inner/b.bin"]


def test_a_file_that_changed_just_now_is_read_again(
    folder: Path, tmp_path: Path, reads: list[str]
) -> None:
    """Its times may be too coarse to show another change at once."""
    notes = ContentNotes(tmp_path / "notes.json")
    for _ in range(2):
        notes.content_of(folder, ["a.bin"])
    assert reads == ["a.bin", "a.bin"]


def test_the_digest_is_of_the_content_alone(folder: Path, tmp_path: Path) -> None:
    notes, moved = ContentNotes(), tmp_path / "moved"
    before = digest(notes.content_of(folder))
    folder.rename(moved)
    assert digest(notes.content_of(moved)) == before
    assert digest(notes.content_of(moved, ["a.bin"])) != before
    assert list(notes.content_of(moved / "a.bin")) == ["a.bin"]


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("text", ["", "[]", '{"x": 3}', '{"x": {"size": 1}}', "\x00"])
def test_damaged_notes_are_none(folder: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.json"
    path.write_text(text)
    notes = ContentNotes(path)
    found = notes.content_of(folder)
    notes.save()
    assert ContentNotes(path).content_of(folder) == found


def test_what_cannot_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MtopdError, match=r"cannot read .*model/c\.bin: No such file"):
        ContentNotes().content_of(folder, ["c.bin"])

    def grow(path: Path) -> str:
        path.write_bytes(b"longer than it was")
        return ""

    monkeypatch.setattr(content, "_sha256", grow)
    with pytest.raises(MtopdError, match=r"a\.bin changes while it is read"):
        ContentNotes().content_of(folder)
