"""Output layers and divergence in one operation: exact reverse KL without ever holding the logits of all tokens.

Legend: T tokens, D student hidden size, E teacher hidden size (X: either), V vocabulary, v this rank's rows of it,
A tokens with a weight, C tokens of one chunk, R tensor-parallel ranks.

Logits exist for one token chunk at a time.  The gradients of both student tensors are made in the forward pass, while
the chunk's logits are there, and summed over chunks in the compute dtype; backward multiplies them by the upstream
scalar.  The compute dtype is float32, or float64 if any input is float64.  The arithmetic of a row is in `statistics`.

Invariants:
* No tensor of [T, v] exists; logits, their derivatives and upcast weights together stay within `workspace_bytes`, as
  long as that holds one row and one weight row.  Gradients ([T, D] and [v, D]) and [T] tensors come on top.
* Masked tokens are dropped before the first product, columns >= vocab_size are never computed: neither can leak.
* 16-bit operands are multiplied with float32 results; logits are never rounded to 16 bits, under autocast neither.
* Every tp rank joins the same collectives (one per chunk, one per call), raises the same error, and gets bit-identical
  outputs.  The caller's tensors are not written.

It does not sum the student_hidden gradient over tp ranks, and gives token_weight and the teacher no gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtopd.kernels.checks import check_numbers, check_tensors, refuse_what_is_not_there
from mtopd.kernels.products import add_gradient_times_hidden_, gradient_times_weight, hidden_times_weight
from mtopd.kernels.statistics import local_statistics, loss_and_gradient, merge

_CPU_WORKSPACE_BYTES = 64 << 20
_CUDA_WORKSPACE_BYTES = 256 << 20
_LIVE_LOGIT_TENSORS = 8  # [C, v] tensors alive at the worst moment: six, their boolean masks, the softcap's slope


class Divergence(NamedTuple):
    """Result of `fused_linear_divergence`; bit-identical on every tp rank."""

    loss: Tensor  # scalar, sum_t token_weight[t] * per_token[t]; differentiable in both student tensors
    per_token: Tensor  # [T] divergence in nats, detached, 0 where masked
    entropy: Tensor  # [T] student entropy in nats at the same temperature, detached, 0 where masked


def fused_linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    token_weight: Tensor,
    divergence: str = "reverse_kl",
    beta: float | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    teacher_bias: Tensor | None = None,
    logits: str = "fp32",
    teacher_neginf: str = "error",
    weight_grad_accumulator: Tensor | None = None,
    backend: str = "auto",
    workspace_bytes: int | None = None,
) -> Divergence:
    """Exact KL(student || teacher) over the whole vocabulary, weighted and summed over tokens.

    Of a model's hidden states h [T, D] or [T, E] and this rank's rows W [v, D] or [v, E] of its output layer:
    z = softcap * tanh((logit_scale * (h @ W.T) + bias) / softcap); temperature divides z last; no temperature**2.

    token_weight [T]: 0 = masked; holds 1/N and the teacher's weight.  The same on every tp rank, as are hidden states.
    vocab_size: columns >= it take no part; tp rank r holds columns r * v to (r + 1) * v.  None: all columns.
    teacher_bias [v]: this rank's part.
    workspace_bytes: bound on temporary memory (module docstring); None: 64 MiB on CPU, 256 MiB on CUDA.

    Raises ValueError for inputs that do not fit together, for what is not implemented, and, after all collectives and
    alike on every rank, where the teacher's logit is -inf for a token that the student can sample (the KL is infinite).
    NaN or +inf logits in a token with a weight give a NaN loss.
    """
    refuse_what_is_not_there(divergence, beta, logits, teacher_neginf, weight_grad_accumulator, backend)
    check_tensors(student_hidden, student_weight, teacher_hidden, teacher_weight, token_weight, teacher_bias)
    num_ranks, rank = (1, 0) if tp_group is None else (dist.get_world_size(tp_group), dist.get_rank(tp_group))
    check_numbers(
        positive={"temperature": temperature, "student_softcap": student_softcap, "teacher_softcap": teacher_softcap},
        finite={"student_logit_scale": student_logit_scale, "teacher_logit_scale": teacher_logit_scale},
        vocab_size=vocab_size,
        num_columns=num_ranks * student_weight.shape[0],
        workspace_bytes=workspace_bytes,
    )
    student = _Head(student_hidden, student_weight, student_logit_scale, student_softcap, None)
    teacher = _Head(teacher_hidden, teacher_weight, teacher_logit_scale, teacher_softcap, teacher_bias)
    call = _Call(student, teacher, token_weight, temperature, vocab_size, tp_group, num_ranks, rank, workspace_bytes)
    return Divergence(*_GradientInForward.apply(student_hidden, student_weight, call, torch.is_grad_enabled()))


@dataclass(frozen=True)
class _Head:
    """A model's hidden states and this rank's rows of its output layer, before the vocabulary's padding is cut."""

    hidden_TX: Tensor
    weight_vX: Tensor
    logit_scale: float
    softcap: float | None
    bias_v: Tensor | None

    def logits(self, rows_C: Tensor, call: _Call, with_slope: bool = False) -> tuple[Tensor, Tensor | None]:
        """Logits z [C, columns] of some tokens, and the slope of the softcap there if wanted (None: no softcap)."""
        hidden_CX, columns = self.hidden_TX.index_select(0, rows_C), slice(call.num_columns)
        logits_Cv = hidden_times_weight(hidden_CX, self.weight_vX[columns], call.dtype, call.tile_rows)
        logits_Cv.mul_(self.logit_scale)
        if self.bias_v is not None:
            logits_Cv.add_(self.bias_v[columns])
        if self.softcap is None:
            return logits_Cv, None
        logits_Cv.div_(self.softcap)
        # 1 / cosh**2 keeps its relative accuracy where 1 - tanh**2 has cancelled.
        slope_Cv = logits_Cv.cosh().pow_(-2) if with_slope else None
        return logits_Cv.tanh_().mul_(self.softcap), slope_Cv


