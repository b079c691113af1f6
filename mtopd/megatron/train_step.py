"""One train step: Megatron's pipeline schedules, gradients, optimizer.  Knows nothing of teachers.

The loss comes from an *objective*, called on last-stage ranks only, once per micro-batch:
``objective(student_hidden_TD, output_weight_vD, micro_batch) -> (loss, metrics)`` over the T loss
rows that ``micro_batch`` names, in order.  Its loss is a plain sum in which 1/N already stands
(token weights), so gradients of micro-batches, dp and cp ranks and pipeline stages are added and
divided by nothing: ``num_tokens = 0`` tells Megatron exactly that.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import Float16Module

from mtopd.megatron import cpu
from mtopd.megatron.model import HiddenStateModel
from mtopd.megatron.options import MegatronFields, megatron_refuses
from mtopd.megatron.parallel import Ranks


@dataclass(frozen=True)
class PackedMicroBatch:
    """Tensors of one micro-batch on one cp rank: B rows right-padded to S (causal attention never
    looks at padding).

    Under context parallelism S is the whole row and ``input_ids`` this rank's two ranges of it.
    Packed, B is 1 and ``cu_seqlens`` cuts the row into samples, the padding as a last one.
    ``position_T`` and ``row_T`` address this rank's T loss rows in [S / cp, B]; ``payload`` is the
    objective's own (runs, labels).
    """

    input_ids_BS: torch.Tensor
    position_ids_BS: torch.Tensor
    position_T: torch.Tensor
    row_T: torch.Tensor
    token_weight_T: torch.Tensor  # fp32, includes 1/N
    payload: Any
    cu_seqlens: torch.Tensor | None = None  # int32, from 0 to S; packed only
    max_seqlen: int = 0

    @property
    def packed_seq_params(self) -> PackedSeqParams | None:
        if self.cu_seqlens is None:
            return None
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=self.cu_seqlens,
            cu_seqlens_kv=self.cu_seqlens,
            max_seqlen_q=self.max_seqlen,
            max_seqlen_kv=self.max_seqlen,
        )


Objective = Callable[
    [torch.Tensor, torch.Tensor, PackedMicroBatch], tuple[torch.Tensor, Mapping[str, torch.Tensor]]
]


# torch's Adam counts steps in the state of each parameter.  Transformer Engine's counts them by
# group, and its state takes no other name than those of moments and master weight.
_COUNTS_BY_PARAMETER = (torch.optim.Adam, torch.optim.AdamW)


class NonFiniteGradients(Exception):
    """A gradient is NaN or inf."""


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
    """The student's model chunks with their gradients and optimizer on this rank."""

    def __init__(
        self,
        chunks: Sequence[HiddenStateModel],
        ranks: Ranks,
        settings: OptimizerSettings,
        dtype: torch.dtype,
        fields: MegatronFields,
    ) -> None:
        self.ranks = ranks
        self.chunks = list(chunks)
        self.config = config = chunks[0].config
        modules = (
            [_in_bfloat16(chunk) for chunk in self.chunks]
            if dtype == torch.bfloat16
            else self.chunks
        )
        with megatron_refuses():
            ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, **fields.ddp)
            optimizer_config = OptimizerConfig(
                lr=settings.lr,
                min_lr=settings.min_lr,
                weight_decay=settings.weight_decay,
                adam_beta1=settings.adam_beta1,
                adam_beta2=settings.adam_beta2,
                clip_grad=settings.clip_grad,
                bf16=dtype == torch.bfloat16,
                params_dtype=dtype,
                **fields.optimizer,
            )
        # Buckets of the chunks after the first are not needed before the pipeline's end: one each.
        self.ddp = [
            DistributedDataParallel(config, ddp_config, module, disable_bucketing=index > 0)
            for index, module in enumerate(modules)
        ]
        for module in self.ddp:
            module.broadcast_params()
        self.optimizer = get_megatron_optimizer(optimizer_config, self.ddp)
        self._bad_ranks = 0  # that hold a gradient which is not finite
        self._check_norm()
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
        # The schedule computes lr for the step *after* the one just done; the first step must not
        # run at lr 0.
        self.scheduler.step(1)
        config.finalize_model_grads_func = finalize_model_grads
        self._num_positions = 1  # of the mini-batch, padding too
        config.grad_scale_func = self._scale
        self.distributed_optimizer = ddp_config.use_distributed_optimizer
        self._gathers_late = self.distributed_optimizer and ddp_config.overlap_param_gather
        if ddp_config.overlap_grad_reduce:
            config.no_sync_func = self._each_or_one([m.no_sync for m in self.ddp])
            if ddp_config.align_param_gather:
                config.param_sync_func = self._each_or_one([m.start_param_sync for m in self.ddp])

    def _scale(self, loss: torch.Tensor) -> torch.Tensor:
        """What Megatron starts backward with: for the loss, and, asked with a constant, for what
        routers add to it.

        Megatron multiplies those by a micro-batch's positions, to divide all gradients by the
        mini-batch's afterwards: since here none is divided, it is done before.
        """
        return self.optimizer.scale_loss(loss if loss.requires_grad else loss / self._num_positions)

    def _check_norm(self) -> None:
        """Megatron's step takes the norm of all gradients before it clips and updates: there it is
        refused.
        """
        norm = self.optimizer.get_grad_norm

        def checked() -> float:
            value = float(norm() or 0.0)
            if not math.isfinite(value):
                raise NonFiniteGradients(f"the gradient norm is {value}")
            return value

        self.optimizer.get_grad_norm = checked

    @staticmethod
    def _each_or_one(functions: list[Any]) -> Any:
        return functions if len(functions) > 1 else functions[0]

    @property
    def seq_length_multiple(self) -> int:
        """Rows of a micro-batch are padded to this: equal parts for a cp rank's two ranges and for
        tp ranks.
        """
        ranks = self.ranks
        part = math.lcm(
            2 if ranks.cp_size > 1 else 1, ranks.tp_size if self.config.sequence_parallel else 1
        )
        return ranks.cp_size * part

    @property
    def micro_batch_multiple(self) -> int:
        """An interleaved schedule works on groups of as many micro-batches as there are pipeline
        ranks.
        """
        return self.ranks.pp_size if self.ranks.vpp_size > 1 else 1

    def output_weight(self) -> torch.Tensor:
        """[V / tp, D] of the student's output layer; last-stage ranks only."""
        return self.chunks[-1].output_weight()

    def forward_backward(
        self, micro_batches: Sequence[PackedMicroBatch], objective: Objective
    ) -> dict[str, torch.Tensor]:
        """Accumulate this mini-batch's gradients in ``main_grad``.  Collective over the whole job.

        Returns the objective's metrics summed over micro-batches (last stage; empty elsewhere).
        """
        for module in self.ddp:
            module.zero_grad_buffer()
            module.train()
        self.optimizer.zero_grad()
        batch_size, local_length = micro_batches[0].input_ids_BS.shape
        assert all(mb.input_ids_BS.shape == (batch_size, local_length) for mb in micro_batches), (
            "one shape per train step"
        )
        self._num_positions = (
            batch_size * local_length * self.ranks.cp_size * len(micro_batches) * self.ranks.dp_size
        )
        # Every chunk of an interleaved schedule goes through all micro-batches by itself.
        iterators = [iter(micro_batches) for _ in self.ddp]
        collected = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, trainer=self, objective=objective),
            data_iterator=self._each_or_one(iterators),
            model=self._each_or_one(self.ddp),
            num_microbatches=len(micro_batches),
            seq_length=local_length * self.ranks.cp_size,
            micro_batch_size=batch_size,
            forward_only=False,
        )
        totals: dict[str, torch.Tensor] = {}
        for metrics in collected:
            for name, value in metrics.items():
                totals[name] = totals[name] + value if name in totals else value
        return totals

    def optimizer_step(self) -> tuple[float, float]:
        """Clip, update, advance the schedule.  Returns (gradient norm, learning rate used).

        Raises NonFiniteGradients, on every rank, before anything is updated.
        """
        if (
            self._bad_ranks
        ):  # the norm does not see all: what tp ranks hold alike, it counts on the first alone
            raise NonFiniteGradients(
                f"gradients are NaN or inf on {self._bad_ranks} of {self.ranks.world_size} ranks"
            )
        lr = float(self.optimizer.param_groups[0]["lr"])
        _, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(1)
        return float(grad_norm or 0.0), lr

    @contextlib.contextmanager
    def off_device(self) -> Iterator[None]:
        """Gradients and optimizer state wait in host memory while the block runs; afterwards they
        are the same bits.

        Parameters stay.  Views (``main_grad``, buckets) stay valid: only their storages are emptied
        and filled again.
        """
        weights = {
            p.untyped_storage().data_ptr() for chunk in self.chunks for p in chunk.parameters()
        }
        tensors = [
            b.grad_data
            for module in self.ddp
            for b in (*module.buffers, *module.expert_parallel_buffers)
        ]
        for adam in self._adams:
            tensors += [
                t
                for state in adam.state.values()
                for t in state.values()
                if isinstance(t, torch.Tensor)
            ]
            tensors += [
                p.data for group in adam.param_groups for p in group["params"]
            ]  # fp32 copies
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t.nbytes
        }
        storages = {
            pointer: storage for pointer, storage in storages.items() if pointer not in weights
        }
        waiting = []
        for storage in storages.values():
            host = torch.empty(
                storage.nbytes(), dtype=torch.uint8, pin_memory=self.ranks.device.type == "cuda"
            )
            host.copy_(_bytes(storage))
            waiting.append((storage, host))
            storage.resize_(0)
        try:
            yield
        finally:
            for storage, host in waiting:
                storage.resize_(host.nbytes)
                _bytes(storage).copy_(host)

    def finish_param_sync(self) -> None:
        """Wait until every weight is whole on this rank.  Collective; before weights are exported
        or saved.

        With ``overlap_param_gather`` an update leaves the weights in shards that the next forward
        would gather.
        """
        if self._gathers_late:
            for module in self.ddp:
                module.start_param_sync(force_sync=True)

    # -- state for checkpoints ---------------------------------------------------------------------
    @property
    def steps_done(self) -> int:
        return int(self.scheduler.num_steps) - 1

    def create_optimizer_state(self) -> None:
        """Give every parameter its (zero) Adam moments, so that a checkpoint can be copied into
        them.
        """
        for adam in self._adams:
            for group in adam.param_groups:
                for parameter in group["params"]:
                    state = adam.state[parameter]
                    if isinstance(adam, _COUNTS_BY_PARAMETER):
                        state.setdefault("step", torch.zeros((), dtype=torch.float32))
                    for name in ("exp_avg", "exp_avg_sq"):
                        state.setdefault(name, torch.zeros_like(parameter.data))

    def load_optimizer(self, state: Any, steps_done: int) -> None:
        """Take a checkpoint's optimizer state and go on after ``steps_done``.

        Megatron has every rank count the steps that global rank 0 wrote down, for the experts as
        well: rank 0's stage may have none, and so no count of theirs.
        """
        adams = self._adams
        for index, adam in enumerate(adams):
            values = state if len(adams) == 1 else state[index]
            inner = values.get("optimizer", values)
            if "state" in inner and isinstance(adam, _COUNTS_BY_PARAMETER):
                inner["state"]["common_step"] = torch.tensor(float(steps_done))
            else:
                for group in inner["param_groups"]:
                    group["step"] = steps_done
        self.optimizer.load_state_dict(state)
        self.resume_schedule(steps_done)

    def resume_schedule(self, steps_done: int) -> None:
        self.scheduler.num_steps = 0
        self.scheduler.step(steps_done + 1)

    @property
    def _adams(self) -> list[torch.optim.Optimizer]:
        """The torch optimizers inside Megatron's wrappers: one, or one more for experts."""
        return [
            wrapper.optimizer
            for wrapper in getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        ]

    @cpu.own_code()
    def reduce_metrics(
        self,
        totals: Mapping[str, torch.Tensor],
        names: Sequence[str],
        added: Mapping[str, float] | None = None,
        largest: Mapping[str, float] | None = None,
    ) -> dict[str, float]:
        """Sum last-stage metrics over dp and cp and hand them to every rank, in float64.
        Collective: one reduction.

        With them come numbers that every rank has under the same names: ``added`` over all ranks,
        and the ``largest`` of any rank.  The same reduction tells every rank whether one holds a
        gradient that is not finite, for ``optimizer_step``.
        """
        ranks, added, largest = self.ranks, added or {}, largest or {}
        options: dict[str, Any] = {"dtype": torch.float64, "device": ranks.device}
        of_stage = torch.zeros(len(names), **options)
        if totals and ranks.is_last_stage and ranks.tp_rank == 0:  # alike on all tp ranks
            of_stage = torch.stack([totals[name].to(**options) for name in names])
        buffers = [
            b.grad_data
            for module in self.ddp
            for b in (*module.buffers, *module.expert_parallel_buffers)
        ]
        is_bad = ~torch.stack([gradient.sum() for gradient in buffers]).isfinite().all()
        own = [0.0] * (len(largest) * ranks.world_size)  # a sum in which each rank has its places
        own[ranks.rank :: ranks.world_size] = largest.values()
        sums = torch.cat(
            [of_stage, is_bad.double()[None], torch.tensor([*added.values(), *own], **options)]
        )
        dist.all_reduce(sums)
        values = iter(sums.tolist())
        reduced = {name: next(values) for name in names}
        self._bad_ranks = int(next(values))
        reduced |= {name: next(values) for name in added}
        return reduced | {name: max(itertools.islice(values, ranks.world_size)) for name in largest}


