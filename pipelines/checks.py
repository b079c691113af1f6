"""Every refusal that needs no process group: one clear line for each mistake a user can make.

Whether model and layout fit is said here; what the settings alone show is in `config`; the parts
that rely on either assert it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mtopd.config import ConsolidateConfig, StudentConfig
from mtopd.families import check_variant
from mtopd.hf_checkpoint import check_checkpoint, load_hf_config
from mtopd.hf_weights import check_average
from mtopd.megatron.options import sort_fields
from mtopd.progress import under_torchrun
from mtopd.run_dir import read_seal
from mtopd.teacher_offload.store import TeacherStore, check_files, open_store
from mtopd.tokenizer import (
    end_ids,
    end_token,
    first_difference,
    further_tokens,
    load_tokenizer,
    tokenizer_hash,
    vocab_size,
)
from mtopd.tokenizer_files import vocabularies
from mtopd.types import MtopdError

from .layouts import check_deterministic, check_layout, check_mesh, check_own_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Say = Callable[[str], None]


def _silent(text: str) -> None:
    """Nothing is said where only the verdict counts."""


def check_student(
    student: StudentConfig, *, deterministic: bool, say: Say = _silent
) -> PreTrainedTokenizerBase:
    """The student's tokenizer, after its HF folder and its Megatron table were checked."""
    check_variant(load_hf_config(student.model), str(student.model / "config.json"))
    facts = check_checkpoint(student.model, say)
    tokenizer = load_tokenizer(student.model)
    check_ends(student.model, tokenizer, say)
    if behind := further_tokens(tokenizer, facts.vocab_size):
        raise MtopdError(
            f"{student.model}: the tokenizer has {vocab_size(tokenizer)} ids, the model only "
            f"{facts.vocab_size} rows for them, none for {behind[0]!r}; take added tokens out of the "
            "tokenizer's files, or resize the model's embedding"
        )
    fields = sort_fields(student.megatron)
    check_layout(student, facts, fields.transformer)
    if deterministic:
        check_deterministic(fields.transformer)
    if student.megatron:  # importing Megatron takes seconds
        from .student import check_megatron

        check_megatron(student, fields)
    return tokenizer


def check_ends(model: Path, tokenizer: PreTrainedTokenizerBase, say: Say) -> None:
    """Say what is not the tokenizer's own: further end tokens, and what pads."""
    ends = end_ids(tokenizer, model)
    names = [repr(tokenizer.convert_ids_to_tokens(index)) for index in ends]
    if ends != (tokenizer.eos_token_id,):
        say(
            f"answers end at {' or '.join(names)} (eos_token of the tokenizer, eos_token_id of "
            "config.json and generation_config.json)"
        )
    if tokenizer.pad_token_id is None:
        say(f"the student's tokenizer has no pad token: {names[0]} pads batches, masked")


def ranks_on_node(student: StudentConfig) -> int:
    """How many ranks run on this machine."""
    found = os.environ.get("LOCAL_WORLD_SIZE", "1") if under_torchrun() else None
    return student.parallel.world_size if found is None else int(found)


def check_world(student: StudentConfig) -> None:
    """Under an outer torchrun, its world size must be the config's."""
    parallel = student.parallel
    found = os.environ["WORLD_SIZE"] if under_torchrun() else None
    if found is None:
        check_own_ranks(parallel)
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


