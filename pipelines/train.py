"""Phase 3: train steps over teacher-sorted mini-batches; one teacher head on the device at a time."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.distributed as dist

from mtopd.convert.bridge import architecture
from mtopd.hidden_cache import CacheMiss, HiddenCacheReader, Read, as_rows
from mtopd.megatron.train_step import NonFiniteGradients, PackedMicroBatch
from mtopd.objectives.teacher_kl import STATISTICS, TeacherKL, TeacherRun
from mtopd.pipelines import teacher_pass
from mtopd.pipelines.job import Job
from mtopd.pipelines.packing import loss_positions, pack_rows, rows_here
from mtopd.planning import plan_train_steps
from mtopd.run_dir import is_sealed
from mtopd.teacher_offload.head_slot import HeadCounters, TeacherHead
from mtopd.trajectories import TokenStore, sample_metadata
from mtopd.types import MicroBatch, MtopdError, SampleMetadata, TrainStepPlan


def run(job: Job, iteration: int) -> None:
    """All train steps of the iteration, from sealed trajectories and hidden cache.  Collective."""
    for folder in (job.run.trajectories(iteration), job.run.hidden_cache(iteration)):
        if not is_sealed(folder):
            raise MtopdError(f"{folder} is not sealed; run the phase that writes it first")
    tokens = TokenStore(job.run.trajectories(iteration))
    samples = sample_metadata(tokens.metadata)
    plans = plan(job, samples, seed=job.iteration_seed(iteration))
    by_id = {s.sample_id: s for s in samples}
    runs = [runs_of_step(job, of_step, tokens, by_id) for of_step in plans]
    in_order = [list(itertools.chain(*of_step)) for of_step in runs]
    if job.heads:
        job.heads.expect([i for step in in_order for i in dict.fromkeys(run.teacher_index for run in step)])
    with open_cache(job, iteration) as reader, CachedStates(job, reader, iteration) as states:
        for number, of_step in enumerate(plans):
            for ahead in in_order[number : number + 2] if number == 0 else in_order[number + 1 : number + 2]:
                states.prefetch(ahead)
            step = iteration * len(plans) + number
            values = train_step(job, of_step, runs[number], tokens, states, step)
            job.metrics.write("bad_step" if "refused" in values else "train_step", iteration, values, step=step)
            job.progress.advance(tokens=sum(of_step.num_tokens.values()))


def plan(job: Job, samples: Sequence[SampleMetadata], *, seed: int) -> list[TrainStepPlan]:
    """The iteration's train steps, for this job's layout."""
    config, trainer = job.config.train, job.trainer
    return plan_train_steps(
        samples,
        num_train_steps=config.train_steps_per_iteration,
        teacher_weights=job.config.teacher_weights,
        dp_size=job.ranks.dp_size,
        micro_batch_size=config.micro_batch_size,
        token_budget=config.token_budget,
        seq_length_multiple=trainer.seq_length_multiple,
        micro_batch_multiple=trainer.micro_batch_multiple,
        cost=architecture(job.student.hf_config).sample_cost,
        normalization=config.normalization,
        seed=seed,
    )


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


def train_step(
    job: Job,
    plan: TrainStepPlan,
    runs: Sequence[Sequence[TeacherRun]],
    tokens: TokenStore,
    states: CachedStates,
    step: int,
) -> dict[str, object]:
    """One optimizer update; returns the values of its metrics line.  Collective."""
    started, heads = time.perf_counter(), job.heads
    stalled = states.stall_s
    mine = plan.micro_batches[job.ranks.dp_rank]
    micro_batches = [pack(job, plan, batch, of_batch, tokens) for batch, of_batch in zip(mine, runs, strict=True)]
    in_order = list(itertools.chain(*runs))
    objective = TeacherKL(
        num_teachers=len(job.stores),
        head=heads.lease if heads else _no_head,
        hidden_states=states,
        vocab_size=job.vocab_size,
        tp_group=job.ranks.tp_group,
        runs=in_order,
        seed=job.iteration_seed(step),
    )
    totals = job.trainer.forward_backward(micro_batches, objective)
    if heads:
        heads.drop()
    own = _own_numbers(job, in_order, states.stall_s - stalled, objective.statistics_s)
    sums = job.trainer.reduce_metrics(totals, objective.metric_names(len(job.stores)), *own)
    used = _head_metrics(job, sums)  # of a bad step, too
    teachers = range(len(job.stores))
    loss = sum(sums[f"loss/{i}"] for i in teachers)
    try:
        if not math.isfinite(loss) or any(sums[f"non_finite/{i}"] for i in teachers):
            raise NonFiniteGradients(f"the loss is {loss}")
        grad_norm, lr = job.trainer.optimizer_step()
    except NonFiniteGradients as error:
        return refused(job, step, f"{error}; {_culprits(job, objective, states)}") | used
    num_tokens = sum(plan.num_tokens.values())
    num_samples = Counter(s.teacher_index for part in plan.micro_batches for batch in part for s in batch.samples)
    wall_s = time.perf_counter() - started
    return {
        "loss": loss,
        "reverse_kl": sum(sums[f"kl_sum/{i}"] for i in range(len(job.stores))) / max(num_tokens, 1),
        "reverse_kl_by_teacher": {
            store.name: sums[f"kl_sum/{i}"] / sums[f"tokens/{i}"]
            for i, store in enumerate(job.stores)
            if sums[f"tokens/{i}"]
        },
        "share_by_teacher": {
            store.name: {
                "tokens": plan.num_tokens.get(i, 0) / max(num_tokens, 1),
                "samples": num_samples[i] / sum(num_samples.values()),
                "loss": sums[f"loss/{i}"] / loss if loss else 0.0,
            }
            for i, store in enumerate(job.stores)
        },
        "kl_noise_floor": {job.stores[i].name: floor for i, floor in sorted(job.noise_floor.items())},
        "below_10x_noise_floor": [
            job.stores[i].name
            for i, floor in sorted(job.noise_floor.items())
            if sums[f"tokens/{i}"] and sums[f"kl_sum/{i}"] / sums[f"tokens/{i}"] < 10 * floor
        ],
        "entropy": sums["entropy"] / max(num_tokens, 1),
        "tokens": num_tokens,
        "tokens_per_s": num_tokens / wall_s,
        "grad_norm": grad_norm,
        "lr": lr,
        "micro_batches": len(micro_batches),
        "waste": plan.waste,
        "statistics": {store.name: _statistics(sums, i) for i, store in enumerate(job.stores) if sums[f"measured/{i}"]},
        **used,
        "wall_s": wall_s,
    }


def refused(job: Job, step: int, why: str) -> dict[str, object]:
    """The step is left out: weights, optimizer and schedule are as before.  Raises MtopdError if it is one too many."""
    if job.bad_steps >= job.config.train.max_bad_steps:
        raise MtopdError(
            f"train step {step} was refused: {why}; weights are as after the step before.  Look at those samples, or "
            f"allow more than {job.bad_steps} such steps with train.max_bad_steps"
        )
    job.bad_steps += 1
    job.progress.note(f"train step {step} is left out ({job.bad_steps} of {job.config.train.max_bad_steps}): {why}")
    return {"refused": why, "bad_steps": job.bad_steps}


def _culprits(job: Job, objective: TeacherKL, states: CachedStates) -> str:
    """Which samples gave NaN or inf, and whether the teacher or the student did.  Collective."""
    mine: list[tuple[int, str]] = []
    for run, rows in objective.non_finite():
        finite_T = torch.isfinite(states(run)).all(-1)
        bounds = np.cumsum([0, *(entry.stop - entry.first for entry in run.entries)])
        for row in rows:
            entry = run.entries[int(np.searchsorted(bounds, row, "right")) - 1]
            name = job.stores[run.teacher_index].name
            side = "the student's hidden states" if finite_T[row] else f"the cached hidden states of teacher {name!r}"
            mine.append((entry.metadata.sample_id, side))
    gathered: list[list[tuple[int, str]]] = [[] for _ in range(job.ranks.world_size)]
    dist.all_gather_object(gathered, sorted(set(mine)))
    found = sorted({culprit for of_rank in gathered for culprit in of_rank})
    if not found:
        return "no sample's loss is NaN or inf: the gradients overflowed"
    by_side: dict[str, list[int]] = {}
    for sample_id, side in found:
        by_side.setdefault(side, []).append(sample_id)
    return "; ".join(
        f"{side} in sample{'s' if len(ids) > 1 else ''} {', '.join(map(str, ids[:8]))}{', ...' if len(ids) > 8 else ''}"
        for side, ids in by_side.items()
    )


def _statistics(sums: Mapping[str, float], teacher_index: int) -> dict[str, float]:
    """Means over a teacher's tokens, estimated on those measured (`mtopd.kernels.DistributionStatistics`)."""
    means = {name: sums[f"{name}/{teacher_index}"] / sums[f"tokens/{teacher_index}"] for name in STATISTICS}
    return {
        "tokens": sums[f"measured/{teacher_index}"],
        **means,
        "entropy_gap": abs(means["teacher_entropy"] - means["student_entropy"]),
    }


