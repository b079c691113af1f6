"""Everything a launcher can check before a process group exists: one clear line for each mistake a
user can make.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mtopd.config import ConsolidateConfig, SpecialistConfig, StudentConfig, resolved, to_yaml
from mtopd.families import ModelFacts, model_facts
from mtopd.files import remove_tree, sweep
from mtopd.hf_checkpoint import HFTensors, load_hf_config
from mtopd.manifest import start_run
from mtopd.megatron.options import (
    FREE_MEGATRON,
    LAYOUT_DEPENDENT,
    has_sequence_parallel,
    sort_fields,
    split_options,
    splits_unevenly,
)
from mtopd.megatron.parallel import check_layout
from mtopd.planning import MAX_STAGE_IMBALANCE, propose_split
from mtopd.prompt_table import write_prompt_table
from mtopd.run_dir import RunDir, is_sealed
from mtopd.teacher_offload.store import TeacherStore, check_files, open_store
from mtopd.tokenizer import first_difference, load_tokenizer, tokenizer_hash, vocab_size
from mtopd.types import MtopdError

Say = Callable[[str], None]


def consolidate(
    config: ConsolidateConfig, run: RunDir, say: Say, *, accept_changed: bool = False
) -> None:
    """Check a consolidation and write its run directory's first files.  The caller holds the lock.

    ``accept_changed``: go on from the newest checkpoint with other teachers, routes or another
    tokenizer.
    """
    tokenizer = check_student(config.student, deterministic=config.deterministic)
    check_world(config.student)
    stores = [check_files(open_store(t.store)) for t in config.teachers]
    for i, (store, teacher) in enumerate(zip(stores, config.teachers, strict=True)):
        check_teacher(teacher.name, store, tokenizer, config.student.model)
        check_mesh(teacher.name, store, config.teacher_tp(i), teacher.parallel.ep)
    for name, folder in config.evaluation.baselines.items():
        try:
            check_hf_folder(folder)
        except MtopdError as error:
            raise MtopdError(f"evaluation.baselines.{name}: {error}") from None
    table = [
        {"index": i, "name": t.name, "fingerprint": s.fingerprint, "weight": w}
        for i, (t, s, w) in enumerate(
            zip(config.teachers, stores, config.teacher_weights, strict=True)
        )
    ]
    manifest = {"tokenizer_hash": tokenizer_hash(tokenizer), "teachers": table}
    for change in _start(run, config, manifest, accept_changed=accept_changed):
        say(f"accepted: {change}")
    say_split(config, max(store.hidden_size for store in stores), say)
    routes = [t.route for t in config.teachers]
    write_prompt_table(run, config.data, tokenizer, routes, supervised=False, progress=say)


def say_split(config: ConsolidateConfig, teacher_hidden_size: int, say: Say) -> None:
    """Where the output layers make the other pipeline stages wait: by how much, and which split is
    better.
    """
    parallel = config.student.parallel
    if splits_unevenly(config.student.megatron):
        return
    even, better = propose_split(
        model_facts(load_hf_config(config.student.model)).architecture,
        parallel.pp,
        vpp_size=parallel.vpp,
        teacher_hidden_size=teacher_hidden_size,
        loss_share=config.data.max_response / config.data.context_length,
    )
    if even.imbalance <= MAX_STAGE_IMBALANCE:
        return
    said = f"the last pipeline stage costs {even.imbalance:.2f}x the mean"
    if better is not None:
        options = " ".join(split_options(better.layers))
        said += f"; {options} would make that {better.imbalance:.2f}x"
    if (better or even).imbalance > MAX_STAGE_IMBALANCE:
        knobs = "pp or vpp" if parallel.vpp > 1 else "pp"
        said += f"; no split is more even, a smaller student.parallel.{knobs} is"
    say(said)


def specialist(config: SpecialistConfig, run: RunDir, say: Say) -> None:
    """Check a supervised run and write its run directory's first files.  The caller holds the lock."""
    # Nothing is promised of another layout: experts may be balanced by a loss.
    tokenizer = check_student(config.student, deterministic=False)
    check_world(config.student)
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
    _start(run, config, {"tokenizer_hash": tokenizer_hash(tokenizer)})
    write_prompt_table(run, config.data, tokenizer, [{}], supervised=True, progress=say)


