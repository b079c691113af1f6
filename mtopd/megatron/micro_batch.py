"""One micro-batch at the seam to Megatron: its tensors, its forward step, its loss.

The loss comes from an *objective*, called on last-stage ranks only, once per micro-batch:
``objective(student_hidden_TD, output_weight_vD, micro_batch) -> loss`` over the T loss rows that
``micro_batch`` names, in order.  Its loss is a plain sum in which 1/N already stands (token
weights), so gradients of micro-batches, dp and cp ranks and pipeline stages are added and divided
by nothing: ``num_tokens = 0`` tells Megatron exactly that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from mtopd.megatron import cpu

# The supervised objective's, which lives in `objectives`, where Megatron is not imported.
__all__ = ["PackedMicroBatch", "forward_step", "loss", "vocab_parallel_cross_entropy"]


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


LossFunction = Callable[[torch.Tensor, torch.Tensor, PackedMicroBatch], torch.Tensor]
OutputWeight = Callable[[], torch.Tensor]  # [V / tp, D] on the last stage


def forward_step(
    micro_batches: Iterator[PackedMicroBatch],
    model: DistributedDataParallel,
    *,
    output_weight: OutputWeight,
    objective: LossFunction,
) -> tuple[torch.Tensor, Any]:
    """Megatron's ``forward_step_func``: the chunk's output, and what turns it into the loss on the
    last stage.
    """
    micro_batch = next(micro_batches)
    output = model(
        micro_batch.input_ids_BS,
        micro_batch.position_ids_BS,
        None,
        packed_seq_params=micro_batch.packed_seq_params,
    )
    return output, partial(
        loss,
        ddp=model,
        output_weight=output_weight,
        micro_batch=micro_batch,
        objective=objective,
    )


def loss(
    hidden_SBD: torch.Tensor,
    *,
    ddp: DistributedDataParallel,
    output_weight: OutputWeight,
    micro_batch: PackedMicroBatch,
    objective: LossFunction,
) -> tuple[torch.Tensor, torch.Tensor, Mapping[str, torch.Tensor]]:
    """Megatron's loss function of one micro-batch: (loss, number of tokens to divide by: 0, {})."""
    weight_vD = output_weight()
    # Megatron's 16-bit wrapper gives its last output in float32.
    hidden_SBD = hidden_SBD.to(weight_vD.dtype)
    # The output layer is split over tp: every rank's vocabulary shard adds its part to the hidden
    # states' gradient.
    if ddp.config.sequence_parallel:
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
    with cpu.no_device_rewrite():
        value = objective(student_hidden_TD, weight_vD, micro_batch)
    if ddp.ddp_config.overlap_grad_reduce:
        value = ReachesWeight.apply(value, weight_vD)
    return value, torch.zeros((), dtype=torch.int, device=value.device), {}


class ReachesWeight(torch.autograd.Function):
    """The loss unchanged, its own tensor (Megatron frees no view); backward also reaches
    ``weight``, with zeros.

    The objective adds the weight's gradient to ``main_grad`` itself.  DDP starts a bucket's
    reduction when autograd has reached all its parameters: without this one it would never start.
    """

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, weight_vD: torch.Tensor) -> torch.Tensor:
        # Expanded from one number: no gradient of the weight's size is allocated.
        ctx.zeros_vD = weight_vD.new_zeros(()).expand_as(weight_vD)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradients[0], ctx.zeros_vD
