"""Phase 2: every teacher reads its own trajectories; its last hidden states go to the cache."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from mtopd.hidden_cache import HiddenCacheReader, HiddenCacheWriter, as_rows, discard_orphans, sample_key
from mtopd.pipelines.job import Job
from mtopd.run_dir import is_sealed
from mtopd.teacher_offload.layer_stream import LayerStream
from mtopd.teacher_offload.store import TeacherStore
from mtopd.teacher_offload.teacher_pass import TeacherSample, run_teacher_pass, split_over_replicas
from mtopd.trajectories import TokenStore, read_metadata, sample_metadata
from mtopd.types import SampleMetadata

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachedSample:
    """What names a sample's rows in the hidden cache."""

    metadata: SampleMetadata
    key: bytes


def run(job: Job, iteration: int) -> None:
    """Fill and seal ``hidden_cache/`` of the iteration; check a sealed one and mend what is damaged.  Collective."""
    folder = job.run.hidden_cache(iteration)
    tokens = TokenStore(job.run.trajectories(iteration))
    samples = sample_metadata(read_metadata(job.run.trajectories(iteration)))
    if job.ranks.rank == 0 and folder.exists():
        discard_orphans(folder)  # segments of a killed start that no index names
    dist.barrier()
    for index, store in enumerate(job.stores):
        own = [s for s in samples if s.teacher_index == index]
        lacking = missing(job, iteration, [CachedSample(s, cache_key(job, store, tokens, s)) for s in own])
        if lacking:
            done = _one_teacher(job, iteration, index, tokens, lacking)
            job.metrics.write("teacher_pass", iteration, {"teachers": {store.name: done}}, part=store.name)
    if job.ranks.rank == 0 and not is_sealed(folder):
        job.run.seal(folder)
    dist.barrier()


def cache_key(job: Job, store: TeacherStore, tokens: TokenStore, sample: SampleMetadata) -> bytes:
    fields = tokens.tokens(sample.sample_id)
    return sample_key(
        store.fingerprint, fields.prompt_ids, fields.response_ids, fields.loss_mask, job.cache_dtype(store)
    )


def missing(job: Job, iteration: int, samples: Sequence[CachedSample]) -> list[CachedSample]:
    """Samples the cache does not hold soundly, the same list on every rank; each rank checks its part.  Collective."""
    with HiddenCacheReader(job.run.hidden_cache(iteration)) as reader:
        mine = {(s.key, s.metadata.sample_id, iteration): s for s in samples[job.ranks.rank :: job.ranks.world_size]}
        causes = reader.missing(mine)
    for request, cause in causes.items():
        if is_sealed(job.run.hidden_cache(iteration)):
            logger.warning("hidden cache: sample %d is computed again: %s", request[1], cause)
    found: list[list[int]] = [[] for _ in range(job.ranks.world_size)]
    dist.all_gather_object(found, [request[1] for request in causes])
    lacking = {sample_id for part in found for sample_id in part}
    return [s for s in samples if s.metadata.sample_id in lacking]


def _one_teacher(
    job: Job, iteration: int, index: int, tokens: TokenStore, samples: list[CachedSample]
) -> dict[str, float]:
    store, mesh = job.stores[index], job.teacher_mesh
    lengths = [s.metadata.prompt_len + s.metadata.response_len for s in samples]
    mine = [samples[i] for i in split_over_replicas(lengths, mesh.num_replicas)[mesh.replica]]
    stream = LayerStream(store, mesh, job.ranks.device, job.config.teacher_offload.host_budget)
    hidden_dtype = job.cache_dtype(store)
    writer_name = f"replica{mesh.replica:04d}"
    try:
        with HiddenCacheWriter(
            job.run.hidden_cache(iteration),
            writer=writer_name,
            generation=job.run.generation,
            hidden_dtype=hidden_dtype,
        ) as writer:

            def keep(sample: TeacherSample, rows_TE: torch.Tensor) -> None:
                if mesh.tp_rank == 0:  # the norm's output is the same on all tp ranks of a replica
                    rows_TE = rows_TE.to(getattr(torch, hidden_dtype)).cpu().contiguous()
                    cached: CachedSample = sample.key
                    writer.put(
                        store.fingerprint,
                        store.hidden_size,
                        cached.key,
                        cached.metadata.sample_id,
                        iteration,
                        as_rows(rows_TE),
                    )

            result = run_teacher_pass(
                stream,
                job.teacher_layers(index),
                mesh.tp_group,
                [teacher_sample(tokens, s) for s in mine],
                batch_tokens=job.config.teacher_offload.batch_tokens,
                keep=keep,
            )
    finally:
        stream.close()
    counters = result.counters
    sums = torch.tensor([counters.bytes_read, result.tokens if mesh.tp_rank == 0 else 0], dtype=torch.float64)
    peaks = torch.tensor(
        [counters.stall_s, counters.peak_device_bytes, counters.peak_host_bytes, counters.relayouts],
        dtype=torch.float64,
    )
    sums, peaks = sums.to(job.ranks.device), peaks.to(job.ranks.device)
    dist.all_reduce(sums)
    dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
    return {
        "bytes_read": int(sums[0]),
        "stored_bytes": store.pass_bytes(),
        "tokens": int(sums[1]),
        "samples": len(samples),
        "waves": result.waves,
        "stall_s": float(peaks[0]),
        "peak_device_bytes": int(peaks[1]),
        "peak_host_bytes": int(peaks[2]),
        "relayouts": int(peaks[3]),
    }


def teacher_sample(tokens: TokenStore, sample: CachedSample) -> TeacherSample:
    """Tokens the teacher reads, and the positions that predict a trained token: prompt_len - 1 + k."""
    fields = tokens.tokens(sample.metadata.sample_id)
    input_ids = np.concatenate([fields.prompt_ids, fields.response_ids[:-1]])
    return TeacherSample(sample, input_ids, len(fields.prompt_ids) - 1 + np.flatnonzero(fields.loss_mask))
