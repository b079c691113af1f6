"""What a start says of settings that work and mean little: nothing here is refused."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence

from mtopd.config import ConsolidateConfig, StudentConfig, TrainConfig
from mtopd.config_specialist import SpecialistConfig, SupervisedConfig
from mtopd.dtypes import torch_dtype
from mtopd.families import dropouts, model_facts
from mtopd.hf_checkpoint import HFTensors, hf_config_from_dict, load_hf_config
from mtopd.planning import in_binary_units
from mtopd.teacher_offload.store import TeacherStore

Say = Callable[[str], None]


def report_positions(
    config: ConsolidateConfig | SpecialistConfig, stores: Sequence[TeacherStore], say: Say
) -> None:
    """Say which model was made for fewer positions than a sample may have: it answers behind them,
    and scores, but nobody trained it to.
    """
    longest = config.data.context_length
    models = {"student": model_facts(load_hf_config(config.student.model))}
    for store in stores:
        described = hf_config_from_dict(store.manifest["architecture"])
        models[f"teacher {store.name!r}"] = model_facts(described)
    if not isinstance(config, SpecialistConfig):
        for name, folder in config.evaluation.baselines.items():
            models[f"baseline {name!r}"] = model_facts(load_hf_config(folder))
    for what, facts in models.items():
        if facts.max_positions < longest:
            say(
                f"{what} is made for {facts.max_positions} positions (max_position_embeddings), "
                f"data.context_length is {longest}: behind them its numbers mean little"
            )


def report_baselines(config: ConsolidateConfig, say: Say) -> None:
    """Say which baseline is taken for no teacher's, and what that leaves without a recovery."""
    baselines, teachers = config.evaluation.baselines, [t.name for t in config.teachers]
    if not baselines:
        return
    lacking = [name for name in teachers if name not in baselines]
    for name in baselines:
        if name == "base" or name in teachers or name in config.evaluation.weight_average:
            continue
        open_names = lacking if "base" in baselines else [*lacking, "base"]
        meant = difflib.get_close_matches(name, open_names, n=1)
        hint = f"; did you mean {meant[0]!r}?" if meant else ""
        say(f"evaluation.baselines {name!r} names no teacher, nor 'base'{hint}")
    if "base" not in baselines:
        say("evaluation.baselines has no 'base': no recovery")
    elif lacking:
        say(f"evaluation.baselines has no {', '.join(lacking)}: no recovery for it")


def report_dropout(student: StudentConfig, say: Say) -> None:
    """Say which dropout of the checkpoint's config is not applied: the student that is trained is
    the one that answered.
    """
    if found := dropouts(load_hf_config(student.model)):
        named = ", ".join(f"{name} {value}" for name, value in found.items())
        say(
            f"{student.model / 'config.json'} has {named}: a run trains without dropout, unless "
            "student.megatron has hidden_dropout or attention_dropout"
        )


def report_schedule(train: TrainConfig | SupervisedConfig, say: Say) -> None:
    """Say what of the optimizer's schedule the planned train steps never come to."""
    steps, optimizer = num_train_steps(train), train.optimizer
    if optimizer.warmup_steps > steps:
        reached = optimizer.lr * steps / optimizer.warmup_steps
        say(
            f"the learning rate rises for {optimizer.warmup_steps} train steps (warmup_steps), "
            f"{steps} are planned: it comes to {reached:.4g}, not to {optimizer.lr:.4g}"
        )
    if optimizer.decay == "constant" and optimizer.min_lr:
        say(f"min_lr {optimizer.min_lr:.4g} does nothing under decay constant")


def report_large_tensors(student: StudentConfig, say: Say) -> None:
    """Say which tensor is larger than the buckets that weights leave the trainer in."""
    stored, itemsize = HFTensors(student.model), torch_dtype(student.dtype).itemsize
    sizes = {name: math.prod(stored.shape(name)) * itemsize for name in stored}
    large = [name for name, size in sizes.items() if size > student.bucket_bytes]
    if large:
        most = max(large, key=lambda name: sizes[name])
        (found, limit), unit = in_binary_units([sizes[most], student.bucket_bytes])
        others = f" and {len(large) - 1} more tensors are" if len(large) > 1 else " is"
        say(
            f"{most} ({found} {unit}){others} larger than student.bucket_bytes ({limit} {unit}): "
            "weights leave the trainer with each of these in a bucket of its own"
        )


def num_train_steps(train: TrainConfig | SupervisedConfig) -> int:
    if isinstance(train, SupervisedConfig):
        return train.num_steps
    return train.num_iterations * train.train_steps_per_iteration