def _in_bfloat16(chunk: HiddenStateModel) -> torch.nn.Module:
    """Megatron's wrapper that computes in bfloat16.

    It casts buffers, too, but a router's are float32 on purpose: rounded, its expert bias would
    choose other experts.
    """
    kept = [(module, dict(module.named_buffers(recurse=False))) for module in chunk.modules()]
    wrapped = Float16Module(chunk.config, chunk)
    for module, buffers in kept:
        for name, buffer in buffers.items():
            setattr(module, name, buffer)
    return wrapped


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    """All of a storage as uint8."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _forward_step(
    data: Iterator[PackedMicroBatch], model: Any, *, trainer: Trainer, objective: Objective
) -> tuple[torch.Tensor, Any]:
    micro_batch = next(data)
    output = model(
        micro_batch.input_ids_BS,
        micro_batch.position_ids_BS,
        None,
        packed_seq_params=micro_batch.packed_seq_params,
    )
    return output, partial(_loss, trainer=trainer, micro_batch=micro_batch, objective=objective)


def _loss(
    hidden_SBD: torch.Tensor,
    *,
    trainer: Trainer,
    micro_batch: PackedMicroBatch,
    objective: Objective,
) -> tuple[torch.Tensor, torch.Tensor, Mapping[str, torch.Tensor]]:
    ddp, weight_vD = trainer.ddp[-1], trainer.output_weight()
    hidden_SBD = hidden_SBD.to(
        weight_vD.dtype
    )  # Megatron's 16-bit wrapper gives its last output in float32
    # The output layer is split over tp: every rank's vocabulary shard adds its part to the hidden
    # states' gradient.
    if trainer.config.sequence_parallel:
        hidden_SBD = gather_from_sequence_parallel_region(
            hidden_SBD, tensor_parallel_output_grad=True
        )
    else:
        hidden_SBD = copy_to_tensor_model_parallel_region(hidden_SBD)
    student_hidden_TD = hidden_SBD[micro_batch.position_T, micro_batch.row_T]
    # The weight is used outside of its module: what Megatron hangs on modules and on autograd is
    # done here.
    if ddp.use_forward_hook:
        ddp.param_to_bucket_group[weight_vD].finish_param_sync()
    with cpu.own_code():
        loss, metrics = objective(student_hidden_TD, weight_vD, micro_batch)
    if ddp.ddp_config.overlap_grad_reduce:
        loss = _ReachesWeight.apply(loss, weight_vD)
    return loss, torch.zeros((), dtype=torch.int, device=loss.device), metrics


class _ReachesWeight(torch.autograd.Function):
    """The loss unchanged, its own tensor (Megatron frees no view); backward also reaches
    ``weight``, with zeros.

    The objective adds the weight's gradient to ``main_grad`` itself.  DDP starts a bucket's
    reduction when autograd has reached all its parameters: without this one it would never start.
    """

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, weight_vD: torch.Tensor) -> torch.Tensor:
        ctx.like = weight_vD.new_zeros(()).expand_as(weight_vD)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradients[0], ctx.like
