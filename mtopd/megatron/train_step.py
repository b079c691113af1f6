"""One train step: Megatron's 1F1B schedule, gradients, optimizer.  Knows nothing of teachers.

The loss comes from an *objective*, called on last-stage ranks only, once per micro-batch:
``objective(student_hidden_TD, output_weight_vD, rows) -> (loss, metrics)`` where ``rows`` names the T loss rows in
order.  Its loss is a plain sum in which 1/N already stands (token weights), so gradients of micro-batches, dp ranks
and pipeline stages are added and divided by nothing: ``num_tokens = 0`` tells Megatron exactly that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

from mtopd.megatron.model import HiddenStateModel
from mtopd.megatron.parallel import Ranks


@dataclass(frozen=True)
class PackedMicroBatch:
    """Tensors of one micro-batch: B rows right-padded to S (causal attention never looks at the padding).

    ``position_T``, ``row_T`` address the T loss rows in [S, B]; ``payload`` is the objective's own (runs, labels).
    """

    input_ids_BS: torch.Tensor
    position_T: torch.Tensor
    row_T: torch.Tensor
    token_weight_T: torch.Tensor  # fp32, includes 1/N
    payload: Any


Objective = Callable[[torch.Tensor, torch.Tensor, PackedMicroBatch], tuple[torch.Tensor, Mapping[str, torch.Tensor]]]


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with linear or cosine decay from ``lr`` to ``min_lr`` after ``warmup_steps``."""

    lr: float
    min_lr: float
    warmup_steps: int
    decay_steps: int
    decay_style: str
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    clip_grad: float