def _no_head(teacher_index: int) -> AbstractContextManager[TeacherHead]:
    raise AssertionError(f"teacher {teacher_index}'s head was asked for on a rank that is not on the last stage")


def _own_numbers(
    job: Job, runs: Sequence[TeacherRun], stall_s: float, statistics_s: float
) -> tuple[dict[str, float], dict[str, float]]:
    """What this rank did in a train step: numbers to be added over all ranks (a head that a tp group loads counts once,
    dp and cp ranks add), and those of which the largest is wanted."""
    counters = job.heads.take_counters() if job.heads else HeadCounters()
    assert all(n == 1 for n in counters.loads.values()), f"a head was loaded twice in one train step: {counters.loads}"
    needed, counts = {run.teacher_index for run in runs}, int(job.ranks.tp_rank == 0)
    added: dict[str, float] = {}
    for i in range(len(job.stores)):
        added[f"head_loads/{i}"] = counts * counters.loads.get(i, 0)
        added[f"head_bytes/{i}"] = counters.bytes_read.get(i, 0)
        added[f"needed/{i}"] = counts * (i in needed)
    return added, {
        "peak_resident_heads": counters.peak_resident,
        "peak_head_bytes": counters.peak_device_bytes,
        "stall_s": stall_s + counters.stall_s,
        "statistics_s": statistics_s,
    }


