"""Worker, in a mount namespace where ``sys.argv[1]`` is a tmpfs too small for two teachers: what a
full disk does.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from mtopd.convert.teacher import add_teacher
from mtopd.teacher_offload.store import check_files, damaged_blocks, open_store
from mtopd.teacher_offload.store_writer import adding_folder, remove_store
from mtopd.types import MtopdError


def main(disk: Path, source: Path) -> None:
    first = add_teacher("first", source, disk / "first", slices=2)
    (disk / "other data").write_bytes(
        b"x" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize - (300 << 10))
    )
    for _ in range(2):  # the second start meets what the first one left
        with pytest.raises(
            MtopdError, match=r"cannot write .*/second: No space left.*make room.*start the same"
        ):
            add_teacher("second", source, disk / "second", slices=2)
        assert not (disk / "second").exists()
        again = check_files(open_store(disk / "first"))
        assert again.fingerprint == first.fingerprint
        assert not [text for file in again.files.values() for text in damaged_blocks(file)]
    _full_at_the_tokenizer(disk, source)
    kept = {
        path: path.stat().st_mtime_ns for path in adding_folder(disk / "second").glob("layers/*")
    }
    (disk / "other data").unlink()
    second = add_teacher("second", source, disk / "second", slices=2)
    assert second.fingerprint == first.fingerprint
    reused = [
        p for p, t in kept.items() if (disk / "second" / "layers" / p.name).stat().st_mtime_ns == t
    ]
    assert reused, "what was finished before the disk was full is used again"
    remove_store(disk / "second")
    print("full disk: refused twice, first store intact, second finished once there was room")


def _full_at_the_tokenizer(disk: Path, source: Path) -> None:
    """The weights fit, the tokenizer does not."""
    filler = disk / "filler"

    def fill(done: int, total: int) -> None:
        if done == total:
            filler.write_bytes(b"x" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize))

    (disk / "other data").unlink()
    with pytest.raises(MtopdError, match=r"cannot write .*No space left.*start the same command"):
        add_teacher("second", source, disk / "third", slices=2, progress=fill)
    filler.unlink()
    assert not (disk / "third").exists()
    remove_store(adding_folder(disk / "third"))
    (disk / "other data").write_bytes(b"")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
