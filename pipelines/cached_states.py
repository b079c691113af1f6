"""What the objective asks for, from the cache: which rows of which samples, read ahead, joined over
tp.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.distributed as dist

from mtopd.hidden_cache import CacheMiss, HiddenCacheReader, Read, as_rows
from mtopd.objectives.teacher_kl import TeacherRun
from mtopd.types import MicroBatch, SampleMetadata, TrainStepPlan

from .job import Job
from .packing import rows_here

_SMALLEST_SHARE = 1 << 20  # bytes, about a chunk


@dataclass(frozen=True, slots=True)
class SampleRows:
    """Rows [first, stop) of a sample's cached hidden states."""

    metadata: SampleMetadata
    key: bytes
    first: int
    stop: int


def runs_of_step(job: Job, plan: TrainStepPlan, iteration: int) -> list[list[TeacherRun]]:
    """The runs of this rank's micro-batches; none on ranks that are not on the last stage, which
    look up no keys.
    """
    mine = plan.micro_batches[job.ranks.dp_rank]
    return [_runs(job, plan, micro_batch, iteration) if job.heads else [] for micro_batch in mine]


def _runs(
    job: Job, plan: TrainStepPlan, micro_batch: MicroBatch, iteration: int
) -> list[TeacherRun]:
    """Contiguous teacher runs of the micro-batch's loss rows on this rank."""
    tokens = job.tokens(iteration)
    found = [
        SampleRows(sample, job.cache_key(iteration, sample), *rows)
        for sample in (tokens.samples[planned.sample_id] for planned in micro_batch.samples)
        for rows in rows_here(tokens.tokens(sample.sample_id), plan.seq_length, job.ranks)
    ]
    runs: list[TeacherRun] = []
    for teacher_index, rows in itertools.groupby(
        found, key=lambda rows: rows.metadata.teacher_index
    ):
        entries = list(rows)
        start = runs[-1].stop if runs else 0
        runs.append(
            TeacherRun(
                teacher_index, start, start + sum(e.stop - e.first for e in entries), entries
            )
        )
    return runs


def open_cache(job: Job, iteration: int) -> AbstractContextManager[HiddenCacheReader | None]:
    """The iteration's hidden states; ranks before the last stage never open them."""
    return (
        HiddenCacheReader(job.run.hidden_cache(iteration))
        if job.heads
        else contextlib.nullcontext()
    )


class CachedStates:
    """Fetches the hidden states of runs: each tp rank reads its share of the rows, an all-gather
    joins them.

    ``prefetch`` lets a background thread read the shares of a micro-batch's runs ahead, into pinned
    memory on CUDA; they are joined by one all-gather when the first of them is asked for.  What was
    given is forgotten, so at most the mini-batches that were announced and not yet used are held,
    and one micro-batch's states on the device. Of a micro-batch with less than a chunk for each
    rank all ranks read all rows: a chunk is read whole anyway.
    """

    def __init__(self, job: Job, reader: HiddenCacheReader | None, iteration: int) -> None:
        self._job, self._reader, self._iteration = job, reader, iteration
        self._thread = ThreadPoolExecutor(1, "hidden-states")
        self._announced: dict[TeacherRun, _MicroBatch] = {}
        self._joined: dict[TeacherRun, torch.Tensor] = {}  # [shares, bytes]
        self.stall_s = 0.0

    def prefetch(self, micro_batches: Iterable[Sequence[TeacherRun]]) -> None:
        """Start to read the runs of micro-batches, in order.  What fails is raised when a run of it
        is asked for.
        """
        for runs in filter(None, micro_batches):
            num_shares, whole = (
                self._job.ranks.tp_size,
                sum(self._share_of(run, 1).num_bytes for run in runs),
            )
            num_shares = num_shares if whole >= num_shares * _SMALLEST_SHARE else 1
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
        share = self._share_of(run, len(joined))
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
        ranks, num_shares = self._job.ranks, micro_batch.num_shares
        mine = joined = micro_batch.read.result().to(ranks.device, non_blocking=True)
        if num_shares > 1:
            joined = mine.new_empty(len(mine) * num_shares)
            dist.all_gather_single(joined, mine, group=ranks.tp_group)
        joined, start = joined.view(num_shares, -1), 0
        for run in micro_batch.runs:
            share = self._share_of(run, num_shares)
            self._joined[run] = joined[:, start : start + share.num_bytes]
            start += share.aligned_bytes

    def _share_of(self, run: TeacherRun, num_shares: int) -> _Share:
        store = self._job.stores[run.teacher_index]
        rows = -(-(run.stop - run.start) // num_shares)
        return _Share(rows, store.hidden_size, getattr(torch, self._job.cache_dtype(store)))

    def _read_shares(self, runs: Sequence[TeacherRun], num_shares: int) -> torch.Tensor:
        """Bytes of this rank's shares, one behind the other."""
        assert self._reader is not None, "hidden states are the last stage's"
        shares = [self._share_of(run, num_shares) for run in runs]
        buffer = torch.empty(
            sum(share.aligned_bytes for share in shares),
            dtype=torch.uint8,
            pin_memory=self._job.ranks.device.type
            == "cuda",  # torch keeps and reuses pinned memory
        )
        number, start = self._job.ranks.tp_rank if num_shares > 1 else 0, 0
        reads: list[Read] = []
        for run, share in zip(runs, shares, strict=True):
            share_TE = (
                buffer[start : start + share.num_bytes]
                .view(share.dtype)
                .view(share.rows, share.hidden_size)
            )
            reads += self._reads(self._reader, run, number, as_rows(share_TE))
            start += share.aligned_bytes
        self._reader.read_many(reads)
        return buffer

    def _reads(
        self, reader: HiddenCacheReader, run: TeacherRun, number: int, out_TE: np.ndarray
    ) -> list[Read]:
        """What fills ``out_TE``, share ``number`` of the run, which may begin and end inside a
        sample; the last one's end is padding.
        """
        share, reads = len(out_TE), []
        at = -number * share  # row of the sample's first token in this share
        for sample in run.entries:
            count = sample.stop - sample.first
            start, stop = max(-at, 0), min(share - at, count)
            if start < stop:
                entry = reader.lookup(sample.key, sample.metadata.sample_id, self._iteration)
                if entry is None:
                    raise CacheMiss(
                        f"sample {sample.metadata.sample_id} of iteration {self._iteration} is not "
                        "in the cache; run "
                        "the teacher pass again"
                    )
                reads.append(
                    Read(
                        entry,
                        sample.first + start,
                        sample.first + stop,
                        out_TE[at + start : at + stop],
                    )
                )
            at += count
        out_TE[max(at, 0) :] = 0
        return reads


class _MicroBatch(NamedTuple):
    """Runs that are read and joined together."""

    runs: Sequence[TeacherRun]
    num_shares: int  # tp ranks, or 1: every rank has all
    read: Future[torch.Tensor]


class _Share(NamedTuple):
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
