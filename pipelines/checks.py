"""Every refusal that needs no process group: one clear line for each mistake a user can make.

Whether model and layout fit is said here; what the settings alone show is in `config`; the parts
that rely on either assert it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mtopd.config import ConsolidateConfig, ParallelConfig, SpecialistConfig, StudentConfig
from mtopd.families import ModelFacts, model_facts
from mtopd.hf_checkpoint import HFTensors, load_hf_config
from mtopd.megatron.options import (
    LAYOUT_DEPENDENT,
    has_sequence_parallel,
    sort_fields,
    splits_unevenly,
)
from mtopd.teacher_offload.store import TeacherStore, check_files, open_store
from mtopd.tokenizer import first_difference, load_tokenizer, tokenizer_hash, vocab_size
from mtopd.types import MtopdError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_student(student: StudentConfig, *, deterministic: bool) -> PreTrainedTokenizerBase:
    """The student's tokenizer, after its HF folder and its Megatron table were checked."""
    facts = check_hf_folder(student.model)
    tokenizer = load_tokenizer(student.model)
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
        raise MtopdError(f"the tokenizer of {student.model} needs an EOS and a pad token")
    if (ids := vocab_size(tokenizer)) > facts.vocab_size:
        raise MtopdError(
            f"{student.model}: the tokenizer has {ids} ids, the model only {facts.vocab_size} "
            "rows for them"
        )
    megatron = sort_fields(student.megatron).transformer
    check_experts(student, facts, megatron)
    if deterministic and facts.num_experts:
        check_routing(megatron)
    check_axes(student.parallel)
    chunks = student.parallel.pp * student.parallel.vpp
    for what, count, ways in (
        ("key-value heads", facts.num_key_value_heads, student.parallel.tp),
        ("layers", facts.num_layers, 1 if splits_unevenly(megatron) else chunks),
    ):
        if count % ways:
            raise MtopdError(
                f"{student.model} has {count} {what}, which {ways}-way parallelism does not divide"
            )
    return tokenizer


def check_axes(parallel: ParallelConfig) -> None:
    """The student's axes beside one another."""
    if parallel.vpp > 1 and parallel.pp == 1:
        raise MtopdError(
            f"student.parallel.vpp {parallel.vpp} needs a pipeline: set pp to 2 or more, or vpp "
            "to 1"
        )
    stage, experts = parallel.world_size // parallel.pp, parallel.ep * parallel.expert_tp
    if stage % experts:
        raise MtopdError(
            f"ep {parallel.ep} x etp {parallel.expert_tp} = {experts} does not divide the {stage} "
            "ranks of a pipeline stage; set student.parallel.ep to a divisor"
        )


def check_experts(
    student: StudentConfig, facts: ModelFacts, megatron: Mapping[str, object]
) -> None:
    """A student's experts and latent attention, on its layout."""
    parallel = student.parallel
    experts, latent = facts.num_experts, facts.is_latent_attention
    if parallel.ep > 1 and (not experts or experts % parallel.ep):
        raise MtopdError(
            f"{student.model} has {experts} experts, which student.parallel.ep {parallel.ep} does "
            "not divide"
        )
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


def check_routing(megatron: Mapping[str, object]) -> None:
    """Of a deterministic run with experts: a step may not depend on how tokens meet in batches."""
    for name, allowed in LAYOUT_DEPENDENT.items():
        if megatron.get(name, allowed[0]) not in allowed:
            raise MtopdError(
                f"student.megatron.{name}={megatron[name]} makes a step depend on the layout; set "
                f"deterministic=false, or leave it at {' or '.join(map(str, allowed))}"
            )


def check_hf_folder(folder: Path) -> ModelFacts:
    """The facts of a checkpoint whose weight files are whole."""
    facts = model_facts(load_hf_config(folder))
    HFTensors(folder)
    return facts


def check_world(student: StudentConfig) -> None:
    """Under an outer torchrun, its world size must be the config's."""
    parallel = student.parallel
    found = os.environ.get("WORLD_SIZE")
    if found is not None and int(found) != parallel.world_size:
        need = parallel.tp * parallel.pp * parallel.cp
        axes = f"tp {parallel.tp} x pp {parallel.pp}" + (
            f" x cp {parallel.cp}" if parallel.cp > 1 else ""
        )
        if int(found) % need:
            raise MtopdError(f"world size {found} is not a multiple of {axes} = {need}")
        raise MtopdError(
            f"world size is {found}, the config asks for {axes} x dp {parallel.dp} = "
            f"{parallel.world_size}; set student.parallel.dp={int(found) // need}"
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


def check_baselines(config: ConsolidateConfig) -> None:
    for name, folder in config.evaluation.baselines.items():
        try:
            check_hf_folder(folder)
        except MtopdError as error:
            raise MtopdError(f"evaluation.baselines.{name}: {error}") from None


def check_teachers(
    config: ConsolidateConfig, tokenizer: PreTrainedTokenizerBase
) -> list[TeacherStore]:
    """The teachers' stores, whole and fit for the student and the layout."""
    stores = [check_files(open_store(t.store)) for t in config.teachers]
    for i, (store, teacher) in enumerate(zip(stores, config.teachers, strict=True)):
        check_teacher(teacher.name, store, tokenizer, config.student.model)
        check_mesh(teacher.name, store, config.teacher_tp(i), teacher.parallel.ep)
    return stores


def check_mesh(name: str, store: TeacherStore, tp: int, ep: int) -> None:
    """A store is cut into slices for tp, and by expert for ep."""
    for axis, size, count, what in (
        ("tp", tp, store.slices, "slices"),
        ("ep", ep, store.num_experts, "experts"),
    ):
        if size > 1 and (not count or count % size):
            also = ", or add the teacher again with more slices" if axis == "tp" else ""
            raise MtopdError(
                f"teacher {name!r} has {count} {what}, which {axis} {size} does not divide; set "
                f"its parallel.{axis} to {'a divisor' if count else 1}{also}"
            )


def check_teacher(
    name: str, store: TeacherStore, tokenizer: PreTrainedTokenizerBase, student: Path
) -> None:
    """A teacher scores the student's tokens: its tokenizer must be the student's, token by token."""
    if store.manifest["tokenizer_hash"] != tokenizer_hash(tokenizer):
        with store.tokenizer_folder() as folder:
            difference = first_difference(load_tokenizer(folder), tokenizer)
        raise MtopdError(
            f"teacher {name!r} has another tokenizer than the student {student}: {difference}; "
            "exact reverse KL needs one tokenizer: use a teacher with the student's, or remove it"
        )
    if store.vocab_size != vocab_size(tokenizer):
        raise MtopdError(
            f"teacher {name!r} has vocab_size {store.vocab_size}, the student "
            f"{vocab_size(tokenizer)}; they must agree"
        )