def _start(
    run: RunDir,
    config: ConsolidateConfig | SpecialistConfig,
    manifest: dict[str, Any],
    *,
    accept_changed: bool = False,
) -> list[str]:
    sweep(run.path)

    def drop_unfinished() -> None:
        """What was made for the former teachers: routed prompts, iterations that no checkpoint
        holds, their results.
        """
        run.prompts.unlink(missing_ok=True)
        finished = max(
            (int(p.name) for p in (run.path / "checkpoints").glob("[0-9]*") if is_sealed(p)),
            default=0,
        )
        for folder in (run.path / "iterations").glob("[0-9]*"):
            if int(folder.name) >= finished:
                remove_tree(folder)
        for path in (run.path / "evaluations").glob("[0-9]*.json"):
            if int(path.stem) > finished:
                path.unlink()

    return start_run(
        run,
        resolved(config),
        manifest,
        to_yaml(config),
        free=[("config", "student", "megatron", option) for option in FREE_MEGATRON],
        accept_changed=accept_changed,
        drop_unfinished=drop_unfinished,
    )


def check_student(student: StudentConfig, *, deterministic: bool) -> Any:
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
    if student.megatron:  # checked against Megatron's own fields, whose import takes seconds
        sort_fields(student.megatron)
    check_experts(student, facts, deterministic)
    parallel = student.parallel
    check_layout(parallel, parallel.world_size)
    chunks = 1 if splits_unevenly(student.megatron) else parallel.pp * parallel.vpp
    for what, count, ways in (
        ("key-value heads", facts.num_key_value_heads, parallel.tp),
        ("layers", facts.num_layers, chunks),
    ):
        if count % ways:
            raise MtopdError(
                f"{student.model} has {count} {what}, which {ways}-way parallelism does not divide"
            )
    return tokenizer


def check_experts(student: StudentConfig, facts: ModelFacts, deterministic: bool) -> None:
    """A student's experts, latent attention and further heads, on its layout."""
    parallel, megatron = student.parallel, student.megatron
    experts, latent = facts.num_experts, facts.is_latent_attention
    if parallel.ep > 1 and (not experts or experts % parallel.ep):
        raise MtopdError(
            f"{student.model} has {experts} experts, which student.parallel.ep {parallel.ep} does "
            "not divide"
        )
    if (experts or latent) and parallel.tp > 1 and not has_sequence_parallel(megatron):
        raise MtopdError(
            f"student.parallel.tp {parallel.tp} with "
            f"{'experts' if experts else 'latent attention'} needs sequence "
            "parallelism: set student.megatron.sequence_parallel=true"
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
            "is not supported: "
            "leave etp out (tp without ep, 1 with it)"
        )
    for name, allowed in LAYOUT_DEPENDENT.items() if deterministic and experts else ():
        if megatron.get(name, allowed[0]) not in allowed:
            raise MtopdError(
                f"student.megatron.{name}={megatron[name]} makes a step depend on the layout; set "
                "deterministic=false, "
                f"or leave it at {' or '.join(map(str, allowed))}"
            )


def check_hf_folder(folder: Path) -> ModelFacts:
    """The facts of a checkpoint whose weight files are whole."""
    facts = model_facts(load_hf_config(folder))
    HFTensors(folder)
    return facts


def check_world(student: StudentConfig) -> None:
    """Under an outer torchrun its world size must be the config's."""
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
            f"{parallel.world_size}; "
            f"set student.parallel.dp={int(found) // need}"
        )


def check_mesh(name: str, store: TeacherStore, tp: int, ep: int) -> None:
    """A store is cut into slices for tp, and by expert for ep."""
    for axis, size, count, what in (
        ("tp", tp, store.slices, "slices"),
        ("ep", ep, store.num_experts, "experts"),
    ):
        if count % size:
            raise MtopdError(
                f"teacher {name!r} has {count} {what}, which {axis} {size} does not divide; set "
                f"its parallel.{axis} to "
                "a divisor"
                + (", or add the teacher again with more slices" if axis == "tp" else "")
            )


def check_teacher(name: str, store: TeacherStore, tokenizer: Any, student: Path) -> None:
    """A teacher scores the student's tokens: its tokenizer must be the student's, token by token."""
    if store.manifest["tokenizer_hash"] != tokenizer_hash(tokenizer):
        with store.tokenizer_folder() as folder:
            difference = first_difference(load_tokenizer(folder), tokenizer)
        raise MtopdError(
            f"teacher {name!r} has another tokenizer than the student {student}: {difference}; "
            "exact reverse KL needs "
            "one tokenizer: use a teacher with the student's, or remove it"
        )
    if store.vocab_size != vocab_size(tokenizer):
        raise MtopdError(
            f"teacher {name!r} has vocab_size {store.vocab_size}, the student "
            f"{vocab_size(tokenizer)}; they must agree"
        )
