"""Phase 2: every teacher reads its own trajectories; its last hidden states go to the cache."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from mtopd.dtypes import item_size
from mtopd.hidden_cache import HiddenCacheReader, HiddenCacheWriter, as_rows, merge_index, recover
from mtopd.metrics_lines import PassMetrics, TeacherPassLine, from_values
from mtopd.planning import Wave, plan_pass
from mtopd.run_dir import is_sealed
from mtopd.teacher_offload.teacher_pass import PassResult, TeacherSample, run_teacher_pass
from mtopd.trajectories import TokenStore
from mtopd.types import SampleMetadata

from .job import Job
from .probe import Probe

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachedSample:
    """What names a sample's rows in the hidden cache."""

    metadata: SampleMetadata
    key: bytes


@dataclass(frozen=True)
class _Visit:
    """One teacher's work in this iteration: the batches in which a sample has no rows yet."""

    teacher: int
    samples: list[CachedSample]  # all of the teacher's; the waves hold their places
    lacking: set[int]  # ids of those without rows
    waves: list[list[Wave]]  # of each replica


def run(job: Job, iteration: int) -> None:
    """Fill and seal ``hidden_cache/`` of the iteration; check a sealed one and mend what is
    damaged.  Collective.
    """
    folder = job.run.hidden_cache(iteration)
    tokens = job.tokens(iteration)
    if job.ranks.rank == 0 and folder.exists():
        found = recover(folder)  # what a killed start left behind
        if found.segments:
            logger.warning(
                (
                    "hidden cache: a killed start left %d segments; %d samples saved, %d to be "
                    "computed again"
                ),
                len(found.segments),
                len(found.salvaged),
                len(found.dropped),
            )
    dist.barrier()
    visits = _plan(job, iteration, tokens)
    if visits:
        job.teacher_stream.expect([v.teacher for v in visits for _ in v.waves[0]])
    for visit in visits:
        name = job.stores[visit.teacher].name
        done = _one_teacher(job, iteration, visit, tokens)
        line = TeacherPassLine({name: from_values(PassMetrics, done)})
        job.metrics.write(line, iteration, part=name)
    if job.ranks.rank == 0 and (visits or not is_sealed(folder)):
        if folder.exists():
            merge_index(folder)
        job.run.seal(folder)
    dist.barrier()


def missing(job: Job, iteration: int, samples: Sequence[CachedSample]) -> set[int]:
    """Ids of samples without sound rows in the cache, the same on every rank; each checks its part.
    Collective.
    """
    with HiddenCacheReader(job.run.hidden_cache(iteration)) as reader:
        mine = {
            (s.key, s.metadata.sample_id, iteration): s
            for s in samples[job.ranks.rank :: job.ranks.world_size]
        }
        causes = reader.missing(mine)
    for request, cause in causes.items():
        if is_sealed(job.run.hidden_cache(iteration)):
            logger.warning("hidden cache: sample %d is computed again: %s", request[1], cause)
    found: list[list[int]] = [[] for _ in range(job.ranks.world_size)]
    dist.all_gather_object(found, [request[1] for request in causes])
    return {sample_id for part in found for sample_id in part}


def _plan(job: Job, iteration: int, tokens: TokenStore) -> list[_Visit]:
    """The teachers that have something to do, in index order; the same on every rank.  Collective.

    Batches are planned over all of a teacher's samples, whatever the cache holds: their bits are
    those of a pass that nothing disturbed.
    """
    samples = [CachedSample(s, job.cache_key(iteration, s)) for s in tokens.samples.values()]
    all_lacking = missing(job, iteration, samples)
    offload, visits = job.config.teacher_offload, []
    for index, store in enumerate(job.stores):
        own = [s for s in samples if s.metadata.teacher_index == index]
        lacking = all_lacking & {s.metadata.sample_id for s in own}
        if lacking:
            waves = plan_pass(
                [s.metadata.prompt_len + s.metadata.response_len - 1 for s in own],
                job.teacher_meshes[index].num_replicas,
                batch_tokens=offload.batch_tokens,
                token_bytes=store.hidden_size * item_size(store.dtype),
                activation_budget=offload.activation_budget,
                requested={i for i, s in enumerate(own) if s.metadata.sample_id in lacking},
            )
            visits.append(_Visit(index, own, lacking, waves))
    return visits


