"""One teacher of a pass: its layers stream over its samples' tokens, its last hidden states go to the
cache.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from mtopd.dtypes import torch_dtype
from mtopd.hidden_cache import HiddenCacheWriter, view_rows
from mtopd.metrics_lines import PassMetrics
from mtopd.planning import Wave
from mtopd.teacher_offload.teacher_pass import PassResult, TeacherSample, run_teacher_pass
from mtopd.teacher_offload.teacher_probes import Probe
from mtopd.trajectories import TokenStore
from mtopd.types import SampleMetadata, first_loss_position

from .iteration import Iteration
from .session import Session


@dataclass(frozen=True)
class TeacherPlan:
    """One teacher's work: the batches in which a sample has no rows yet."""

    teacher: int
    samples: list[
        SampleMetadata
    ]  # the teacher's, of the quarters that are read; the waves hold places
    missing: set[int]  # ids of those without rows
    waves: list[list[Wave]]  # of each replica


def forward_teacher(
    session: Session, iteration: Iteration, tokens: TokenStore, teacher_plan: TeacherPlan
) -> PassMetrics:
    """Stream one teacher over its samples in ``tokens`` and keep the rows that are missing.
    Collective.
    """
    teachers, index = session.teachers, teacher_plan.teacher
    store, mesh = teachers.stores[index], teachers.meshes[index]
    hidden_dtype = teachers.hidden_dtype(index)
    waves = teacher_plan.waves[mesh.replica]
    planned = [i for wave in waves for batch in wave.batches for i in batch]
    probe = session.probes.probe(index)
    with (
        offload_student(session, index),
        HiddenCacheWriter(
            iteration.hidden_cache,
            writer=f"replica{mesh.replica:04d}",
            generation=session.run.generation,
            hidden_dtype=hidden_dtype,
        ) as writer,
    ):

        def keep(place: int, rows_TE: torch.Tensor) -> None:
            metadata = teacher_plan.samples[place]
            # The norm's output is the same on all tp ranks of a replica.
            if mesh.tp_rank == 0 and metadata.sample_id in teacher_plan.missing:
                rows_TE = rows_TE.to(torch_dtype(hidden_dtype)).cpu().contiguous()
                writer.put(
                    store.fingerprint,
                    store.hidden_size,
                    iteration.cache_key(metadata),
                    metadata.sample_id,
                    iteration.number,
                    view_rows(rows_TE),
                )

        result = run_teacher_pass(
            teachers.stream,
            index,
            teachers.layers(index),
            mesh.tp_group,
            {i: teacher_sample(tokens, teacher_plan.samples[i]) for i in planned},
            waves,
            keep=keep,
            probe=probe,
        )
    return reduce_counters(session, teacher_plan, result, probe)


def teacher_sample(tokens: TokenStore, sample: SampleMetadata) -> TeacherSample:
    """Tokens the teacher reads, behind its own prompt where it has one, and the positions that
    predict a trained token.
    """
    fields = tokens.tokens(sample.sample_id)
    context = fields.teacher_prompt_ids
    prompt_ids = fields.prompt_ids if context is None else context
    input_ids = np.concatenate([prompt_ids, fields.response_ids[:-1]])
    positions = first_loss_position(len(prompt_ids)) + np.flatnonzero(fields.loss_mask)
    return TeacherSample(input_ids, positions)


def offload_student(session: Session, index: int) -> AbstractContextManager[None]:
    """The student's gradients and optimizer state leave the device where a pass needs the room."""
    offload, device = session.config.teacher_offload, session.ranks.device
    moves = offload.offload_student == "always"
    if offload.offload_student == "auto" and device.type == "cuda":
        # On CPU the device is the host: moving frees nothing.
        embedding, *layers, _ = (part.device_bytes for part in session.teachers.stream.parts[index])
        needed = embedding + 2 * max(layers) + 2 * offload.activation_budget
        moves = torch.cuda.mem_get_info(device)[0] < needed
    return session.student.trainer.offloaded() if moves else contextlib.nullcontext()


def reduce_counters(
    session: Session, teacher_plan: TeacherPlan, result: PassResult, probe: Probe | None
) -> PassMetrics:
    """What the whole job did for one teacher: sums over ranks, and the slowest or largest rank's
    peaks.  Collective.
    """
    teachers, device = session.teachers, session.ranks.device
    reads = teachers.stream.take_counters()
    # Includes samples that ran only because they share a batch with a missing one.
    tokens = result.tokens if teachers.meshes[teacher_plan.teacher].tp_rank == 0 else 0
    added = [reads.bytes_read, reads.bytes_kept, tokens]
    largest = [
        sum(w.stall_s for w in result.waves),
        max(w.peak_device_bytes for w in result.waves),
        reads.peak_host_bytes,
        sum(w.relayouts for w in result.waves),
    ]
    sums = torch.tensor(added, dtype=torch.float64, device=device)
    peaks = torch.tensor(largest, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
    return PassMetrics(
        bytes_read=int(sums[0]),
        bytes_kept=int(sums[1]),
        stored_bytes=teachers.stores[teacher_plan.teacher].pass_bytes(),
        tokens=int(sums[2]),
        samples=len(teacher_plan.missing),
        waves=len(result.waves),
        stall_s=float(peaks[0]),
        peak_device_bytes=int(peaks[1]),
        peak_host_bytes=int(peaks[2]),
        relayouts=int(peaks[3]),
        **(probe.report if probe else {}),
    )
