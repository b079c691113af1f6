"""The last stage's hidden states for a train step: the cached rows that an objective asks for, read
ahead, each tp rank a share, joined by one all-gather.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch
import torch.distributed as dist

from mtopd.hidden_cache.reader import CacheMiss, HiddenCacheReader, Read
from mtopd.hidden_cache.rows import view_rows
from mtopd.types import TeacherRun

_SMALLEST_SHARE = 1 << 20  # bytes, about a chunk


class ReadingRanks(Protocol):
    """Where this rank stands among those that share the reading."""

    @property
    def tp_rank(self) -> int: ...
    @property
    def tp_size(self) -> int: ...
    @property
    def tp_group(self) -> dist.ProcessGroup: ...
    @property
    def device(self) -> torch.device: ...


class StateFormat(NamedTuple):
    """A teacher's cached states."""

    hidden_size: int
    dtype: torch.dtype


class CachedStates:
    """Fetches the hidden states of runs: each tp rank reads its share of the rows, an all-gather
    joins them.

    ``prefetch`` lets a background thread read the shares of a micro-batch's runs ahead, into pinned
    memory on CUDA; they are joined by one all-gather when the first of them is asked for.  States
    that were returned are forgotten, so at most the mini-batches that were announced and not yet
    used are held, and one micro-batch's states on the device.  Of a micro-batch with less than a
    chunk for each rank all ranks read all rows: a chunk is read whole anyway.
    """

    def __init__(
        self,
        reader: HiddenCacheReader,
        formats: Sequence[StateFormat],
        ranks: ReadingRanks,
        student_version: int,
    ) -> None:
        """``formats`` by teacher index."""
        self._reader = reader
        self._formats = formats
        self._ranks = ranks
        self._student_version = student_version
        self._thread = ThreadPoolExecutor(1, "hidden-states")
        self._announced: dict[TeacherRun, _MicroBatch] = {}
        self._joined: dict[TeacherRun, torch.Tensor] = {}  # [shares, bytes]
        self.stall_s = 0.0  # seconds that callers waited

    def prefetch(self, micro_batches: Iterable[Sequence[TeacherRun]]) -> None:
        """Start to read the runs of micro-batches, in order.  What fails is raised when a run of it
        is asked for.
        """
        for runs in filter(None, micro_batches):
            num_shares = self._ranks.tp_size
            num_bytes = sum(self._row_share(run, 1).num_bytes for run in runs)
            if num_bytes < num_shares * _SMALLEST_SHARE:
                num_shares = 1
            read = self._thread.submit(self._read_shares, runs, num_shares)
            self._announced |= dict.fromkeys(runs, _MicroBatch(runs, num_shares, read))

    def __call__(self, run: TeacherRun) -> torch.Tensor:
        """[T, E] rows of the run in order, in the cache's dtype.  Collective over tp."""
        started = time.perf_counter()
        if run not in self._joined:
            if run not in self._announced:
                self.prefetch([[run]])
            self._join(self._announced[run])
        joined = self._joined.pop(run)
        share = self._row_share(run, len(joined))
        joined_TE = joined.reshape(-1).view(share.dtype).view(-1, share.hidden_size)
        self.stall_s += time.perf_counter() - started
        return joined_TE[: run.stop - run.start]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._announced.clear()
        self._joined.clear()

    def _join(self, micro_batch: _MicroBatch) -> None:
        for run in micro_batch.runs:
            del self._announced[run]
        num_shares = micro_batch.num_shares
        share = joined = micro_batch.read.result().to(self._ranks.device, non_blocking=True)
        if num_shares > 1:
            joined = share.new_empty(len(share) * num_shares)
            dist.all_gather_single(joined, share, group=self._ranks.tp_group)
        joined = joined.view(num_shares, -1)
        start = 0
        for run in micro_batch.runs:
            part = self._row_share(run, num_shares)
            self._joined[run] = joined[:, start : start + part.num_bytes]
            start += part.aligned_bytes

    def _row_share(self, run: TeacherRun, num_shares: int) -> _RowShare:
        rows = -(-(run.stop - run.start) // num_shares)
        return _RowShare(rows, *self._formats[run.teacher_index])

    def _read_shares(self, runs: Sequence[TeacherRun], num_shares: int) -> torch.Tensor:
        """Bytes of this rank's shares, one behind the other."""
        shares = [self._row_share(run, num_shares) for run in runs]
        buffer = torch.empty(
            sum(share.aligned_bytes for share in shares),
            dtype=torch.uint8,
            pin_memory=self._ranks.device.type == "cuda",  # torch keeps and reuses pinned memory
        )
        share_index = self._ranks.tp_rank if num_shares > 1 else 0
        start = 0
        reads: list[Read] = []
        for run, share in zip(runs, shares, strict=True):
            share_TE = buffer[start : start + share.num_bytes].view(share.dtype)
            share_TE = share_TE.view(share.rows, share.hidden_size)
            reads += self._reads(run, share_index, view_rows(share_TE))
            start += share.aligned_bytes
        self._reader.read_many(reads)
        return buffer

    def _reads(self, run: TeacherRun, share_index: int, out_TE: np.ndarray) -> list[Read]:
        """What fills ``out_TE``, share ``share_index`` of the run, which may begin and end inside a
        sample; the last one's end is padding.
        """
        share_rows = len(out_TE)
        reads: list[Read] = []
        place = -share_index * share_rows  # in this share, of the sample's first row
        for sample in run.samples:
            count = sample.stop - sample.first
            start, stop = max(-place, 0), min(share_rows - place, count)
            if start < stop:
                entry = self._reader.lookup(sample.key, sample.sample_id, self._student_version)
                if entry is None:
                    raise CacheMiss(
                        f"sample {sample.sample_id} of iteration {self._student_version} is not in "
                        "the cache; run the teacher pass again"
                    )
                rows_TE = out_TE[place + start : place + stop]
                reads.append(Read(entry, sample.first + start, sample.first + stop, rows_TE))
            place += count
        out_TE[max(place, 0) :] = 0
        return reads


class _MicroBatch(NamedTuple):
    """Runs that are read and joined together."""

    runs: Sequence[TeacherRun]
    num_shares: int  # tp ranks, or 1: every rank has all
    read: Future[torch.Tensor]


class _RowShare(NamedTuple):
    """Rows of a run that a rank reads, [ceil(T / shares), E]."""

    rows: int
    hidden_size: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.rows * self.hidden_size * self.dtype.itemsize

    @property
    def aligned_bytes(self) -> int:
        """Products of unaligned rows may give other bits."""
        return -(-self.num_bytes // 64) * 64