def _head_metrics(job: Job, sums: Mapping[str, float]) -> dict[str, object]:
    """Heads loaded and called for, residency, the slowest rank's seconds."""
    names = list(enumerate(store.name for store in job.stores))
    return {
        "head_loads": {name: int(sums[f"head_loads/{i}"]) for i, name in names},
        "head_bytes_read": {name: int(sums[f"head_bytes/{i}"]) for i, name in names},
        "teachers_in_step": int(sum(sums[f"needed/{i}"] for i, _ in names)),
        "peak_resident_heads": int(sums["peak_resident_heads"]),
        "peak_head_bytes": int(sums["peak_head_bytes"]),
        "stall_s": sums["stall_s"],
        "statistics_s": sums["statistics_s"],
    }


def pack(
    job: Job, plan: TrainStepPlan, micro_batch: MicroBatch, runs: Sequence[TeacherRun], tokens: TokenStore
) -> PackedMicroBatch:
    """Tensors of one micro-batch, with its runs."""
    return pack_rows(
        [tokens.tokens(s.sample_id) for s in micro_batch.samples],
        [s.token_weight for s in micro_batch.samples],
        shape=(1 if plan.packed else job.config.train.micro_batch_size or 1, plan.seq_length),
        packed=plan.packed,
        ranks=job.ranks,
        payload=runs,
    )


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
