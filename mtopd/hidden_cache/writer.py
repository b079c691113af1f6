"""Writer of the hidden cache: one thread behind a bounded queue turns samples into sealed,
committed segments.

Invariants
* A sample is visible only after its segment's index file is published, which happens after the
  segment is sealed.
* Nothing is dropped silently: a full queue makes ``put`` wait, a failure of the thread is raised by
  the next call.

Shape letters: N rows (loss tokens) of one sample, E hidden size of its teacher.
"""

from __future__ import annotations

import queue
import re
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np

from mtopd.hidden_cache import folder as cache_folder
from mtopd.hidden_cache.byte_queue import ByteQueue
from mtopd.hidden_cache.durable import full_disk_raises, publish
from mtopd.hidden_cache.index import KEY_BYTES, IndexRow, dump_index
from mtopd.hidden_cache.journal import Journal
from mtopd.hidden_cache.layout import SegmentLayout, check_hidden_dtype
from mtopd.hidden_cache.segment import SegmentWriter
from mtopd.types import MtopdError

QUEUE_BYTES = 12 << 20  # with the chunk being filled: at most 16 MiB beside what the caller holds
SEGMENT_BYTES = 1 << 30
SEGMENT_SECONDS = 60.0
_WRITER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")  # it becomes part of a folder's name


class _Sample(NamedTuple):
    layout: SegmentLayout
    key: bytes
    sample_id: int
    student_version: int
    rows_NE: np.ndarray


