"""The student under training on this rank: forward and backward, the reduction of a step's numbers,
the update.  Knows nothing of teachers; ``micro_batch`` says what it asks of an objective.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from mtopd.config import OptimizerConfig
from mtopd.megatron import cpu, optimizer
from mtopd.megatron.micro_batch import LossFunction, PackedMicroBatch, forward_step
from mtopd.megatron.model import HiddenStateModel
from mtopd.megatron.options import MegatronFields, megatron_refuses
from mtopd.megatron.parallel import Ranks
from mtopd.step_sums import LocalSums, NonFiniteGradients, StepSums


class Trainer:
    """The student's model chunks with their gradients and optimizer on this rank.

    A train step is ``forward_backward``, ``reduce``, ``optimizer_step``, each collective.
    """

    def __init__(
        self,
        chunks: Sequence[HiddenStateModel],
        ranks: Ranks,
        config: OptimizerConfig,
        num_steps: int,
        dtype: torch.dtype,
        fields: MegatronFields,
    ) -> None:
        self.ranks = ranks
        self.chunks = list(chunks)
        self.config = chunks[0].config
        modules: Sequence[torch.nn.Module] = self.chunks
        if dtype == torch.bfloat16:
            modules = [_in_bfloat16(chunk) for chunk in self.chunks]
        ddp_config = build_ddp_config(fields)
        # Buckets of the chunks after the first are not needed before the pipeline's end: one each.
        self.ddp = [
            DistributedDataParallel(self.config, ddp_config, module, disable_bucketing=index > 0)
            for index, module in enumerate(modules)
        ]
        for module in self.ddp:
            module.broadcast_params()
        self.optimizer = optimizer.build_optimizer(self.ddp, config, dtype, fields.optimizer)
        self.schedule = optimizer.build_schedule(self.optimizer, config, num_steps)
        self.distributed_optimizer = ddp_config.use_distributed_optimizer
        self._gathers_late = self.distributed_optimizer and ddp_config.overlap_param_gather
        self._num_positions = 1  # of the mini-batch, padding too
        self.num_backwards = 0
        self._updates_before = 0  # of the moments, by the run that this one began with
        self.config.finalize_model_grads_func = finalize_model_grads
        self.config.grad_scale_func = self._scale
        if ddp_config.overlap_grad_reduce:
            self.config.no_sync_func = _one_or_all([m.no_sync for m in self.ddp])
            if ddp_config.align_param_gather:
                self.config.param_sync_func = _one_or_all([m.start_param_sync for m in self.ddp])

    def _scale(self, loss: torch.Tensor) -> torch.Tensor:
        """What Megatron starts backward with: for the loss, and, asked with a constant, for what
        routers add to it.

        Megatron multiplies those by a micro-batch's positions, to divide all gradients by the
        mini-batch's afterwards: since here none is divided, it is done before.
        """
        return self.optimizer.scale_loss(loss if loss.requires_grad else loss / self._num_positions)

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

    # -- a train step ------------------------------------------------------------------------------
    def forward_backward(
        self, micro_batches: Sequence[PackedMicroBatch], objective: LossFunction
    ) -> None:
        """Accumulate this mini-batch's gradients in ``main_grad``.  Collective over the whole job.

        ``objective`` is called on last-stage ranks, once per micro-batch, in order.
        """
        for module in self.ddp:
            module.zero_grad_buffer()
            module.train()
        self.optimizer.zero_grad()
        shape = micro_batches[0].input_ids_BS.shape
        assert all(mb.input_ids_BS.shape == shape for mb in micro_batches), (
            "one shape per train step"
        )
        batch_size, seq_length = shape[0], shape[1] * self.ranks.cp_size
        # Used by `_scale`, for what routers add to the loss.
        self._num_positions = batch_size * seq_length * len(micro_batches) * self.ranks.dp_size
        self.num_backwards += 1
        self._run_schedule(micro_batches, objective, forward_only=False)

    @torch.no_grad()
    def forward(self, micro_batches: Sequence[PackedMicroBatch], objective: LossFunction) -> None:
        """Let ``objective`` see the hidden states of micro-batches of one shape, as
        `forward_backward` does; no gradient.  Collective over the whole job.
        """
        self.finish_param_sync()
        for module in self.ddp:
            module.eval()
        self._run_schedule(micro_batches, objective, forward_only=True)

    def _run_schedule(
        self,
        micro_batches: Sequence[PackedMicroBatch],
        objective: LossFunction,
        *,
        forward_only: bool,
    ) -> None:
        batch_size, seq_length = micro_batches[0].input_ids_BS.shape
        seq_length *= self.ranks.cp_size
        # Every chunk of an interleaved schedule goes through all micro-batches by itself.
        iterators = [iter(micro_batches) for _ in self.ddp]
        get_forward_backward_func()(
            forward_step_func=partial(
                forward_step, output_weight=self.output_weight, objective=objective
            ),
            data_iterator=_one_or_all(iterators),
            model=_one_or_all(self.ddp),
            num_microbatches=len(micro_batches),
            seq_length=seq_length,
            micro_batch_size=batch_size,
            forward_only=forward_only,
        )

    @cpu.no_device_rewrite()
    def reduce(self, finish: Callable[[], LocalSums]) -> StepSums:
        """Hand the step's numbers, those that the objective finishes with, to every rank, in
        float64.  Collective: one reduction.

        The same reduction tells every rank whether one holds a gradient that is NaN or inf.
        """
        local = finish()
        ranks = self.ranks
        options: dict[str, Any] = {"dtype": torch.float64, "device": ranks.device}
        of_rows = [*local.loss_rows.values(), *local.vectors.values()]
        loss_rows = torch.zeros(sum(value.numel() for value in of_rows), **options)
        if of_rows and ranks.is_last_stage and ranks.tp_rank == 0:  # alike on all tp ranks
            loss_rows = torch.cat([value.to(**options).reshape(-1) for value in of_rows])
        buffers = [
            b.grad_data
            for module in self.ddp
            for b in (*module.buffers, *module.expert_parallel_buffers)
        ]
        is_bad = ~torch.stack([gradient.sum() for gradient in buffers]).isfinite().all()
        # For the largest, a sum in which each rank has its places.
        places = [0.0] * (len(local.largest) * ranks.world_size)
        places[ranks.rank :: ranks.world_size] = local.largest.values()
        others = torch.tensor([*local.added.values(), *places], **options)
        sums = torch.cat([loss_rows, is_bad.double()[None], others])
        dist.all_reduce(sums)
        values = iter(sums.tolist())
        reduced = {name: next(values) for name in local.loss_rows}
        vectors = {
            name: [*itertools.islice(values, len(vector))] for name, vector in local.vectors.items()
        }
        num_bad_ranks = int(next(values))
        reduced |= {name: next(values) for name in local.added}
        for name in local.largest:
            reduced[name] = max(itertools.islice(values, ranks.world_size))
        return StepSums(reduced, num_bad_ranks, self.num_backwards, vectors)

    def optimizer_step(self, sums: StepSums) -> tuple[float, float]:
        """Clip, update, advance the schedule.  Returns (gradient norm, learning rate used).

        ``sums`` are those of the last ``forward_backward``.  Raises NonFiniteGradients, on every
        rank, before anything is updated.
        """
        assert sums.backward == self.num_backwards, "sums of another train step"
        # The norm does not see all: what tp ranks hold alike, it counts on the first alone.
        if sums.num_bad_ranks:
            raise NonFiniteGradients(
                f"gradients are NaN or inf on {sums.num_bad_ranks} of {self.ranks.world_size} ranks"
            )
        lr = float(self.optimizer.param_groups[0]["lr"])
        _, grad_norm, _ = self.optimizer.step()
        self.schedule.step(1)
        return float(grad_norm or 0.0), lr

    # -- between train steps -----------------------------------------------------------------------
    @contextlib.contextmanager
    def offloaded(self) -> Iterator[None]:
        """Gradients and optimizer state wait in host memory while the block runs; afterwards they
        are the same bits.

        Parameters stay.  Views (``main_grad``, buckets) stay valid: only their storages are emptied
        and filled again.
        """
        # The plain optimizer of float32 weights holds the model's own parameters: they stay.
        weights = {
            p.untyped_storage().data_ptr() for chunk in self.chunks for p in chunk.parameters()
        }
        tensors = [
            b.grad_data
            for module in self.ddp
            for b in (*module.buffers, *module.expert_parallel_buffers)
        ]
        for adam in optimizer.torch_optimizers(self.optimizer):
            tensors += [
                t for state in adam.state.values() for t in state.values() if torch.is_tensor(t)
            ]
            # The float32 copies of 16-bit weights.
            tensors += [p.data for group in adam.param_groups for p in group["params"]]
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t.nbytes
        }
        storages = {pointer: s for pointer, s in storages.items() if pointer not in weights}
        offloaded = []
        for storage in storages.values():
            host = torch.empty(
                storage.nbytes(), dtype=torch.uint8, pin_memory=self.ranks.device.type == "cuda"
            )
            host.copy_(_bytes(storage))
            offloaded.append((storage, host))
            storage.resize_(0)
        try:
            yield
        finally:
            for storage, host in offloaded:
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

    @property
    def steps_done(self) -> int:
        return int(self.schedule.num_steps) - 1

    @property
    def optimizer_updates(self) -> int:
        """How often Adam updated the moments, in this run and in the one that it began with: its
        bias correction counts them all.
        """
        return self.steps_done + self._updates_before

    def load_optimizer(self, state: Any, *, num_updates: int, steps_done: int) -> None:
        """Take a checkpoint's optimizer state, of ``num_updates``, and go on after ``steps_done``
        train steps of this run.
        """
        optimizer.load_state(self.optimizer, state, num_updates)
        optimizer.resume_schedule(self.schedule, steps_done)
        self._updates_before = num_updates - steps_done


def build_ddp_config(fields: MegatronFields) -> DistributedDataParallelConfig:
    with megatron_refuses(fields.names):
        return DistributedDataParallelConfig(grad_reduce_in_fp32=True, **fields.ddp)


def _one_or_all(items: list[Any]) -> Any:
    """Megatron takes a list only where there are several model chunks."""
    return items if len(items) > 1 else items[0]


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
