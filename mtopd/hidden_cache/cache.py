"""Writer and reader of the hidden cache: which samples exist, and their rows.

Invariants
* A sample is visible only after ``commit`` has published its index file, which happens after its segment is sealed.
* An entry is found only under the key of its teacher's bytes, its tokens, loss mask and dtype, and only for the
  sample_id and student_version it was written for.
* ``read`` either fills the buffer with verified rows or raises CacheMiss.

Shape letters: N rows (loss tokens) of one sample, E hidden size of its teacher.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from mtopd.hidden_cache import folder as cache_folder
from mtopd.hidden_cache.durable import publish
from mtopd.hidden_cache.index import KEY_BYTES, IndexRow, dump_index, load_index
from mtopd.hidden_cache.key import Request
from mtopd.hidden_cache.layout import SegmentLayout, check_hidden_dtype, crc32c
from mtopd.hidden_cache.segment import SegmentDamaged, SegmentReader, SegmentWriter, segment_damaged
from mtopd.types import MtopdError

logger = logging.getLogger(__name__)

_WRITER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")  # it becomes part of a folder's name


class CacheMiss(MtopdError):
    """No sound copy of an entry is left; the sample has to be computed again."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One committed copy of a sample's rows."""

    request: Request
    layout: SegmentLayout
    segment: Path
    sample: IndexRow

    @property
    def n_tokens(self) -> int:
        return self.sample.n_tokens


class HiddenCacheWriter:
    """Writes the samples of one teacher-pass replica; every replica has its own writer name.

    ``put`` may be called with any teacher's rows; one segment holds one teacher.  As a context manager it commits at
    the end, or after an exception drops what was not committed.
    """

    def __init__(self, root: Path, *, writer: str, generation: int, hidden_dtype: str) -> None:
        if not _WRITER_NAME.fullmatch(writer) or generation < 0:
            raise MtopdError(
                f"writer {writer!r}, generation {generation}: needed letters, digits, _ or -, and 0 or more"
            )
        check_hidden_dtype(hidden_dtype)
        cache_folder.create_root(root)
        self._root, self._hidden_dtype = root, hidden_dtype
        self._name = f"{writer}-{generation}"
        self._segment: SegmentWriter | None = None
        self._samples: list[IndexRow] = []  # of the open segment; the segment's totals are filled in by commit

    def put(
        self,
        teacher_fingerprint: str,
        hidden_size: int,
        key: bytes,
        sample_id: int,
        student_version: int,
        rows_NE: np.ndarray,
    ) -> None:
        """Add one sample; N may be 0.  The caller may reuse ``rows_NE`` afterwards."""
        layout = SegmentLayout(teacher_fingerprint, hidden_size, self._hidden_dtype)
        if rows_NE.dtype != layout.dtype or rows_NE.ndim != 2 or rows_NE.shape[1] != hidden_size:
            raise MtopdError(
                f"sample {sample_id}: rows are {rows_NE.dtype} {rows_NE.shape}, needed {layout.dtype} "
                f"[n, {hidden_size}] for hidden_dtype {self._hidden_dtype}. Convert the hidden states first (as_rows)"
            )
        assert len(key) == KEY_BYTES, len(key)
        if self._segment is not None and self._segment.layout != layout:
            self.commit()
        segment = self._segment or self._open_segment(layout)
        rows_NE = np.ascontiguousarray(rows_NE)
        try:
            row = segment.append(rows_NE)
        except BaseException:
            self.abort()  # the segment may hold half a chunk
            raise
        sample = IndexRow(key, sample_id, student_version, segment.path.name, row, len(rows_NE), crc32c(rows_NE), 0, 0)
        self._samples.append(sample)

    def commit(self) -> None:
        """Make every sample put so far durable and visible."""
        segment, samples = self._segment, self._samples
        if segment is None:
            return
        layout = segment.layout
        n_shards, segment_bytes = layout.num_shards(segment.rows), layout.num_bytes(segment.rows)
        try:
            samples = [sample._replace(n_shards=n_shards, segment_bytes=segment_bytes) for sample in samples]
            index = dump_index(samples, layout.teacher_fingerprint)
            segment.seal()
        except BaseException:
            self.abort()
            raise
        # From here on the segment stays: if publishing fails half-way, the index may be on disk already.
        self._segment, self._samples = None, []
        publish(segment.path.parents[1] / "index" / f"{segment.path.name}.arrow", index)

    def abort(self) -> None:
        """Drop what was not committed."""
        segment, self._segment, self._samples = self._segment, None, []
        if segment is not None:
            segment.abort()

    def _open_segment(self, layout: SegmentLayout) -> SegmentWriter:
        teacher = cache_folder.create_teacher_folder(self._root, layout)
        self._segment = SegmentWriter(teacher / "seg" / f"{self._name}-{uuid.uuid4().hex[:8]}", layout)
        return self._segment

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.abort()


