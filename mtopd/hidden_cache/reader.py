"""Reader of the hidden cache: which samples exist, and their rows straight into the caller's
memory.

Invariants
* An entry is found only under the key of its teacher's bytes, its tokens, loss mask and dtype, and
  only for the sample_id and student_version it was written for.
* ``read`` either fills the buffer with verified rows or raises CacheMiss.

Shape letters: N rows (loss tokens) of one sample, E hidden size of its teacher.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Self, TypeVar

import numpy as np

from mtopd.hidden_cache import folder as cache_folder
from mtopd.hidden_cache.index import IndexRow, load_index
from mtopd.hidden_cache.key import RowKey
from mtopd.hidden_cache.layout import SegmentLayout, crc32c
from mtopd.hidden_cache.segment import OpenShard, SegmentDamaged, SegmentReader, segment_damaged
from mtopd.types import MtopdError

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
Outcome = TypeVar("Outcome")

_THREADS = 4  # they hide the latency of a disk, and share the checksums
_WORTH_THREADS = 1 << 20  # bytes of rows
_OPEN_SHARDS = 64
_KEPT_CHUNKS = 16  # about 1 MiB each; the next mini-batch wants other samples of the same chunks
_LISTINGS = 100  # a writer may commit, and a merge run, while the index folder is read


class CacheMiss(MtopdError):
    """No sound copy of an entry is left; the sample has to be computed again."""


class CacheEntry(NamedTuple):
    """One committed copy of a sample's rows."""

    row_key: RowKey
    layout: SegmentLayout
    segment: Path
    sample: IndexRow

    @property
    def n_tokens(self) -> int:
        return self.sample.n_tokens


class Read(NamedTuple):
    """Rows [start, stop) of an entry into ``out_NE`` [stop - start, E]."""

    entry: CacheEntry
    start: int
    stop: int
    out_NE: np.ndarray