def _one_teacher(job: Job, iteration: int, visit: _Visit, tokens: TokenStore) -> dict[str, object]:
    store, mesh = job.stores[visit.teacher], job.teacher_meshes[visit.teacher]
    hidden_dtype = job.cache_dtype(store)
    waves = visit.waves[mesh.replica]
    mine = [i for wave in waves for batch in wave.batches for i in batch]
    proof = Probe(job, visit.teacher)
    with (
        job.trainer.off_device()
        if _moves_student(job, visit.teacher)
        else contextlib.nullcontext(),
        HiddenCacheWriter(
            job.run.hidden_cache(iteration),
            writer=f"replica{mesh.replica:04d}",
            generation=job.run.generation,
            hidden_dtype=hidden_dtype,
        ) as writer,
    ):

        def keep(sample: TeacherSample, rows_TE: torch.Tensor) -> None:
            cached: CachedSample = sample.key
            # The norm's output is the same on all tp ranks of a replica.
            if mesh.tp_rank == 0 and cached.metadata.sample_id in visit.lacking:
                rows_TE = rows_TE.to(getattr(torch, hidden_dtype)).cpu().contiguous()
                request = cached.key, cached.metadata.sample_id, iteration
                writer.put(store.fingerprint, store.hidden_size, *request, as_rows(rows_TE))

        result = run_teacher_pass(
            job.teacher_stream,
            visit.teacher,
            job.teacher_layers(visit.teacher),
            mesh.tp_group,
            {i: teacher_sample(tokens, visit.samples[i]) for i in mine},
            waves,
            keep=keep,
            probe_ids=proof.input_ids,
            check=proof.check,
        )
    return _counted(job, visit, result) | proof.report


def _moves_student(job: Job, index: int) -> bool:
    """Whether the student's gradients and optimizer state must make room for this pass on the
    device.
    """
    wanted = job.config.teacher_offload.offload_student
    if wanted != "auto" or job.ranks.device.type != "cuda":
        return wanted == "always"  # on CPU the device is the host: moving frees nothing
    embedding, *layers, _ = (part.device_bytes for part in job.teacher_stream.parts[index])
    needed = embedding + 2 * max(layers) + 2 * job.config.teacher_offload.activation_budget
    return torch.cuda.mem_get_info(job.ranks.device)[0] < needed


def _counted(job: Job, visit: _Visit, result: PassResult) -> dict[str, object]:
    """What the whole job did for one teacher: sums over ranks, and the slowest or largest rank's
    peaks.  Collective.
    """
    store, mesh, reads = (
        job.stores[visit.teacher],
        job.teacher_meshes[visit.teacher],
        job.teacher_stream.take_counters(),
    )
    tokens = result.tokens if mesh.tp_rank == 0 else 0  # those run beside what was lacking, too
    sums = torch.tensor(
        [reads.bytes_read, reads.bytes_kept, tokens], dtype=torch.float64, device=job.ranks.device
    )
    peaks = torch.tensor(
        [
            sum(w.stall_s for w in result.waves),
            max(w.peak_device_bytes for w in result.waves),
            reads.peak_host_bytes,
            sum(w.relayouts for w in result.waves),
        ],
        dtype=torch.float64,
        device=job.ranks.device,
    )
    dist.all_reduce(sums)
    dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
    return {
        "bytes_read": int(sums[0]),
        "bytes_kept": int(sums[1]),
        "stored_bytes": store.pass_bytes(),
        "tokens": int(sums[2]),
        "samples": len(visit.lacking),
        "waves": len(result.waves),
        "stall_s": float(peaks[0]),
        "peak_device_bytes": int(peaks[1]),
        "peak_host_bytes": int(peaks[2]),
        "relayouts": int(peaks[3]),
    }


def teacher_sample(tokens: TokenStore, sample: CachedSample) -> TeacherSample:
    """Tokens the teacher reads, and the positions that predict a trained token: prompt_len - 1 + k."""
    fields = tokens.tokens(sample.metadata.sample_id)
    input_ids = np.concatenate([fields.prompt_ids, fields.response_ids[:-1]])
    return TeacherSample(
        sample, input_ids, len(fields.prompt_ids) - 1 + np.flatnonzero(fields.loss_mask)
    )
