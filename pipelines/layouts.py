"""Refusals of a layout that a model is not trained, streamed or stored on: each names the option, the
model's number, and the values that work.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from mtopd.config import ParallelConfig, StudentConfig
from mtopd.config_specialist import SpecialistConfig
from mtopd.families import ModelFacts, model_facts
from mtopd.hf_checkpoint import load_hf_config
from mtopd.megatron.options import (
    LAYOUT_DEPENDENT,
    has_sequence_parallel,
    split_options,
    splits_unevenly,
)
from mtopd.planning import choose_slices, in_words, sizes_that_work, undivided, working_sizes
from mtopd.teacher_offload.store import TeacherStore
from mtopd.types import MtopdError

_RANKS_OF_A_MACHINE = 128  # that are started here, however few its cores are


def check_layout(student: StudentConfig, facts: ModelFacts, megatron: Mapping[str, object]) -> None:
    """The student's parallel sizes; ``megatron`` are the user's of Megatron's TransformerConfig."""
    parallel = student.parallel
    check_experts(student, facts, megatron)
    counts = facts.tp_counts
    if facts.num_experts and parallel.expert_tp > 1:
        counts["columns in an expert"] = facts.expert_ffn_size
    if lacking := undivided(parallel.tp, counts):
        works = sizes_that_work("tp", working_sizes(counts.values()))
        raise MtopdError(
            f"student.parallel.tp {parallel.tp}: {student.model} has {lacking}; {works}"
        )
    check_axes(parallel)
    chunks = parallel.pp * parallel.vpp
    if facts.num_layers % chunks and not splits_unevenly(megatron):
        given = f"student.parallel.pp {parallel.pp}"
        layers, sizes = facts.num_layers, working_sizes([facts.num_layers])
        works = sizes_that_work("pp", sizes)
        if parallel.vpp > 1:
            given += f" with vpp {parallel.vpp}"
            works = f"pp x vpp may be {in_words(sizes, 'or')}"
        elif layers > parallel.pp:
            each = -(-layers // parallel.pp)
            uneven = [each] * (parallel.pp - 1) + [layers - each * (parallel.pp - 1)]
            if uneven[-1] > 0:
                works += f", or an uneven split, e.g. {' '.join(split_options(uneven))}"
        raise MtopdError(f"{given}: {student.model} has {layers} layers; {works}")


def check_own_ranks(parallel: ParallelConfig) -> None:
    """Ranks that all start on this machine."""
    most = max(_RANKS_OF_A_MACHINE, 4 * (os.cpu_count() or 1))
    if parallel.world_size > most:
        raise MtopdError(
            f"student.parallel asks for {parallel.world_size} ranks, all on this machine "
            f"({os.cpu_count()} cores); it starts {most} at most: lower dp, or start the ranks of "
            "several machines with torchrun"
        )


def check_axes(parallel: ParallelConfig) -> None:
    """The student's axes beside one another."""
    if parallel.vpp > 1 and parallel.pp == 1:
        raise MtopdError(
            f"student.parallel.vpp {parallel.vpp} needs a pipeline: set pp to 2 or more, or vpp "
            "to 1"
        )


def check_experts(
    student: StudentConfig, facts: ModelFacts, megatron: Mapping[str, object]
) -> None:
    """A student's experts and latent attention, on its layout."""
    parallel = student.parallel
    experts, latent = facts.num_experts, facts.is_latent_attention
    stage = parallel.world_size // parallel.pp
    sizes = sizes_that_work("ep", working_sizes([experts, stage]) if experts else [1])
    given = f"student.parallel.ep {parallel.ep}"
    if parallel.ep > 1 and (not experts or experts % parallel.ep):
        raise MtopdError(f"{given}: {student.model} has {experts or 'no'} experts; {sizes}")
    # Megatron sums the replicated projections' gradients, and trains experts, only with it.
    if (experts or latent) and parallel.tp > 1 and not has_sequence_parallel(megatron):
        raise MtopdError(
            f"student.parallel.tp {parallel.tp} with {'experts' if experts else 'latent attention'} "
            "needs sequence parallelism: set student.megatron.sequence_parallel=true"
        )
    if latent and parallel.cp > 1:
        raise MtopdError(
            f"student.parallel.cp {parallel.cp} does not go with latent attention; set it to 1"
        )
    if student.freeze_router and not experts:
        raise MtopdError(
            f"student.freeze_router: {student.model} has no experts and no router; leave it out"
        )
    if parallel.etp is not None and not experts:
        raise MtopdError(
            f"student.parallel.etp {parallel.etp} splits experts, of which {student.model} has "
            "none; leave it out"
        )
    if experts and parallel.expert_tp != (parallel.tp if parallel.ep == 1 else 1):
        # Without ep Megatron does not sum experts' gradients over tp unless they are split over it.
        raise MtopdError(
            f"student.parallel.etp {parallel.expert_tp} with tp {parallel.tp} and ep {parallel.ep} "
            "is not supported: leave etp out (tp without ep, 1 with it)"
        )
    if stage % (parallel.ep * parallel.expert_tp):
        raise MtopdError(
            f"{given}: a pipeline stage has {stage} ranks and {student.model} {experts} experts; "
            f"{sizes}"
        )


def check_batch(config: SpecialistConfig) -> None:
    """Every dp rank trains on the same number of whole micro-batches."""
    size, parallel = config.train.global_batch_size, config.student.parallel
    unit, factors = (
        parallel.dp * config.train.micro_batch_size,
        f"dp {parallel.dp} x micro_batch_size",
    )
    if parallel.vpp > 1:  # an interleaved schedule works on groups of pp micro-batches
        unit, factors = unit * parallel.pp, f"pp {parallel.pp} x {factors}"
    if size % unit:
        raise MtopdError(
            f"train.global_batch_size {size} is not a multiple of {factors} "
            f"{config.train.micro_batch_size} = {unit}"
        )


def check_store(config: SpecialistConfig) -> None:
    """The store that a specialist ends as can be cut as the config asks."""
    if config.store is not None:
        facts = model_facts(load_hf_config(config.student.model))
        choose_slices(config.store.slices, facts.tp_counts, str(config.student.model))


def check_deterministic(megatron: Mapping[str, object]) -> None:
    """Of a deterministic run: a step may not depend on how tokens meet in batches, nor on ranks."""
    for name, allowed in LAYOUT_DEPENDENT.items():
        if megatron.get(name, allowed[0]) not in allowed:
            raise MtopdError(
                f"student.megatron.{name}={megatron[name]} makes a step depend on the layout; set "
                f"deterministic=false, or leave it at {' or '.join(map(str, allowed))}"
            )


def check_mesh(name: str, store: TeacherStore, tp: int, ep: int, *, world_size: int) -> None:
    """A store is cut into slices for tp, and by expert for ep."""
    for axis, size, count, what in (
        ("tp", tp, store.slices, "slices"),
        ("ep", ep, store.num_experts, "experts"),
    ):
        if size > 1 and (not count or count % size):
            also = ", or add the teacher again with more slices" if axis == "tp" else ""
            sizes = sizes_that_work(axis, working_sizes([count, world_size]) if count else [1])
            raise MtopdError(
                f"teacher {name!r} has {count or 'no'} {what}, which its parallel.{axis} {size} does "
                f"not divide; {sizes}{also}"
            )