class HiddenCacheReader:
    """What was committed when the reader was made.  A root that is not there yet is an empty cache.

    A sample may have several copies (a damaged one was computed again): the first in index order
    wins, the next serves where it is damaged.  May be shared by threads; keeps at most 64 shard
    files open, their shard indices checked once, and the last 16 chunks that ``read_many`` found
    several samples in.
    """

    def __init__(self, root: Path) -> None:
        self.bytes_read = 0  # from storage: whole zarr chunks, verification included
        self.refused: dict[Path, str] = {}  # index files that count as not there, with the cause
        self._copies: dict[RowKey, list[CacheEntry]] = {}
        self._segments: dict[Path, SegmentReader] = {}
        self._open_shard = lru_cache(_OPEN_SHARDS)(OpenShard)
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._chunks: dict[object, np.ndarray] = {}  # by ``_shared_chunk``, the last used one last
        if cache_folder.is_marked(root):
            for teacher in cache_folder.teacher_folders(root):
                self._load(teacher)
        self._by_key = {row_key.key: row_key for row_key in self._copies}
        self._by_sample_id = {row_key.sample_id: row_key for row_key in self._copies}

    def lookup(self, key: bytes, sample_id: int, student_version: int) -> CacheEntry | None:
        """The entry of a trajectory, or None; why a near match was refused is logged."""
        row_key = RowKey(key, sample_id, student_version)
        copies = self._copies.get(row_key)
        if copies is not None:
            return copies[0]
        cause = self._why_refused(row_key)
        if cause:
            logger.warning("hidden cache: %s", cause)
        return None

    def read(self, entry: CacheEntry, out_NE: np.ndarray) -> None:
        """All rows of an entry into ``out_NE`` [n_tokens, E].  After CacheMiss its content is
        undefined.
        """
        self.read_rows(entry, 0, entry.n_tokens, out_NE)

    def read_rows(self, entry: CacheEntry, start: int, stop: int, out_NE: np.ndarray) -> None:
        """Rows [start, stop) of an entry, e.g. a tp rank's share, into ``out_NE`` [stop - start,
        E].
        """
        assert 0 <= start <= stop <= entry.n_tokens, (start, stop, entry.n_tokens)
        assert out_NE.shape == (stop - start, entry.layout.hidden_size), (out_NE.shape, start, stop)
        causes = []
        for copy in self._copies[entry.row_key]:
            try:
                return self._read_copy(copy, start, stop, out_NE)
            except SegmentDamaged as damage:
                logger.warning("%s", damage)
                causes.append(str(damage))
        raise CacheMiss(
            f"sample {entry.row_key.sample_id}: no sound copy of its rows. {'; '.join(causes)}"
        )

    def read_many(self, reads: Iterable[Read]) -> None:
        """All of ``reads``, by several threads in the order of the disk; CacheMiss of one of them
        if any misses.

        Of samples smaller than a chunk several lie in one: it is read and checked once for all of
        them.
        """
        pieces: list[Read] = []
        cut: list[Read] = []  # their crc32c is that of two pieces: checked when both are there
        for read in reads:
            read_pieces = _pieces(read)
            pieces += read_pieces
            if len(read_pieces) > 1:
                cut.append(read)
        pieces.sort(key=lambda read: _place(read.entry))
        groups = [list(group) for _, group in itertools.groupby(pieces, key=_shared_chunk)]
        waiting = [group for group in groups if not self._copy_kept(group)]
        # Threads hide the latency of a disk, but of a few pages that are cached they cost more than
        # the reading.
        is_small = sum(read.out_NE.nbytes for group in waiting for read in group) < _WORTH_THREADS
        for _ in (map if is_small else self._map)(self._read_group, waiting):
            pass
        for read in cut:
            if not _is_sample(read.entry, read.out_NE):
                self.read_rows(*read)  # names the damage, or finds another copy

    def entries(self) -> list[CacheEntry]:
        """The copy of every sample that wins, in the order of the disk."""
        return sorted((copies[0] for copies in self._copies.values()), key=_place)

    def copies(self, row_key: RowKey) -> list[CacheEntry]:
        return list(self._copies.get(row_key, ()))

    def missing(
        self,
        row_keys: Iterable[tuple[bytes, int, int]],
        progress: Callable[[int], None] = lambda num_bytes: None,
    ) -> dict[RowKey, str]:
        """The row keys that have to be computed, each with the cause.  Reads and verifies all
        others in full.

        ``progress`` is called with the bytes of rows of each one that was read.
        """
        causes: dict[RowKey, str | None] = dict.fromkeys(map(RowKey._make, row_keys))
        present = [self._copies[row_key][0] for row_key in causes if row_key in self._copies]

        def check(entry: CacheEntry) -> tuple[CacheEntry, str | None]:
            try:
                self.read(entry, _buffer(entry))
            except CacheMiss as miss:
                return entry, str(miss)
            return entry, None

        for entry, cause in self._map(check, sorted(present, key=_place)):
            causes[entry.row_key] = cause
            progress(entry.n_tokens * entry.layout.row_bytes)
        for row_key in causes:
            if row_key not in self._copies:
                causes[row_key] = (
                    self._why_refused(row_key) or f"sample {row_key.sample_id} is not in the cache"
                )
        return {row_key: cause for row_key, cause in causes.items() if cause is not None}

    def verify(self, progress: Callable[[int], None] = lambda num_bytes: None) -> dict[RowKey, str]:
        """The entries of which no sound copy is left, each with the cause.  See ``refused`` for
        whole index files.
        """
        return self.missing(self._copies, progress)

    def is_sound(self, copy: CacheEntry) -> bool:
        """Whether this copy's own rows can be read and verified."""
        try:
            self._read_copy(copy, 0, copy.n_tokens, _buffer(copy))
        except SegmentDamaged:
            return False
        return True

    def broken_segments(self) -> list[Path]:
        """Segments whose files are absent or not whole, without reading their rows."""
        broken = []
        for copy in {
            copy.segment: copy for copies in self._copies.values() for copy in copies
        }.values():
            try:
                self._segment(copy).check_files()
            except SegmentDamaged:
                broken.append(copy.segment)
        return sorted(broken)

    def close(self) -> None:
        """Forget the entries, close files and threads."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        self._open_shard.cache_clear()
        self._copies.clear()
        self._segments.clear()
        self._chunks.clear()
        self._by_key.clear()
        self._by_sample_id.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _map(self, function: Callable[[Item], Outcome], items: list[Item]) -> Iterable[Outcome]:
        if len(items) < 2:
            return map(function, items)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_THREADS, "hidden-cache-reader")
        return self._pool.map(function, items)

    def _load(self, teacher: Path) -> None:
        for path, found in load_teacher_index(teacher).items():
            if isinstance(found, MtopdError):
                self.refused[path] = str(found)
                logger.warning("%s", found)
                continue
            layout, samples = found
            # One object for a segment: paths are slow to make and to compare.
            segments = {
                name: teacher / "seg" / name for name in {sample.segment for sample in samples}
            }
            for sample in samples:
                row_key = RowKey(sample.sample_key, sample.sample_id, sample.student_version)
                entry = CacheEntry(row_key, layout, segments[sample.segment], sample)
                copies = self._copies.setdefault(row_key, [])
                if entry not in copies:  # a merge that was cut short names it twice
                    copies.append(entry)

    def _read_copy(self, copy: CacheEntry, start: int, stop: int, out_NE: np.ndarray) -> None:
        sample = copy.sample
        if start == stop:
            return  # nothing is stored for a sample without loss tokens, so nothing can be damaged
        crc = sample.crc32c if stop - start == sample.n_tokens else None
        bytes_read = self._segment(copy).read(sample.row + start, sample.row + stop, out_NE, crc)
        with self._lock:
            self.bytes_read += bytes_read

    def _read_group(self, group: list[Read]) -> None:
        if len(group) > 1:
            try:
                self._keep_chunk(group[0])
            except SegmentDamaged:
                pass  # each by itself: it may have another copy
            else:
                if self._copy_kept(group):
                    return
        for read in group:
            self.read_rows(*read)

    def _keep_chunk(self, read: Read) -> None:
        """Read and check the whole chunk in which the rows of a read are."""
        segment, layout = self._segment(read.entry), read.entry.layout
        first = _first_row(read)
        rows_NE = np.empty(
            (min(layout.chunk_rows, segment.rows - first), layout.hidden_size), layout.dtype
        )
        bytes_read = segment.read(first, first + len(rows_NE), rows_NE)
        with self._lock:
            self.bytes_read += bytes_read
            self._chunks[_shared_chunk(read)] = rows_NE
            while len(self._chunks) > _KEPT_CHUNKS:
                del self._chunks[next(iter(self._chunks))]

    def _copy_kept(self, group: list[Read]) -> bool:
        """Whether the chunk of all these reads was at hand, and gave each its rows."""
        chunk = _shared_chunk(group[0])
        with self._lock:
            rows_NE = self._chunks.pop(chunk, None)
            if rows_NE is None:
                return False
            self._chunks[chunk] = rows_NE
        first = _first_row(group[0])
        for read in group:
            row = read.entry.sample.row - first
            found_NE = rows_NE[row + read.start : row + read.stop]
            if not _is_sample(read.entry, found_NE):
                return False  # to be read by itself: that names the damage, or finds another copy
            read.out_NE[:] = found_NE
        return True

    def _segment(self, copy: CacheEntry) -> SegmentReader:
        segment = self._segments.get(copy.segment)
        if segment is None:
            segment = SegmentReader(copy.segment, copy.layout, self._open_shard)
            found = copy.layout.num_shards(segment.rows), copy.layout.num_bytes(segment.rows)
            needed = copy.sample.n_shards, copy.sample.segment_bytes
            if found != needed:
                cause = f"zarr.json gives (shards, bytes) {found}, the index {needed}"
                raise segment_damaged(copy.segment, cause)
            self._segments[copy.segment] = segment
        return segment

    def _why_refused(self, row_key: RowKey) -> str | None:
        """Why an entry that nearly fits is not the requested one; None if there is none."""
        if row_key.key in self._by_key:
            found = self._by_key[row_key.key]
            return (
                f"sample {row_key.sample_id} of student version {row_key.student_version}: its "
                "tokens are cached, but "
                f"for sample {found.sample_id} of version {found.student_version}; refused"
            )
        if row_key.sample_id in self._by_sample_id:
            return (
                f"sample {row_key.sample_id}: its entry was computed for another teacher, other "
                "tokens, another loss mask or dtype, or by another version; refused"
            )
        return None


def _buffer(entry: CacheEntry) -> np.ndarray:
    return np.empty((entry.n_tokens, entry.layout.hidden_size), entry.layout.dtype)


def _place(entry: CacheEntry) -> tuple[str, int]:
    return str(entry.segment), entry.sample.row  # as text: paths are slow to compare


def _is_sample(entry: CacheEntry, rows_NE: np.ndarray) -> bool:
    """False where these are all of a sample's rows, but not those that the index names."""
    return len(rows_NE) != entry.n_tokens or crc32c(rows_NE) == entry.sample.crc32c