@dataclass(frozen=True)
class _Call:
    """One checked call, and the sizes that follow from it (alike on every tp rank, except num_columns)."""

    student: _Head
    teacher: _Head
    token_weight_T: Tensor
    temperature: float
    vocab_size: int | None
    tp_group: dist.ProcessGroup | None
    num_ranks: int
    rank: int
    workspace_bytes: int | None

    @property
    def dtype(self) -> torch.dtype:
        tensors = (t for head in (self.student, self.teacher) for t in (head.hidden_TX, head.weight_vX, head.bias_v))
        has_float64 = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
        return torch.float64 if has_float64 else torch.float32

    @property
    def num_columns(self) -> int:
        """This rank's columns below vocab_size: a prefix of its rows, possibly empty."""
        num_rows = self.student.weight_vX.shape[0]
        return num_rows if self.vocab_size is None else min(max(self.vocab_size - self.rank * num_rows, 0), num_rows)

    @property
    def chunk_rows(self) -> int:
        """Tokens of a chunk: three quarters of the workspace, for a whole shard whatever part of it is padding."""
        hidden_sizes = self.student.hidden_TX.shape[1] + self.teacher.hidden_TX.shape[1]
        row_elements = _LIVE_LOGIT_TENSORS * self.student.weight_vX.shape[0] + 2 * hidden_sizes
        return max(1, self._workspace_bytes * 3 // 4 // (row_elements * self.dtype.itemsize))

    @property
    def tile_rows(self) -> int:
        """Vocabulary rows that are upcast at once: one quarter of the workspace."""
        hidden_size = max(self.student.hidden_TX.shape[1], self.teacher.hidden_TX.shape[1])
        return max(1, self._workspace_bytes // 4 // (hidden_size * self.dtype.itemsize))

    @property
    def _workspace_bytes(self) -> int:
        if self.workspace_bytes is not None:
            return self.workspace_bytes
        return _CUDA_WORKSPACE_BYTES if self.token_weight_T.is_cuda else _CPU_WORKSPACE_BYTES


class _GradientInForward(torch.autograd.Function):
    """The student's gradients are ready when forward returns; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, student_hidden_TD: Tensor, student_weight_vD: Tensor, call: _Call, is_grad_enabled: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        def gradient_of(tensor: Tensor, is_needed: bool) -> Tensor | None:
            return torch.zeros_like(tensor, dtype=call.dtype) if is_grad_enabled and is_needed else None

        hidden_grad_TD = gradient_of(student_hidden_TD, ctx.needs_input_grad[0])
        weight_grad_vD = gradient_of(student_weight_vD, ctx.needs_input_grad[1])
        with torch.autocast(student_hidden_TD.device.type, enabled=False):
            loss, per_token_T, entropy_T = _evaluate(call, hidden_grad_TD, weight_grad_vD)
        ctx.save_for_backward(hidden_grad_TD, weight_grad_vD)
        ctx.input_dtypes = (student_hidden_TD.dtype, student_weight_vD.dtype)
        ctx.mark_non_differentiable(per_token_T, entropy_T)
        return loss, per_token_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        # Out of place: the saved gradients serve every later backward through a retained graph.
        hidden_grad_TD, weight_grad_vD = (
            None if gradient is None else (gradient * loss_grad).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.input_dtypes, strict=True)
        )
        return hidden_grad_TD, weight_grad_vD, None, None


def _evaluate(
    call: _Call, hidden_grad_TD: Tensor | None, weight_grad_vD: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, divergence [T] and entropy [T]; adds the gradients to the buffers given."""
    weight_T = call.token_weight_T
    rows_A = weight_T.nonzero().squeeze(1)
    shard_loss_A = weight_T.new_zeros(len(rows_A), dtype=call.dtype)
    entropy_A = torch.zeros_like(shard_loss_A)
    for start in range(0, len(rows_A), call.chunk_rows):
        chunk = slice(start, start + call.chunk_rows)
        shard_loss_A[chunk], entropy_A[chunk] = _evaluate_chunk(call, rows_A[chunk], hidden_grad_TD, weight_grad_vD)
    loss_A = _all_gather(shard_loss_A, call).double().sum(0)
    _refuse_excluded_tokens(loss_A, rows_A)
    loss = torch.dot(weight_T[rows_A].double(), loss_A).to(call.dtype)
    per_token_T, entropy_T = torch.zeros(2, *weight_T.shape, dtype=call.dtype, device=weight_T.device)
    return loss, per_token_T.index_copy(0, rows_A, loss_A.to(call.dtype)), entropy_T.index_copy(0, rows_A, entropy_A)


def _evaluate_chunk(
    call: _Call, rows_C: Tensor, hidden_grad_TD: Tensor | None, weight_grad_vD: Tensor | None
) -> tuple[Tensor, Tensor]:
    """This shard's part of the divergence [C], and the entropy [C], of some tokens; adds their gradients."""
    needs_gradient = hidden_grad_TD is not None or weight_grad_vD is not None
    teacher_Cv, _ = call.teacher.logits(rows_C, call)
    student_Cv, slope_Cv = call.student.logits(rows_C, call, with_slope=needs_gradient)
    columns, statistics_6C = local_statistics(student_Cv.div_(call.temperature), teacher_Cv.div_(call.temperature))
    del student_Cv, teacher_Cv
    merged = merge(_all_gather(statistics_6C, call), call.rank)
    row_scale_C = call.token_weight_T[rows_C].to(call.dtype) * (call.student.logit_scale / call.temperature)
    loss_C, gradient_Cv = loss_and_gradient(columns, merged, row_scale_C if needs_gradient else None)
    if gradient_Cv is not None:
        if slope_Cv is not None:
            gradient_Cv.mul_(slope_Cv)
        _add_gradients(call, rows_C, gradient_Cv, hidden_grad_TD, weight_grad_vD)
    return loss_C, merged.entropy_C


def _add_gradients(
    call: _Call, rows_C: Tensor, gradient_Cv: Tensor, hidden_grad_TD: Tensor | None, weight_grad_vD: Tensor | None
) -> None:
    """Carry the gradient of h @ W.T for some tokens on to the student tensors that need one."""
    student, columns = call.student, slice(call.num_columns)
    if hidden_grad_TD is not None:
        hidden_grad_CD = gradient_times_weight(gradient_Cv, student.weight_vX[columns], call.tile_rows)
        hidden_grad_TD.index_copy_(0, rows_C, hidden_grad_CD)
    if weight_grad_vD is not None:
        hidden_CD = student.hidden_TX.index_select(0, rows_C)
        add_gradient_times_hidden_(weight_grad_vD[columns], gradient_Cv, hidden_CD, call.tile_rows)


def _all_gather(local: Tensor, call: _Call) -> Tensor:
    """The tensors of all tp ranks in rank order, stacked on a new first dimension."""
    if call.tp_group is None or local.numel() == 0:  # without tokens on one rank, none has any
        return local.expand(call.num_ranks, *local.shape)
    gathered = local.new_empty(call.num_ranks * local.numel())
    dist.all_gather_single(gathered, local.reshape(-1), group=call.tp_group)
    return gathered.view(call.num_ranks, *local.shape)


def _refuse_excluded_tokens(loss_A: Tensor, rows_A: Tensor) -> None:
    infinite_A = loss_A == math.inf
    if infinite_A.any():
        raise ValueError(
            f"the teacher's logit is -inf for a token that the student can sample, in {int(infinite_A.sum())} of "
            f"{len(rows_A)} tokens with a weight (first: row {int(rows_A[infinite_A][0])}); the reverse KL is infinite "
            "there.  Exclude such tokens on both sides, or give the teacher finite logits"
        )
