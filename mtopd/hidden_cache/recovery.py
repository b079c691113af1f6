"""After a crash: what an unfinished segment holds is saved, the rest is deleted; and index files
are merged.

Everything here is for the one user of the cache (the launcher's lock, or rank 0 before any writer
starts): to others a segment being written looks the same as an orphan.  No lease is needed.
"""

from __future__ import annotations

import logging
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mtopd.files import fsync_dir
from mtopd.hidden_cache import folder as cache_folder
from mtopd.hidden_cache.durable import PARTIAL, full_disk_raises, publish
from mtopd.hidden_cache.index import IndexRow, dump_index
from mtopd.hidden_cache.journal import load_journal
from mtopd.hidden_cache.key import RowKey
from mtopd.hidden_cache.layout import CHUNKS_PER_SHARD, SegmentLayout, crc32c, stored_crc
from mtopd.hidden_cache.reader import HiddenCacheReader, load_teacher_index
from mtopd.hidden_cache.segment import partial_shard
from mtopd.hidden_cache.writer import HiddenCacheWriter
from mtopd.types import MtopdError

logger = logging.getLogger(__name__)


@dataclass
class Recovery:
    """What was found in the segments that no index file names; these segments were deleted."""

    segments: list[str] = field(default_factory=list)
    salvaged: list[RowKey] = field(default_factory=list)  # committed again, bit for bit
    # named by a journal, but their rows had not reached the disk
    dropped: list[RowKey] = field(default_factory=list)


def recover(root: Path) -> Recovery:
    """Commit what crashed writers left whole, delete their segments and all partial files.

    Samples are copied into a new segment by the ordinary writer, so they are as durable as any
    before the orphan goes; a crash in between leaves copies, which are harmless.  A sealed segment
    stays while an index file of its folder is damaged: that file may be the one that named it.
    """
    cache_folder.is_marked(root)  # refuses another's folder
    found = Recovery()
    for teacher in cache_folder.teacher_folders(root):
        index = load_teacher_index(teacher)
        named = {
            row.segment
            for rows in index.values()
            if not isinstance(rows, MtopdError)
            for row in rows[1]
        }
        is_damaged = any(isinstance(rows, MtopdError) for rows in index.values())
        for segment in cache_folder.entries(teacher / "seg"):
            if segment.is_symlink() or not segment.is_dir():
                continue  # no writer makes these
            if segment.name in named:
                # Its writer died after the commit and before it removed the journal.
                (segment / "journal").unlink(missing_ok=True)
            elif not (is_damaged and (segment / "zarr.json").exists()):
                _recover_segment(root, teacher, segment, found)
    folders = cache_folder.teacher_folders(root)
    for place in (root, *folders, *(folder / "index" for folder in folders)):
        for partial in place.glob(f".*{PARTIAL}"):
            partial.unlink()
    return found


def _recover_segment(root: Path, teacher: Path, segment: Path, found: Recovery) -> None:
    named = [
        RowKey(row.sample_key, row.sample_id, row.student_version) for row in load_journal(segment)
    ]
    salvaged: list[RowKey] = []
    try:
        layout = cache_folder.load_teacher(teacher)
        with HiddenCacheWriter(
            root, writer="recovered", generation=0, hidden_dtype=layout.hidden_dtype
        ) as writer:
            for row, rows_NE in _sound_samples(segment, layout):
                row_key = RowKey(row.sample_key, row.sample_id, row.student_version)
                writer.put(layout.teacher_fingerprint, layout.hidden_size, *row_key, rows_NE)
                salvaged.append(row_key)
    # a full disk, say: computing the samples again is always possible
    except (OSError, MtopdError) as error:
        logger.warning(
            "hidden cache segment %s: its samples could not be saved: %s", segment, error
        )
        salvaged = []
    shutil.rmtree(segment)
    fsync_dir(segment.parent)
    found.segments.append(segment.name)
    found.salvaged += salvaged
    found.dropped += named[len(salvaged) :]


