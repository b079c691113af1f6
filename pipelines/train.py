"""Phase 3: train steps over teacher-sorted mini-batches; one teacher head on the device at a time."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
import torch.distributed as dist

from mtopd.megatron import cpu
from mtopd.megatron.train_step import NonFiniteGradients, PackedMicroBatch
from mtopd.metrics_lines import BadStepLine, TrainStepLine, from_values
from mtopd.objectives.teacher_kl import STATISTICS, TeacherKL, TeacherRun
from mtopd.planning import plan_train_steps
from mtopd.run_dir import is_sealed
from mtopd.teacher_offload.head_slot import HeadCounters, TeacherHead
from mtopd.trajectories import TokenStore
from mtopd.types import MicroBatch, MtopdError, SampleMetadata, TrainStepPlan

from .cached_states import CachedStates, open_cache, runs_of_step
from .job import Job
from .packing import pack_rows
from .prepare import architecture


def run(job: Job, iteration: int) -> None:
    """All train steps of the iteration, from sealed trajectories and hidden cache.  Collective."""
    for folder in (job.run.trajectories(iteration), job.run.hidden_cache(iteration)):
        if not is_sealed(folder):
            raise MtopdError(f"{folder} is not sealed; run the phase that writes it first")
    tokens = job.tokens(iteration)
    plans = plan(job, [*tokens.samples.values()], seed=job.iteration_seed(iteration))
    runs = [runs_of_step(job, of_step, iteration) for of_step in plans]
    if job.heads:
        by_step = (
            dict.fromkeys(run.teacher_index for run in itertools.chain(*of_step))
            for of_step in runs
        )
        job.heads.expect(itertools.chain(*by_step))
    with open_cache(job, iteration) as reader, CachedStates(job, reader, iteration) as states:
        states.prefetch(runs[0])
        for number, of_step in enumerate(plans):
            for ahead in runs[number + 1 : number + 2]:
                states.prefetch(ahead)
            step = iteration * len(plans) + number
            values = train_step(job, of_step, runs[number], tokens, states, step)
            kind = BadStepLine if "refused" in values else TrainStepLine
            job.metrics.write(from_values(kind, values), iteration, step=step)
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
        cost=architecture(job.student.facts).sample_cost,
        normalization=config.normalization,
        seed=seed,
    )


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
    micro_batches = [
        pack(job, plan, batch, of_batch, tokens) for batch, of_batch in zip(mine, runs, strict=True)
    ]
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
        with cpu.own_code():
            totals |= objective.statistics()
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
    num_samples = Counter(
        s.teacher_index for part in plan.micro_batches for batch in part for s in batch.samples
    )
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
        "kl_noise_floor": {
            job.stores[i].name: floor for i, floor in sorted(job.noise_floor.items())
        },
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
        "statistics": {
            store.name: _statistics(sums, i)
            for i, store in enumerate(job.stores)
            if sums[f"measured/{i}"]
        },
        **used,
        "wall_s": wall_s,
    }


def refused(job: Job, step: int, why: str) -> dict[str, object]:
    """The step is left out: weights, optimizer and schedule are as before.  Raises MtopdError if it
    is one too many.
    """
    if job.bad_steps >= job.config.train.max_bad_steps:
        raise MtopdError(
            f"train step {step} was refused: {why}; weights are as after the step before.  Look at "
            "those samples, or "
            f"allow more than {job.bad_steps} such steps with train.max_bad_steps"
        )
    job.bad_steps += 1
    job.progress.note(
        f"train step {step} is left out ({job.bad_steps} of {job.config.train.max_bad_steps}): "
        f"{why}"
    )
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
            side = (
                "the student's hidden states"
                if finite_T[row]
                else f"the cached hidden states of teacher {name!r}"
            )
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
        f"{side} in sample{'s' if len(ids) > 1 else ''} "
        f"{', '.join(map(str, ids[:8]))}{', ...' if len(ids) > 8 else ''}"
        for side, ids in by_side.items()
    )


def _statistics(sums: Mapping[str, float], teacher_index: int) -> dict[str, float]:
    """Means over a teacher's tokens, estimated on those measured
    (`mtopd.kernels.DistributionStatistics`).
    """
    means = {
        name: sums[f"{name}/{teacher_index}"] / sums[f"tokens/{teacher_index}"]
        for name in STATISTICS
    }
    return {
        "tokens": sums[f"measured/{teacher_index}"],
        **means,
        "entropy_gap": abs(means["teacher_entropy"] - means["student_entropy"]),
    }


def _no_head(teacher_index: int) -> AbstractContextManager[TeacherHead]:
    raise AssertionError(
        f"teacher {teacher_index}'s head was asked for on a rank that is not on the last stage"
    )


def _own_numbers(
    job: Job, runs: Sequence[TeacherRun], stall_s: float, statistics_s: float
) -> tuple[dict[str, float], dict[str, float]]:
    """What this rank did in a train step: numbers to be added over all ranks (a head that a tp
    group loads counts once, dp and cp ranks add), and those of which the largest is wanted.
    """
    counters = job.heads.take_counters() if job.heads else HeadCounters()
    assert all(n == 1 for n in counters.loads.values()), (
        f"a head was loaded twice in one train step: {counters.loads}"
    )
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
    job: Job,
    plan: TrainStepPlan,
    micro_batch: MicroBatch,
    runs: Sequence[TeacherRun],
    tokens: TokenStore,
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
