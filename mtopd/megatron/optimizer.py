"""Megatron's optimizer and learning rate schedule, and the optimizer's state for checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mtopd.config import OptimizerConfig
from mtopd.megatron.options import megatron_refuses
from mtopd.step_sums import NonFiniteGradients

# torch's Adam counts steps in the state of each parameter.  Transformer Engine's counts them by
# group, and its state takes no other name than those of moments and master weight.
_COUNTS_BY_PARAMETER = (torch.optim.Adam, torch.optim.AdamW)


def build_optimizer_config(
    config: OptimizerConfig, dtype: torch.dtype, fields: Mapping[str, Any]
) -> MegatronOptimizerConfig:
    defaults = partial(
        MegatronOptimizerConfig,
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        clip_grad=config.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
    )
    # A partial: a field that the user's table sets, too, overrides instead of a TypeError.
    with megatron_refuses(fields):
        return defaults(**fields)


def build_optimizer(
    ddp: Sequence[DistributedDataParallel],
    config: OptimizerConfig,
    dtype: torch.dtype,
    fields: Mapping[str, Any],
) -> MegatronOptimizer:
    """AdamW over all chunks; ``fields`` are the user's of Megatron's OptimizerConfig, verbatim.

    Its step raises NonFiniteGradients, before anything is updated, where the gradient norm is NaN
    or inf: Megatron takes the norm of all gradients before it clips and updates.
    """
    optimizer_config = build_optimizer_config(config, dtype, fields)
    optimizer = get_megatron_optimizer(optimizer_config, list(ddp))
    norm = optimizer.get_grad_norm

    def checked_norm() -> float:
        value = float(norm() or 0.0)
        if not math.isfinite(value):
            raise NonFiniteGradients(f"the gradient norm is {value}")
        return value

    optimizer.get_grad_norm = checked_norm
    return optimizer


def build_schedule(
    optimizer: MegatronOptimizer, config: OptimizerConfig, num_steps: int
) -> OptimizerParamScheduler:
    """Linear warm-up over ``warmup_steps``, then decay from ``lr`` to ``min_lr`` until
    ``num_steps``; it stands at the learning rate of the first step.
    """
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=max(num_steps, config.warmup_steps + 1),
        lr_decay_style=config.decay,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=1,
        wd_incr_style="constant",
    )
    # It computes lr for the step *after* the one just done; the first step must not run at lr 0.
    schedule.step(1)
    return schedule


def resume_schedule(schedule: OptimizerParamScheduler, steps_done: int) -> None:
    schedule.num_steps = 0
    schedule.step(steps_done + 1)


def torch_optimizers(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    """The torch optimizers inside Megatron's wrappers: one, or one more for experts."""
    return [wrapper.optimizer for wrapper in getattr(optimizer, "chained_optimizers", [optimizer])]


def create_state(optimizer: MegatronOptimizer) -> None:
    """Give every parameter its (zero) Adam moments, so that a checkpoint can be copied into them."""
    for adam in torch_optimizers(optimizer):
        for group in adam.param_groups:
            for parameter in group["params"]:
                state = adam.state[parameter]
                if isinstance(adam, _COUNTS_BY_PARAMETER):
                    state.setdefault("step", torch.zeros((), dtype=torch.float32))
                for name in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(name, torch.zeros_like(parameter.data))


def load_state(optimizer: MegatronOptimizer, state: Any, num_updates: int) -> None:
    """Take a checkpoint's optimizer state, in which Adam made ``num_updates``: moments, float32
    weights, and nothing of the settings, which are the config's.

    Megatron has every rank count the steps that global rank 0 wrote down, for the experts as
    well: rank 0's stage may have none, and so no count of theirs.
    """
    adams = torch_optimizers(optimizer)
    settings = [
        {name: value for name, value in group.items() if name not in ("params", "step")}
        for adam in adams
        for group in adam.param_groups
    ]
    for index, adam in enumerate(adams):
        values = state if len(adams) == 1 else state[index]
        inner = values.get("optimizer", values)
        if "state" in inner and isinstance(adam, _COUNTS_BY_PARAMETER):
            inner["state"]["common_step"] = torch.tensor(float(num_updates))
        else:
            for group in inner["param_groups"]:
                group["step"] = num_updates
    optimizer.load_state_dict(state)
    # Megatron puts the groups back as they were saved, with the learning rates of that run.
    groups = (group for adam in adams for group in adam.param_groups)
    for group, own in zip(groups, settings, strict=True):
        group.update(own)