class HiddenCacheWriter:
    """Writes the samples of one teacher-pass replica; every replica has its own writer name.

    ``put`` may be called with any teacher's rows; one segment holds one teacher.  A segment is
    sealed and committed after about 1 GiB or 60 s, or by ``commit``.  After a failure all that was
    not committed is dropped, the next call raises the thread's exception, and the writer can be
    used again.  As a context manager it commits at the end, or after an exception drops what was
    not committed.  Calls come from one thread.
    """

    def __init__(self, root: Path, *, writer: str, generation: int, hidden_dtype: str) -> None:
        if not _WRITER_NAME.fullmatch(writer) or generation < 0:
            raise MtopdError(
                f"writer {writer!r}, generation {generation}: needed letters, digits, _ or -, and "
                "0 or more"
            )
        check_hidden_dtype(hidden_dtype)
        with full_disk_raises(root):
            cache_folder.create_root(root)
        self._root = root
        self._hidden_dtype = hidden_dtype
        self._name = f"{writer}-{generation}"
        self._checked_layout: SegmentLayout | None = None
        self._queue: ByteQueue[_Sample] = ByteQueue(QUEUE_BYTES)
        # Lives from the first put to the next commit or abort.
        self._thread: threading.Thread | None = None
        self._is_aborting = False
        self._failure: BaseException | None = None
        # The open segment; only the thread touches it.
        self._segment: SegmentWriter | None = None
        self._journal: Journal | None = None
        self._samples: list[IndexRow] = []  # the segment's totals are filled in when it is sealed
        self._opened_at = 0.0

    def put(
        self,
        teacher_fingerprint: str,
        hidden_size: int,
        key: bytes,
        sample_id: int,
        student_version: int,
        rows_NE: np.ndarray,
    ) -> None:
        """Hand over one sample; N may be 0.  ``rows_NE`` belongs to the writer from now on: it is
        not copied.
        """
        layout = SegmentLayout(teacher_fingerprint, hidden_size, self._hidden_dtype)
        if rows_NE.dtype != layout.dtype or rows_NE.ndim != 2 or rows_NE.shape[1] != hidden_size:
            raise MtopdError(
                f"sample {sample_id}: rows are {rows_NE.dtype} {rows_NE.shape}, needed "
                f"{layout.dtype} "
                f"[n, {hidden_size}] for hidden_dtype {self._hidden_dtype}. Convert the hidden "
                "states first (view_rows)"
            )
        assert len(key) == KEY_BYTES, len(key)
        if layout != self._checked_layout:
            with full_disk_raises(self._root):
                cache_folder.create_teacher_folder(self._root, layout)
            self._checked_layout = layout
        if self._thread is None:
            self._queue = ByteQueue(QUEUE_BYTES)
            self._is_aborting = False
            self._thread = threading.Thread(
                target=self._work, name=f"hidden-cache-{self._name}", daemon=True
            )
            self._thread.start()
        rows_NE = np.ascontiguousarray(rows_NE)
        self._queue.put(_Sample(layout, key, sample_id, student_version, rows_NE), rows_NE.nbytes)
        if self._failure is not None:
            self._join()

    def commit(self) -> None:
        """Make every sample put so far durable and visible."""
        self._queue.end()
        self._join()

    def abort(self) -> None:
        """Drop what was not committed."""
        self._is_aborting = True
        self._queue.end(drop=True)
        with suppress(Exception):  # what failed is dropped as well
            self._join()

    def _join(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        failure, self._failure = self._failure, None
        if failure is not None:
            with full_disk_raises(self._root):
                raise failure

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.abort()

    # -- the thread --------------------------------------------------------------------------------
    def _work(self) -> None:
        try:
            while (sample := self._next()) is not None:
                self._append(sample)
                del sample  # the queue no longer counts it while the next one is waited for
            if not self._is_aborting:
                self._seal()
        except BaseException as failure:
            self._failure = failure
        self._discard()
        self._queue.end(drop=True)  # a put that waits has to learn of the failure

    def _next(self) -> _Sample | None:
        # An open segment is sealed in time even while no sample comes: a crash costs a minute.
        while self._segment is not None:
            with suppress(queue.Empty):
                return self._queue.get(
                    max(self._opened_at + SEGMENT_SECONDS - time.monotonic(), 0.0)
                )
            self._seal()
        return self._queue.get(None)

    def _append(self, sample: _Sample) -> None:
        segment = self._segment
        if segment is not None and (
            segment.layout != sample.layout
            or segment.rows * segment.layout.row_bytes >= SEGMENT_BYTES
            or time.monotonic() > self._opened_at + SEGMENT_SECONDS
        ):
            self._seal()
        if self._segment is None or self._journal is None:
            teacher = cache_folder.teacher_folder(self._root, sample.layout)
            self._segment = SegmentWriter(
                teacher / "seg" / f"{self._name}-{uuid.uuid4().hex[:8]}", sample.layout
            )
            self._journal = Journal(self._segment.path)
            self._opened_at = time.monotonic()
        # Rows first, then the journal: a line names rows that were written.
        row, crc = self._segment.append(sample.rows_NE)
        n_tokens = len(sample.rows_NE)
        _, key, sample_id, version, _ = sample
        self._samples.append(
            IndexRow(key, sample_id, version, self._segment.path.name, row, n_tokens, crc, 0, 0)
        )
        self._journal.add(self._samples[-1])

    def _seal(self) -> None:
        segment, journal = self._segment, self._journal
        if segment is None or journal is None:
            return
        layout = segment.layout
        n_shards = layout.num_shards(segment.rows)
        segment_bytes = layout.num_bytes(segment.rows)
        samples = [
            sample._replace(n_shards=n_shards, segment_bytes=segment_bytes)
            for sample in self._samples
        ]
        index = dump_index(samples, layout.teacher_fingerprint)
        segment.seal()
        # From here on the segment stays: if publishing fails half-way, the index may be on disk
        # already.
        self._forget_segment()
        try:
            publish(cache_folder.index_path(segment.path), index)
        except BaseException:
            journal.close()
            raise
        journal.remove()

    def _forget_segment(self) -> None:
        self._segment = None
        self._journal = None
        self._samples = []

    def _discard(self) -> None:
        """Remove the open segment, if there is one."""
        segment, journal = self._segment, self._journal
        self._forget_segment()
        if journal is not None:
            journal.close()
        if segment is not None:
            # the failure that led here is the one to report; recovery removes the rest
            with suppress(OSError):
                segment.abort()