def _sound_samples(segment: Path, layout: SegmentLayout) -> Iterator[tuple[IndexRow, np.ndarray]]:
    """The journal's samples whose rows all lie in the longest prefix of sound chunks."""
    chunks = _sound_chunks(segment, layout)
    # Rows, at most: a journal line may reach the disk before its rows do.
    rows_on_disk = sum(path.stat().st_size for path in segment.glob("c/*/*")) // layout.row_bytes
    chunk_NE = np.empty((0, layout.hidden_size), layout.dtype)
    for row in load_journal(segment):
        if row.row + row.n_tokens > rows_on_disk:
            return
        rows_NE = np.empty((row.n_tokens, layout.hidden_size), layout.dtype)
        filled = 0
        while filled < row.n_tokens:
            if not len(chunk_NE):
                following = next(chunks, None)
                if following is None:
                    return
                chunk_NE = following
            taken = chunk_NE[: row.n_tokens - filled]
            rows_NE[filled : filled + len(taken)] = taken
            chunk_NE = chunk_NE[len(taken) :]
            filled += len(taken)
        if crc32c(rows_NE) != row.crc32c:
            return
        yield row, rows_NE


def _sound_chunks(segment: Path, layout: SegmentLayout) -> Iterator[np.ndarray]:
    """The chunks of an unfinished segment up to the first that is torn, absent or damaged."""
    shard = 0
    while True:
        path = segment / "c" / str(shard) / "0"
        path = path if path.exists() else partial_shard(path)
        if not path.exists():
            return
        with path.open("rb") as file:
            for _ in range(CHUNKS_PER_SHARD):
                stored = np.frombuffer(file.read(layout.stored_chunk_bytes), np.uint8)
                chunk, crc = stored[: layout.chunk_bytes], stored[layout.chunk_bytes :]
                if len(stored) < layout.stored_chunk_bytes or stored_crc(chunk) != crc.tobytes():
                    return
                yield chunk.view(layout.dtype).reshape(layout.chunk_rows, layout.hidden_size)
        shard += 1


def merge_index(root: Path) -> None:
    """Make the index files of each teacher one.  Damaged ones stay.

    The merged file is published before the others go, and the order in which copies win is kept; so
    a reader sees every sample at any instant, and a merge cut short is completed by the next.
    """
    cache_folder.is_marked(root)
    for teacher in cache_folder.teacher_folders(root):
        found = {
            path: rows
            for path, rows in load_teacher_index(teacher).items()
            if not isinstance(rows, MtopdError)
        }
        if len(found) > 1:
            layout = next(iter(found.values()))[0]
            rows = list(
                dict.fromkeys(row for _, index_rows in found.values() for row in index_rows)
            )
            _replace_index(teacher, list(found), rows, layout)


def _replace_index(
    teacher: Path, replaced: list[Path], rows: list[IndexRow], layout: SegmentLayout
) -> None:
    folder = teacher / "index"
    with full_disk_raises(teacher.parents[1]):
        publish(
            folder / f"merged-{uuid.uuid4().hex[:8]}.arrow",
            dump_index(rows, layout.teacher_fingerprint),
        )
    for path in replaced:
        path.unlink()
    fsync_dir(folder)


def collect_garbage(root: Path) -> list[str]:
    """Recover, then delete the segments of which every sample has a sound copy elsewhere.  Returns
    their names.

    The index is rewritten first, so that nothing names what is deleted.
    """
    deleted = recover(root).segments
    with HiddenCacheReader(root) as reader:
        kept: set[Path] = set()
        doubtful: set[Path] = set()
        for entry in reader.entries():
            copies = reader.copies(entry.row_key)
            sound = (
                copies[:1]
                if len(copies) == 1
                else [copy for copy in copies if reader.is_sound(copy)][:1]
            )
            # Without a sound copy none is known to be superfluous: all stay.
            kept |= {copy.segment for copy in sound or copies}
            doubtful |= {copy.segment for copy in copies}
    superseded = doubtful - kept
    for teacher in {segment.parents[1] for segment in superseded}:
        found = {
            path: rows
            for path, rows in load_teacher_index(teacher).items()
            if not isinstance(rows, MtopdError)
        }
        layout = next(iter(found.values()))[0]
        rows = list(dict.fromkeys(row for _, index_rows in found.values() for row in index_rows))
        rows = [row for row in rows if teacher / "seg" / row.segment not in superseded]
        _replace_index(teacher, list(found), rows, layout)
    for segment in sorted(superseded):
        shutil.rmtree(segment)
        deleted.append(segment.name)
    return deleted