def check_stop_ids(config: ConsolidateConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tokens that end a response are the student's."""
    known = vocab_size(tokenizer)
    if foreign := [index for index in config.rollout.stop_ids if index >= known]:
        raise MtopdError(
            f"rollout.stop_ids has {foreign[0]}, the student's tokenizer has the ids 0 to "
            f"{known - 1}; take one of its tokens"
        )


def check_baselines(
    config: ConsolidateConfig, tokenizer: PreTrainedTokenizerBase, say: Say = _silent
) -> None:
    """Sound weights, and the student's tokens: baselines are asked in them and answer in them."""
    for name, folder in config.evaluation.baselines.items():
        try:
            rows = check_checkpoint(folder, say).vocab_size
            if rows < (known := vocab_size(tokenizer)):
                raise MtopdError(
                    f"{folder} has {rows} rows for the {known} ids of the student's tokenizer; a "
                    "baseline answers in the student's tokens"
                )
            if not vocabularies(folder):
                say(
                    f"evaluation.baselines.{name}: no tokenizer in {folder}, the student's is taken"
                )
                continue
            theirs = load_tokenizer(folder)
        except MtopdError as error:
            raise MtopdError(f"evaluation.baselines.{name}: {error}") from None
        difference = first_difference(theirs, tokenizer, below=known)
        if difference is not None:
            raise MtopdError(
                f"evaluation.baselines.{name}: {folder} has another tokenizer than the student "
                f"{config.student.model}: {difference}; a baseline answers in the student's tokens: "
                "take one with the same tokenizer, or evaluate this one elsewhere"
            )


def check_weight_average(config: ConsolidateConfig) -> None:
    """The models have the same tensors: it is evaluated last, when the run is over."""
    if names := config.evaluation.weight_average:
        try:
            check_average([config.evaluation.baselines[name] for name in names])
        except MtopdError as error:
            raise MtopdError(f"evaluation.weight_average: {error}") from None


def check_teachers(
    config: ConsolidateConfig,
    tokenizer: PreTrainedTokenizerBase,
    say: Say = _silent,
) -> list[TeacherStore]:
    """The teachers' stores, whole and fit for the student and the layout."""
    stores = [check_files(open_store(t.store, name=t.name)) for t in config.teachers]
    for i, (store, teacher) in enumerate(zip(stores, config.teachers, strict=True)):
        check_teacher(teacher.name, store, tokenizer, config.student.model, say)
        check_mesh(
            teacher.name,
            store,
            config.teacher_tp(i),
            teacher.parallel.ep,
            world_size=config.student.parallel.world_size,
        )
    return stores


def check_teacher(
    name: str,
    store: TeacherStore,
    tokenizer: PreTrainedTokenizerBase,
    student: Path,
    say: Say = _silent,
) -> None:
    """A teacher scores the student's tokens: each of them must be the teacher's too.

    Two differences are said, not refused.  Tokens behind the student's last: the student has no
    probability there, so the gradient of the reverse KL is the same with or without them.  Another
    end token: the loss does not meet which one it is.
    """
    noted, known = store.manifest, vocab_size(tokenizer)
    end, same = noted.get("eos_token"), noted["tokenizer_hash"] == tokenizer_hash(tokenizer)
    further: list[str] = []
    if not same or "eos_token" not in noted:  # the second: a store made by an older version
        with store.tokenizer_folder() as folder:
            theirs = load_tokenizer(folder, f"{store.location}/tokenizer")
        if (difference := first_difference(theirs, tokenizer, below=known)) is not None:
            raise MtopdError(
                f"teacher {name!r} has another tokenizer than the student {student}: {difference}; "
                "exact reverse KL needs one tokenizer: use a teacher with the student's, or remove "
                "it"
            )
        end = end_token(theirs)
        further = further_tokens(theirs, known)
    if store.vocab_size != known and not further:
        raise MtopdError(
            f"teacher {name!r} has vocab_size {store.vocab_size}, the student {known}; they must "
            "agree"
        )
    if further:
        more = f" and {len(further) - 3} more" if len(further) > 3 else ""
        say(
            f"teacher {name!r} has tokens that the student lacks "
            f"({', '.join(map(repr, further[:3]))}{more}): the loss leaves them out"
        )
    if end != end_token(tokenizer):
        outcome = (
            "responses end at either"
            if tokenizer.get_vocab().get(end or "") in end_ids(tokenizer, student)
            else "answers may run to their limit; further end tokens can be named as eos_token_id "
            "in the student's generation_config.json, or as rollout.stop"
        )
        say(
            f"teacher {name!r} ends answers with {end!r}, the student with {end_token(tokenizer)!r} "
            f"(eos_token): {outcome}"
        )


def check_optimizer_form(folder: Path, student: StudentConfig) -> None:
    """A checkpoint keeps the optimizer's state in the form that this start loads."""
    prefix = "student.megatron."
    for option, before in read_seal(folder)["optimizer"].items():
        if option.startswith(prefix):
            now = bool(student.megatron.get(option.removeprefix(prefix), False))
        else:
            now = student.parallel.ep > 1
        if before != now:
            raise MtopdError(
                f"{folder} was written with {option}={before} and cannot be loaded with "
                f"{option}={now}: Megatron keeps the optimizer's state in another form; set it as "
                "it was"
            )