class HiddenCacheReader:
    """What was committed when the reader was made.  A root that is not there yet is an empty cache.

    A sample may have several copies (a damaged one was computed again): the first in name order wins, the next
    serves where it is damaged.
    """

    def __init__(self, root: Path) -> None:
        self.bytes_read = 0  # from storage: whole zarr chunks, verification included
        self.refused: dict[Path, str] = {}  # index files that count as not there, with the cause
        self._copies: dict[Request, list[Entry]] = {}
        self._segments: dict[Path, SegmentReader] = {}
        if cache_folder.is_marked(root):
            for teacher in cache_folder.teacher_folders(root):
                for path in cache_folder.index_paths(teacher):
                    self._load(teacher, path)
        self._by_key = {request.key: request for request in self._copies}
        self._by_sample_id = {request.sample_id: request for request in self._copies}

    def lookup(self, key: bytes, sample_id: int, student_version: int) -> Entry | None:
        """The entry of a trajectory, or None; why a near match was refused is logged."""
        request = Request(key, sample_id, student_version)
        if request in self._copies:
            return self._copies[request][0]
        cause = self._why_refused(request)
        if cause:
            logger.warning("hidden cache: %s", cause)
        return None

    def read(self, entry: Entry, out_NE: np.ndarray) -> None:
        """All rows of an entry into ``out_NE`` [n_tokens, E].  After CacheMiss its content is undefined."""
        self.read_rows(entry, 0, entry.n_tokens, out_NE)

    def read_rows(self, entry: Entry, start: int, stop: int, out_NE: np.ndarray) -> None:
        """Rows [start, stop) of an entry, e.g. a tp rank's share, into ``out_NE`` [stop - start, E]."""
        assert 0 <= start <= stop <= entry.n_tokens, (start, stop, entry.n_tokens)
        assert out_NE.shape == (stop - start, entry.layout.hidden_size), (out_NE.shape, start, stop)
        causes = []
        for copy in self._copies[entry.request]:
            try:
                return self._read_copy(copy, start, stop, out_NE)
            except SegmentDamaged as damage:
                logger.warning("%s", damage)
                causes.append(str(damage))
        raise CacheMiss(f"sample {entry.request.sample_id}: no sound copy of its rows. {'; '.join(causes)}")

    def missing(self, requests: Iterable[tuple[bytes, int, int]]) -> dict[Request, str]:
        """The requests that have to be computed, each with the cause.  Reads and verifies all others in full."""
        causes = {}
        for request in map(Request._make, requests):
            if request not in self._copies:
                causes[request] = self._why_refused(request) or f"sample {request.sample_id} is not in the cache"
                continue
            entry = self._copies[request][0]
            try:
                self.read(entry, np.empty((entry.n_tokens, entry.layout.hidden_size), entry.layout.dtype))
            except CacheMiss as miss:
                causes[request] = str(miss)
        return causes

    def verify(self) -> dict[Request, str]:
        """The entries of which no sound copy is left, each with the cause.  See ``refused`` for whole index files."""
        return self.missing(self._copies)

    def close(self) -> None:
        """Forget the entries.  No file is open between calls."""
        tables: list[dict[Any, Any]] = [self._copies, self._segments, self._by_key, self._by_sample_id]
        for table in tables:
            table.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _load(self, teacher: Path, path: Path) -> None:
        try:
            layout = cache_folder.load_teacher(teacher)
            samples = load_index(path, layout)
        except MtopdError as error:
            self.refused[path] = str(error)
            logger.warning("%s", error)
            return
        for sample in samples:
            request = Request(sample.sample_key, sample.sample_id, sample.student_version)
            entry = Entry(request, layout, teacher / "seg" / sample.segment, sample)
            self._copies.setdefault(request, []).append(entry)

    def _read_copy(self, copy: Entry, start: int, stop: int, out_NE: np.ndarray) -> None:
        sample = copy.sample
        if start == stop:
            return  # nothing is stored for a sample without loss tokens, so nothing can be damaged
        self.bytes_read += self._segment(copy).read(sample.row + start, sample.row + stop, out_NE)
        if stop - start == sample.n_tokens and crc32c(out_NE) != sample.crc32c:
            raise segment_damaged(copy.segment, f"the index has another crc32c for sample {sample.sample_id}")

    def _segment(self, copy: Entry) -> SegmentReader:
        if copy.segment not in self._segments:
            segment = SegmentReader(copy.segment, copy.layout)
            found = copy.layout.num_shards(segment.rows), copy.layout.num_bytes(segment.rows)
            needed = copy.sample.n_shards, copy.sample.segment_bytes
            if found != needed:
                cause = f"zarr.json gives (shards, bytes) {found}, the index {needed}"
                raise segment_damaged(copy.segment, cause)
            self._segments[copy.segment] = segment
        return self._segments[copy.segment]

    def _why_refused(self, request: Request) -> str | None:
        """Why an entry that nearly fits is not the one asked for; None if there is none."""
        if request.key in self._by_key:
            found = self._by_key[request.key]
            return (
                f"sample {request.sample_id} of student version {request.student_version}: its tokens are cached, but "
                f"for sample {found.sample_id} of version {found.student_version}; refused"
            )
        if request.sample_id in self._by_sample_id:
            return (
                f"sample {request.sample_id}: its entry was computed for another teacher, other tokens, another loss "
                "mask or dtype; refused"
            )
        return None
