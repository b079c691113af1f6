"""A run is prepared by its launcher: checked, then its run directory's first files are written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtopd.config import ConsolidateConfig
from mtopd.config_file import resolved, to_yaml
from mtopd.config_specialist import SpecialistConfig
from mtopd.data import check_sources
from mtopd.families import model_facts
from mtopd.files import remove_tree
from mtopd.hf_checkpoint import load_hf_config
from mtopd.manifest import check_schema, has_origin, start_run
from mtopd.megatron.options import FREE_MEGATRON, split_options, splits_unevenly
from mtopd.planning import MAX_STAGE_IMBALANCE, propose_split
from mtopd.prompt_table import write_prompt_table
from mtopd.run_dir import RunDir, is_sealed, numbered
from mtopd.tokenizer import end_ids, tokenizer_hash, vocab_size

from .carry_over import check_end
from .checks import (
    check_baselines,
    check_optimizer_form,
    check_stop_ids,
    check_student,
    check_teachers,
    check_weight_average,
    check_world,
    ranks_on_node,
)
from .continuation import (
    architecture,
    changed_end,
    describe,
    find_origin,
    former_end,
    set_aside_final,
)
from .inputs import inputs_of
from .layouts import check_batch, check_store
from .memory import report_memory
from .notices import (
    report_baselines,
    report_dropout,
    report_large_tensors,
    report_positions,
    report_schedule,
)
from .serving import check_engine, write_folder
from .stores import check_place

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Say = Callable[[str], None]


def consolidate(
    config: ConsolidateConfig,
    run: RunDir,
    say: Say,
    *,
    accept_changed: bool = False,
    origin: str | None = None,
    trains: bool = True,
) -> None:
    """Check a consolidation and write its run directory's first files.  The caller holds the lock.

    ``trains``: False where the ranks only evaluate: what is said of training stays unsaid.
    ``accept_changed``: go on from the newest checkpoint with other teachers, routes or another
    tokenizer.  ``origin``: RUN[@ITERATION], the checkpoint that a new run begins with.
    """
    check_sources(config.data)  # first: it takes no time
    tokenizer = check_student(config.student, deterministic=config.deterministic, say=say)
    check_stop_ids(config, tokenizer)
    check_world(config.student)
    stores = check_teachers(config, tokenizer, say)
    check_baselines(config, tokenizer, say)
    check_weight_average(config)
    check_engine(config)
    if config.evaluation.baselines and not any(s.has_held_out for s in config.data.sources):
        say("no source has held-out prompts (eval_path): baselines are not evaluated")
    table = [
        {"index": i, "name": t.name, "fingerprint": s.fingerprint, "weight": w}
        for i, (t, s, w) in enumerate(
            zip(config.teachers, stores, config.teacher_weights, strict=True)
        )
    ]
    manifest = {**token_identity(tokenizer, config.student.model), "teachers": table}
    _start(run, config, manifest, say, accept_changed=accept_changed, given_origin=origin)
    write_folder(config, run, vocab_size(tokenizer), say)
    report_baselines(config, say)
    report_positions(config, stores, say)
    of_training = say if trains else _unsaid
    report_dropout(config.student, of_training)
    report_schedule(config.train, of_training)
    report_large_tensors(config.student, of_training)
    report_memory(config, stores, ranks_on_node(config.student), of_training)
    report_stage_imbalance(config, max(store.hidden_size for store in stores), of_training)
    routes = {t.name: t.route for t in config.teachers}
    write_prompt_table(
        run,
        config.data,
        tokenizer,
        routes,
        supervised=False,
        progress=say,
        per_iteration=config.rollout.prompts_per_iteration // len(config.data.sources),
    )


def _unsaid(line: str) -> None:
    """What looked for it may still refuse."""


def token_identity(tokenizer: PreTrainedTokenizerBase, model: Path) -> dict[str, Any]:
    """Which tokens the run's ids name, and which of them end a response."""
    return {
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "end_ids": list(end_ids(tokenizer, model)),
    }


def report_stage_imbalance(config: ConsolidateConfig, teacher_hidden_size: int, say: Say) -> None:
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
    check_sources(config.data)  # first: it takes no time
    # A specialist may use a load-balancing loss: it need not give the same numbers on another
    # layout.
    tokenizer = check_student(config.student, deterministic=False, say=say)
    check_world(config.student)
    check_batch(config)
    check_store(config)
    former = former_end(run, config)
    if config.store is not None and not is_sealed(run.path / "export" / "final"):
        check_place(config.store.path)
    _start(run, config, token_identity(tokenizer, config.student.model), say)
    if former is not None:
        say(set_aside_final(run, former))
    report_positions(config, [], say)
    report_dropout(config.student, say)
    report_schedule(config.train, say)
    report_large_tensors(config.student, say)
    report_memory(config, [], ranks_on_node(config.student), say)
    write_prompt_table(run, config.data, tokenizer, {"": {}}, supervised=True, progress=say)


def _start(
    run: RunDir,
    config: ConsolidateConfig | SpecialistConfig,
    manifest: dict[str, Any],
    say: Say,
    *,
    accept_changed: bool = False,
    given_origin: str | None = None,
) -> None:
    """What a consolidation and a supervised run have in common.  Says what the run goes on from."""
    if run.is_ours():
        run.sweep()
    check_schema(run)
    # The origin of a run is kept, unless it is given anew: a start that names none goes on with it.
    if run.is_unstarted() and (given_origin or not has_origin(run)):
        run.forget_first_files()
    manifest["inputs"] = inputs_of(config.student, config.data.sources, say)
    manifest["architecture"] = architecture(config.student.model)
    origin = find_origin(run, given_origin, config.student, manifest)
    if origin is not None:
        manifest["from"] = origin
    checkpoints = run.sealed_checkpoints()
    if checkpoints:
        check_optimizer_form(run.checkpoint(checkpoints[-1]), config.student)
    end = changed_end(run, config.train)
    if isinstance(config, ConsolidateConfig):
        check_end(run, config)

    def drop_unfinished() -> None:
        """What was made for the former teachers: routed prompts, iterations that no checkpoint
        holds, their results.
        """
        run.prompts.unlink(missing_ok=True)
        finished = max(checkpoints, default=0)
        for number, folder in numbered(run.path / "iterations").items():
            if number >= finished:
                remove_tree(folder)
        for number, path in numbered(run.path / "evaluations", ".json").items():
            if number > finished:
                path.unlink()
        for number, folder in numbered(run.path / "export").items():
            if number > finished:
                remove_tree(folder)

    changes = start_run(
        run,
        resolved(config),
        manifest,
        to_yaml(config),
        free=[("config", "student", "megatron", option) for option in FREE_MEGATRON],
        accept_changed=accept_changed,
        drop_unfinished=drop_unfinished,
    )
    for change in changes:
        say(f"accepted: {change}")
    if end is not None:
        say(end)
    if origin is not None and not checkpoints:
        say(describe(origin))
