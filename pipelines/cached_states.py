"""What the objective asks for, from the cache: which rows of which samples, read ahead, joined over tp."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist

from mtopd.hidden_cache import CacheMiss, HiddenCacheReader, Read, as_rows
from mtopd.objectives.teacher_kl import TeacherRun
from mtopd.pipelines import teacher_pass
from mtopd.pipelines.job import Job
from mtopd.pipelines.packing import loss_positions, rows_here
from mtopd.trajectories import TokenStore
from mtopd.types import MicroBatch, SampleMetadata, TrainStepPlan


@dataclass(frozen=True, slots=True)
class SampleRows:
    """Rows [first, stop) of a sample's cached hidden states."""

    metadata: SampleMetadata
    key: bytes
    first: int
    stop: int


def runs_of_step(
    job: Job, plan: TrainStepPlan, tokens: TokenStore, by_id: dict[int, SampleMetadata]
) -> list[list[TeacherRun]]:
    """The runs of this rank's micro-batches; none on ranks that are not on the last stage, which look up no keys."""
    mine = plan.micro_batches[job.ranks.dp_rank]
    return [_runs(job, plan, micro_batch, tokens, by_id) if job.heads else [] for micro_batch in mine]


def _runs(
    job: Job, plan: TrainStepPlan, micro_batch: MicroBatch, tokens: TokenStore, by_id: dict[int, SampleMetadata]
) -> list[TeacherRun]:
    """Contiguous teacher runs of the micro-batch's loss rows on this rank."""
    runs: list[TeacherRun] = []
    for teacher_index, planned in itertools.groupby(micro_batch.samples, key=lambda sample: sample.teacher_index):
        entries = []
        for sample_id in (sample.sample_id for sample in planned):
            fields = tokens.tokens(sample_id)
            here = rows_here(loss_positions(fields), plan.seq_length, job.ranks)
            key = teacher_pass.key_of(job, job.stores[teacher_index], fields)
            entries += [SampleRows(by_id[sample_id], key, rows.first, rows.stop) for rows in here]
        start = runs[-1].stop if runs else 0
        stop = start + sum(entry.stop - entry.first for entry in entries)
        if entries:
            runs.append(TeacherRun(teacher_index, start, stop, entries))
    return runs


def open_cache(job: Job, iteration: int) -> AbstractContextManager[HiddenCacheReader | None]:
    """The iteration's hidden states; ranks before the last stage never open them."""
    return HiddenCacheReader(job.run.hidden_cache(iteration)) if job.heads else contextlib.nullcontext()


class CachedStates:
    """Fetches the hidden states of a run: each tp rank reads its share of the rows, an all-gather joins them.

    ``prefetch`` lets a background thread read the shares of a train step ahead, into pinned memory on CUDA.  A share
    is forgotten when it is used, so at most the mini-batches that were announced and not yet used are held.
    """

    def __init__(self, job: Job, reader: HiddenCacheReader | None, iteration: int) -> None:
        self._job, self._reader, self._iteration = job, reader, iteration
        self._thread = ThreadPoolExecutor(1, "hidden-states")
        self._shares: dict[tuple[tuple[int, int, int], ...], Future[torch.Tensor]] = {}  # by the run's sample ids
        self.stall_s = 0.0

    def prefetch(self, runs: Sequence[TeacherRun]) -> None:
        """Start to read the runs, in this order.  What fails is raised when the run is asked for."""
        for run in runs:
            self._shares[_name(run)] = self._thread.submit(self._read_share, run)

    def __call__(self, run: TeacherRun) -> torch.Tensor:
        """[T, E] rows of the run in order, in the cache's dtype."""
        started = time.perf_counter()
        if _name(run) not in self._shares:
            self.prefetch([run])
        ranks, rows = self._job.ranks, run.stop - run.start
        mine_TE = self._shares.pop(_name(run)).result().to(ranks.device, non_blocking=True)
        if ranks.tp_size == 1:
            joined_TE = mine_TE
        else:
            joined_TE = mine_TE.new_empty(len(mine_TE) * ranks.tp_size, mine_TE.shape[1])
            dist.all_gather_single(joined_TE, mine_TE, group=ranks.tp_group)
        self.stall_s += time.perf_counter() - started
        return joined_TE[:rows]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._shares.clear()

    def _read_share(self, run: TeacherRun) -> torch.Tensor:
        """[ceil(T / tp), E] of the run, which may begin and end inside a sample; the last rank's end is padding."""
        assert self._reader is not None, "hidden states are the last stage's"
        store, ranks = self._job.stores[run.teacher_index], self._job.ranks
        share = -(-(run.stop - run.start) // ranks.tp_size)
        share_TE = torch.empty(
            share,
            store.hidden_size,
            dtype=getattr(torch, self._job.cache_dtype(store)),
            pin_memory=ranks.device.type == "cuda",  # torch keeps and reuses pinned memory
        )
        out_TE = as_rows(share_TE)
        first = ranks.tp_rank * share
        reads, at = [], -first  # row of the sample's first token in this share
        for sample in run.entries:
            count = sample.stop - sample.first
            start, stop = max(-at, 0), min(share - at, count)
            if start < stop:
                entry = self._reader.lookup(sample.key, sample.metadata.sample_id, self._iteration)
                if entry is None:
                    raise CacheMiss(
                        f"sample {sample.metadata.sample_id} of iteration {self._iteration} is not in the cache; run "
                        "the teacher pass again"
                    )
                reads.append(Read(entry, sample.first + start, sample.first + stop, out_TE[at + start : at + stop]))
            at += count
        self._reader.read_many(reads)
        out_TE[max(at, 0) :] = 0
        return share_TE


def _name(run: TeacherRun) -> tuple[tuple[int, int, int], ...]:
    return tuple((sample.metadata.sample_id, sample.first, sample.stop) for sample in run.entries)
