"""Worker, in a mount namespace where ``sys.argv[1]`` is a tmpfs of a few MiB: what a full disk does
to the cache.

The room that is left over makes the disk full at another step each time: the first folder, the
journal, a shard, the last shard, zarr.json, the index.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from mtopd.hidden_cache import (
    HiddenCacheReader,
    HiddenCacheWriter,
    RowKey,
    recover,
    remove,
    sample_key,
)
from mtopd.trajectories import token_hash
from mtopd.types import MtopdError

TEACHER, SIZE, ROWS = "a1" * 32, 256, 1000
PAGE = 4 << 10


def row_key_of(sample_id: int) -> RowKey:
    return RowKey(
        sample_key(TEACHER, token_hash([1, 2], [sample_id, 3], [1, 1]), "bfloat16"), sample_id, 7
    )


def rows_of(sample_id: int) -> np.ndarray:
    return np.random.default_rng(sample_id).integers(0, 1 << 16, (ROWS, SIZE), np.uint16)


def write(root: Path, sample_ids: range) -> None:
    """What a run does when it starts: clean up, then compute and commit what is lacking."""
    recover(root)
    with HiddenCacheReader(root) as reader:
        lacking = {row_key.sample_id for row_key in reader.missing(map(row_key_of, sample_ids))}
    with HiddenCacheWriter(root, writer="w", generation=1, hidden_dtype="bfloat16") as writer:
        for sample_id in sorted(lacking):
            writer.put(TEACHER, SIZE, *row_key_of(sample_id), rows_of(sample_id))


def readable(root: Path, sample_ids: range) -> set[int]:
    """The samples that the cache has; every one is compared."""
    found = set()
    with HiddenCacheReader(root) as reader:
        assert not reader.refused, reader.refused
        for sample_id in sample_ids:
            entry = reader.lookup(*row_key_of(sample_id))
            if entry is not None:
                rows_NE = np.empty((ROWS, SIZE), np.uint16)
                reader.read(entry, rows_NE)
                assert np.array_equal(rows_NE, rows_of(sample_id)), sample_id
                found.add(sample_id)
    return found


def free_pages(disk: Path) -> int:
    status = os.statvfs(disk)
    return status.f_bavail * status.f_bsize // PAGE


def main(disk: Path) -> None:
    root, before, after = disk / "run" / "hidden_cache", range(4), range(4, 8)
    write(root, before)
    assert readable(root, range(8)) == set(before)
    needed = free_pages(disk)
    write(disk / "trial", after)
    needed -= free_pages(disk)
    remove(disk / "trial")
    said = re.compile(rf"{re.escape(str(root))}.*No space left on device", re.DOTALL)
    refusals = 0
    for room in (0, 1, 2, 3, 8, 64, 300, *range(needed - 6, needed)):
        other = disk / "other data"
        other.write_bytes(b"x" * PAGE * (free_pages(disk) - room))
        for _ in range(2):  # the second start meets what the first one left
            try:
                with pytest.raises(MtopdError, match=said):
                    write(root, after)
            except pytest.fail.Exception:
                # A folder takes a page or none.
                assert room > needed - 6, f"{room} of {needed} pages were enough"
                break
            refusals += 1
            assert readable(root, range(8)) >= set(before), "earlier data is gone"
        other.unlink()
        write(root, after)
        assert readable(root, range(8)) == set(range(8)), "the next run did not finish"
        drop(root, after)
    print(
        f"full disk: refused {refusals} times, earlier samples intact, finished each time there "
        "was room"
    )


def drop(root: Path, sample_ids: range) -> None:
    """Forget the segments of these samples, so that they are written anew."""
    with HiddenCacheReader(root) as reader:
        entries = [reader.lookup(*row_key_of(sample_id)) for sample_id in sample_ids]
    segments = {entry.segment for entry in entries if entry is not None}
    for segment in segments:
        (segment.parents[1] / "index" / f"{segment.name}.arrow").unlink()
    recover(root)
    assert not any(segment.exists() for segment in segments)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