class Trainer:
    """The student with its gradients and optimizer on this rank."""

    def __init__(self, model: HiddenStateModel, ranks: Ranks, settings: OptimizerSettings, dtype: torch.dtype) -> None:
        self.ranks = ranks
        self.model = model
        config = model.config
        module: torch.nn.Module = model
        if dtype == torch.bfloat16:
            from megatron.core.transformer.module import Float16Module

            module = Float16Module(config, model)
        self.ddp = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, use_distributed_optimizer=False, overlap_grad_reduce=False
            ),
            module,
        )
        self.ddp.broadcast_params()
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=settings.lr,
                min_lr=settings.min_lr,
                weight_decay=settings.weight_decay,
                adam_beta1=settings.adam_beta1,
                adam_beta2=settings.adam_beta2,
                clip_grad=settings.clip_grad,
                bf16=dtype == torch.bfloat16,
                params_dtype=dtype,
                use_distributed_optimizer=False,
            ),
            [self.ddp],
        )
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=settings.lr,
            min_lr=settings.min_lr,
            lr_warmup_steps=settings.warmup_steps,
            lr_decay_steps=max(settings.decay_steps, settings.warmup_steps + 1),
            lr_decay_style=settings.decay_style,
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=1,
            wd_incr_style="constant",
        )
        # The schedule computes lr for the step *after* the one just done; the first step must not run at lr 0.
        self.scheduler.step(1)
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss

    def forward_backward(
        self, micro_batches: Sequence[PackedMicroBatch], objective: Objective
    ) -> dict[str, torch.Tensor]:
        """Accumulate this mini-batch's gradients in ``main_grad``.  Collective over the whole job.

        Returns the objective's metrics summed over micro-batches (last stage; empty elsewhere).
        """
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.ddp.train()
        batch_size, seq_length = micro_batches[0].input_ids_BS.shape
        assert all(mb.input_ids_BS.shape == (batch_size, seq_length) for mb in micro_batches), (
            "one shape per train step"
        )
        collected = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, objective=objective),
            data_iterator=iter(micro_batches),
            model=self.ddp,
            num_microbatches=len(micro_batches),
            seq_length=seq_length,
            micro_batch_size=batch_size,
            forward_only=False,
        )
        totals: dict[str, torch.Tensor] = {}
        for metrics in collected:
            for name, value in metrics.items():
                totals[name] = totals[name] + value if name in totals else value
        return totals

    def optimizer_step(self) -> tuple[float, float]:
        """Clip, update, advance the schedule.  Returns (gradient norm, learning rate used)."""
        lr = float(self.optimizer.param_groups[0]["lr"])
        _, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(1)
        return float(grad_norm or 0.0), lr

    @contextlib.contextmanager
    def off_device(self) -> Iterator[None]:
        """Gradients and optimizer state wait in host memory while the block runs; afterwards they are the same bits.

        Parameters stay.  Views (``main_grad``, buckets) stay valid: only their storages are emptied and filled again.
        """
        weights = {id(p) for p in self.model.parameters()}
        adam = self._adam
        tensors = [b.grad_data for b in (*self.ddp.buffers, *self.ddp.expert_parallel_buffers)]
        tensors += [t for state in adam.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        tensors += [p.data for g in adam.param_groups for p in g["params"] if id(p) not in weights]  # fp32 copies
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t.nbytes}
        waiting = []
        for storage in storages.values():
            host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=self.ranks.device.type == "cuda")
            host.copy_(_bytes(storage))
            waiting.append((storage, host))
            storage.resize_(0)
        try:
            yield
        finally:
            for storage, host in waiting:
                storage.resize_(host.nbytes)
                _bytes(storage).copy_(host)

    # -- state for checkpoints --------------------------------------------------------------------------------------
    @property
    def steps_done(self) -> int:
        return int(self.scheduler.num_steps) - 1

    def adam_state(self, parameter: torch.Tensor) -> dict[str, Any]:
        return self._adam.state[parameter]

    def create_optimizer_state(self) -> None:
        """Give every parameter its (zero) Adam moments, so that a checkpoint can be copied into them."""
        for group in self._adam.param_groups:
            for parameter in group["params"]:
                state = self._adam.state[parameter]
                state.setdefault("step", torch.zeros((), dtype=torch.float32))
                for name in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(name, torch.zeros_like(parameter.data))

    def resume_schedule(self, steps_done: int) -> None:
        self.scheduler.num_steps = 0
        self.scheduler.step(steps_done + 1)

    @property
    def _adam(self) -> torch.optim.Optimizer:
        """The torch optimizer inside Megatron's wrappers."""
        (inner,) = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        adam = inner.optimizer
        assert isinstance(adam, torch.optim.Optimizer)
        return adam

    def reduce_metrics(self, totals: Mapping[str, torch.Tensor], names: Sequence[str]) -> dict[str, float]:
        """Sum last-stage metrics over dp and hand them to every rank, in float64.  Collective."""
        sums = torch.zeros(len(names), dtype=torch.float64, device=self.ranks.device)
        if self.ranks.is_last_stage:
            if totals:
                sums = torch.stack([totals[name].double() for name in names])
            dist.all_reduce(sums, group=self.ranks.dp_group)
        source = dist.get_global_rank(self.ranks.pp_group, self.ranks.pp_size - 1)
        dist.broadcast(sums, src=source, group=self.ranks.pp_group)
        return dict(zip(names, sums.tolist(), strict=True))


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    """All of a storage as uint8."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _forward_step(data: Iterator[PackedMicroBatch], model: Any, *, objective: Objective) -> tuple[torch.Tensor, Any]:
    micro_batch = next(data)
    _, seq_length = micro_batch.input_ids_BS.shape
    positions_BS = torch.arange(seq_length, device=micro_batch.input_ids_BS.device).expand_as(micro_batch.input_ids_BS)
    output = model(micro_batch.input_ids_BS, positions_BS, None)
    return output, partial(_loss, model=_unwrap(model), micro_batch=micro_batch, objective=objective)


def _loss(
    hidden_SBD: torch.Tensor, *, model: HiddenStateModel, micro_batch: PackedMicroBatch, objective: Objective
) -> tuple[torch.Tensor, torch.Tensor, Mapping[str, torch.Tensor]]:
    # The output layer is split over tp: every rank's vocabulary shard adds its part to the hidden states' gradient.
    hidden_SBD = copy_to_tensor_model_parallel_region(hidden_SBD)
    student_hidden_TD = hidden_SBD[micro_batch.position_T, micro_batch.row_T]
    loss, metrics = objective(student_hidden_TD, model.output_weight(), micro_batch)
    return loss, torch.zeros((), dtype=torch.int, device=loss.device), metrics


def _unwrap(model: Any) -> HiddenStateModel:
    while not isinstance(model, HiddenStateModel):
        model = model.module
    return model
