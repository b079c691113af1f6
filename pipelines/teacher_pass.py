"""Phase 2: every teacher reads its own trajectories; its last hidden states go to the cache.

    mtopd teacher-pass RUN_DIR --iteration N

Differs from the textbook in: a teacher is never whole on a device, its layers are streamed through
all ranks while its tokens wait; what is kept is the last hidden states, never logits; samples whose
rows the cache holds soundly are not computed again.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Set
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from mtopd.dtypes import item_size, torch_dtype
from mtopd.hidden_cache import (
    HiddenCacheReader,
    HiddenCacheWriter,
    merge_index,
    recover,
    view_rows,
)
from mtopd.megatron.agreement import decide, digest_of, gather, see_alike
from mtopd.metrics_lines import PassMetrics, TeacherPassLine
from mtopd.planning import Wave, plan_pass
from mtopd.run_dir import is_sealed
from mtopd.teacher_offload.teacher_pass import PassResult, TeacherSample, run_teacher_pass
from mtopd.teacher_offload.teacher_probes import Probe
from mtopd.types import SampleMetadata, first_loss_position

from .iteration import Iteration
from .session import Session

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TeacherPlan:
    """One teacher's work in this iteration: the batches in which a sample has no rows yet."""

    teacher: int
    samples: list[SampleMetadata]  # all of the teacher's; the waves hold their places
    missing: set[int]  # ids of those without rows
    waves: list[list[Wave]]  # of each replica


def run(session: Session, iteration: Iteration) -> None:
    """Fill and seal ``hidden_cache/`` of the iteration; check a sealed one and compute again what
    is damaged.  Collective.
    """
    folder, teachers, ranks = iteration.hidden_cache, session.teachers, session.ranks

    def recovered() -> None:
        """Save what a killed start left behind."""
        if not folder.exists():
            return
        found = recover(folder)
        if found.segments:
            logger.warning(
                "hidden cache: a killed start left %d segments; %d samples saved, %d to compute again",
                *(len(part) for part in (found.segments, found.salvaged, found.dropped)),
            )

    decide(ranks, recovered)
    missing = missing_samples(session, iteration)
    teacher_plans = see_alike(
        ranks,
        lambda: plan(session, iteration, missing),
        lambda plans: (digest_of(*map(plan_facts, plans)), f"plans {len(plans)} teachers"),
    )
    if teacher_plans:
        teachers.stream.expect([v.teacher for v in teacher_plans for _ in v.waves[0]])
    for teacher_plan in teacher_plans:
        session.check_rollout()
        name = teachers.stores[teacher_plan.teacher].name
        line = TeacherPassLine({name: forward_teacher(session, iteration, teacher_plan)})
        session.metrics.write(line, iteration.number, part=name)
    if ranks.rank == 0 and (teacher_plans or not is_sealed(folder)):
        if folder.exists():
            merge_index(folder)
        session.run.seal(folder)
    dist.barrier()


def plan(session: Session, iteration: Iteration, missing: Set[int]) -> list[TeacherPlan]:
    """The teachers that have something to do, in index order; the same on every rank.

    Batches are planned over all of a teacher's samples, whatever the cache holds: a repaired cache
    is bit-identical to an uninterrupted one.
    """
    offload, teachers = session.config.teacher_offload, session.teachers
    all_samples = iteration.samples
    teacher_plans = []
    for index, store in enumerate(teachers.stores):
        samples = [s for s in all_samples if s.teacher_index == index]
        places = {i for i, s in enumerate(samples) if s.sample_id in missing}
        if places:
            waves = plan_pass(
                [sample.num_teacher_tokens for sample in samples],
                teachers.meshes[index].num_replicas,
                batch_tokens=offload.batch_tokens,
                token_bytes=store.hidden_size * item_size(store.dtype),
                activation_budget=offload.activation_budget,
                requested=places,
            )
            teacher_plans.append(
                TeacherPlan(index, samples, {samples[i].sample_id for i in places}, waves)
            )
    return teacher_plans


def plan_facts(teacher_plan: TeacherPlan) -> tuple[object, ...]:
    """What all ranks have to plan alike, in an order of its own."""
    sample_ids = [sample.sample_id for sample in teacher_plan.samples]
    return (teacher_plan.teacher, sample_ids, sorted(teacher_plan.missing), teacher_plan.waves)


def missing_samples(session: Session, iteration: Iteration) -> set[int]:
    """Ids of samples without sound rows in the cache, the same on every rank; each checks its part.
    Collective.
    """
    ranks = session.ranks
    part = iteration.samples[ranks.rank :: ranks.world_size]

    def look() -> list[int]:
        with HiddenCacheReader(iteration.hidden_cache) as reader:
            causes = reader.missing(
                [(iteration.cache_key(s), s.sample_id, iteration.number) for s in part]
            )
        if is_sealed(iteration.hidden_cache):
            for (_, sample_id, _), cause in causes.items():
                logger.warning("hidden cache: sample %d is computed again: %s", sample_id, cause)
        return [sample_id for _, sample_id, _ in causes]

    return {sample_id for found in gather(ranks, look) for sample_id in found}


def forward_teacher(
    session: Session, iteration: Iteration, teacher_plan: TeacherPlan
) -> PassMetrics:
    """Stream one teacher over its samples and keep the rows that are missing.  Collective."""
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
            {i: teacher_sample(iteration, teacher_plan.samples[i]) for i in planned},
            waves,
            keep=keep,
            probe=probe,
        )
    return reduce_counters(session, teacher_plan, result, probe)


def teacher_sample(iteration: Iteration, sample: SampleMetadata) -> TeacherSample:
    """Tokens the teacher reads, behind its own prompt where it has one, and the positions that
    predict a trained token.
    """
    fields = iteration.tokens.tokens(sample.sample_id)
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