def _pieces(read: Read) -> list[Read]:
    """The read, nothing if it is empty; cut where it lies in two chunks and is smaller: others may
    want both, too.
    """
    entry, start, stop, out_NE = read
    # Rows that the first of the two chunks still holds.
    left = entry.layout.chunk_rows - (entry.sample.row + start) % entry.layout.chunk_rows
    if not left < stop - start <= entry.layout.chunk_rows:
        return [read] if start < stop else []
    return [
        Read(entry, start, start + left, out_NE[:left]),
        Read(entry, start + left, stop, out_NE[left:]),
    ]


def _shared_chunk(read: Read) -> object:
    """The chunk that holds all rows of a read, alike for all reads of it; the read itself where
    they are in several.
    """
    row, chunk_rows = read.entry.sample.row, read.entry.layout.chunk_rows
    first, last = (row + read.start) // chunk_rows, (row + read.stop - 1) // chunk_rows
    return (read.entry.segment, first) if first == last else id(read)


def _first_row(read: Read) -> int:
    """Of the chunk in which a read begins."""
    chunk_rows = read.entry.layout.chunk_rows
    return (read.entry.sample.row + read.start) // chunk_rows * chunk_rows


def load_teacher_index(
    teacher: Path,
) -> dict[Path, tuple[SegmentLayout, list[IndexRow]] | MtopdError]:
    """The rows of each index file of a teacher's folder, or why it counts as not there.

    Files may be committed and merged meanwhile: the folder is listed again until nothing has
    changed, so no sample that was visible before is overlooked.
    """
    for _ in range(_LISTINGS):
        paths = cache_folder.index_paths(teacher)
        found: dict[Path, tuple[SegmentLayout, list[IndexRow]] | MtopdError] = {}
        for path in paths:
            try:
                layout = cache_folder.load_teacher(teacher)
                found[path] = layout, load_index(path, layout)
            except MtopdError as error:
                found[path] = error
        if cache_folder.index_paths(teacher) == paths:
            return found
    raise MtopdError(f"{teacher / 'index'} keeps changing; wait until its writers are done")
