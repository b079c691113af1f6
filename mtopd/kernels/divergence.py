"""Output layers and divergence in one operation: exact, over the whole vocabulary, without the
logits of all tokens.

Legend: T tokens, D student hidden size, E teacher hidden size (X: either), V vocabulary, v this
rank's rows of it, A tokens with a weight, C tokens of a logit chunk, G tokens of a gradient chunk,
R tensor-parallel ranks.

The gradients of both student tensors are computed in the forward pass, while a chunk's logits are
in memory: four matrix products per token and no recomputation.  Two levels of chunks: logits of C
tokens at a time; their derivatives, where they are narrower than the logits (16-bit operands on
CUDA), are collected for G tokens before the two products that use them, so that these run at a good
size and the sum over tokens in the weight gradient is read and written seldom.  The arithmetic
of a row is in `rows`.

Invariants:
* No tensor of [T, v] exists.  Logits, derivatives and upcast weights live in one workspace of
  `workspace_bytes`, as long as that holds one row and one weight row.  Gradients ([T, D] and [v,
  D]) and [T] tensors come on top.
* Masked tokens are dropped before the first product, columns >= vocab_size are never computed:
  neither can leak.
* 16-bit operands are multiplied with float32 results and sums; under autocast too.
* The products that make logits have the same number of rows whatever T is (the last chunk is filled
  up), so the value of a token does not depend on what else is in the batch.  Sums run in a fixed
  order: two runs agree bit for bit.
* Every tp rank joins the same collectives, raises the same error, and gets bit-identical outputs.
  A chunk's collectives travel while the next chunk is multiplied.
* The caller's tensors are not written, except weight_grad_accumulator.

It does not sum the student_hidden gradient over tp ranks, and gives token_weight and the teacher no
gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtopd.kernels.checks import check_accumulator, check_choices
from mtopd.kernels.chunks import Call, Chunk, has_neginf
from mtopd.kernels.labels import Labels
from mtopd.kernels.products import add_gradient_times_hidden_, gradient_times_weight
from mtopd.kernels.rows import NO_BETA, REVERSE_KL_AS_MIXTURE, Kind, Row, mixture_of


class Divergence(NamedTuple):
    """Result of `fused_linear_divergence`; bit-identical on every tp rank."""

    # scalar, sum_t token_weight[t] * per_token[t]; differentiable in both student tensors
    loss: Tensor
    per_token: Tensor  # [T] divergence in nats, detached, 0 where masked
    entropy: Tensor  # [T] student entropy in nats at the same temperature, detached, 0 where masked
    # [T] student log-prob of `labels` in nats, likewise; None without labels
    label_log_prob: Tensor | None = None


def fused_linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    token_weight: Tensor,
    labels: Tensor | None = None,
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
    teacher_neginf: str = "error",
    weight_grad_accumulator: Tensor | None = None,
    backend: str = "auto",
    workspace_bytes: int | None = None,
) -> Divergence:
    """A divergence between student p and teacher q over the whole vocabulary, weighted and summed
    over tokens.

    Of a model's hidden states h [T, D] or [T, E] and this rank's rows W [v, D] or [v, E] of its
    output layer: z = softcap * tanh((logit_scale * (h @ W.T) + bias) / softcap); temperature
    divides z last; no temperature**2.

    token_weight [T]: 0 = masked; holds 1/N and the teacher's weight.  The same on every tp rank, as
        are hidden states.
    labels [T] in int64: tokens whose log-probs are wanted, below vocab_size, the same on every tp
        rank.  They are read off the logits that are there: no product and no collective more.
    divergence, beta: the definitions and their sources are in `mtopd.kernels.rows`.  jsd,
        skewed_reverse_kl and skewed_forward_kl need a beta in (0, 1).
    vocab_size: columns >= it take no part; tp rank r holds columns r * v to (r + 1) * v.  None: all
        columns.
    teacher_bias [v]: this rank's part.  -inf excludes a token from the teacher.
    teacher_neginf: "error" refuses reverse_kl where the teacher excludes a token that the student
        can sample (the divergence is infinite); "floor" takes log q = -87.3 there.  The other
        divergences are finite.
    weight_grad_accumulator [v, D] in float32 (float64 for float64 inputs), Megatron's main_grad:
        the gradient of student_weight is added to it in forward, if gradients are enabled.
        Backward then needs an upstream gradient of 1, sets student_weight.grad_added_to_main_grad
        and returns zeros, so that hooks fire.  Not with activation recompute, which would add it
        twice.
    backend: the row kernels: "triton" (CUDA), "cpu" (compiled C++), "torch" (slow), or "auto",
        logged once.
    workspace_bytes: bound on temporary memory (module docstring); None: 192 MiB on CPU, 1792 MiB on
        CUDA.

    Raises ValueError, alike on every tp rank, for inputs that do not fit together and for -inf
    teacher logits as said. NaN or +inf logits in a token with a weight give a NaN loss.
    """
    check_choices(divergence, beta, teacher_neginf, backend)
    call = Call.of(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        token_weight=token_weight,
        labels=labels,
        temperature=temperature,
        vocab_size=vocab_size,
        tp_group=tp_group,
        student_logit_scale=student_logit_scale,
        student_softcap=student_softcap,
        teacher_logit_scale=teacher_logit_scale,
        teacher_softcap=teacher_softcap,
        teacher_bias=teacher_bias,
        backend=backend,
        workspace_bytes=workspace_bytes,
        kind=NO_BETA.get(divergence, Kind.MIXTURE),
        mixture=REVERSE_KL_AS_MIXTURE if beta is None else mixture_of(divergence, beta),
    )
    is_grad_enabled = torch.is_grad_enabled()
    accumulator_vD = weight_grad_accumulator if is_grad_enabled else None
    if accumulator_vD is not None:
        check_accumulator(accumulator_vD, student_weight, call.dtype)
    refuses = divergence == "reverse_kl" and teacher_neginf == "error"
    # A bias is looked at before anything is accumulated.
    if refuses and has_neginf(call.problem.teacher.bias_v, call.tp):
        _refuse_excluded_tokens(_evaluate(call, None).excluded_A, call.rows_A)
    loss, per_token_T, entropy_T, label_log_prob_T, excluded_A = _GradientInForward.apply(
        student_hidden, student_weight, call, accumulator_vD, is_grad_enabled
    )
    if refuses:
        _refuse_excluded_tokens(excluded_A, call.rows_A)
    return Divergence(loss, per_token_T, entropy_T, None if labels is None else label_log_prob_T)


class _GradientInForward(torch.autograd.Function):
    """The student's gradients are ready when forward returns; backward scales and returns them."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden_TD: Tensor,
        student_weight_vD: Tensor,
        call: Call,
        accumulator_vD: Tensor | None,
        is_grad_enabled: bool,
    ) -> tuple[Tensor, ...]:
        gradients = None
        if is_grad_enabled and any(ctx.needs_input_grad[:2]):
            needs_hidden, needs_weight = ctx.needs_input_grad[:2]
            hidden_grad_TD = (
                torch.zeros_like(student_hidden_TD, dtype=call.dtype) if needs_hidden else None
            )
            weight_grad_vD = accumulator_vD
            if needs_weight and accumulator_vD is None:
                weight_grad_vD = torch.empty_like(student_weight_vD, dtype=call.dtype)
            gradients = _StudentGradients(
                call, hidden_grad_TD, weight_grad_vD, accumulator_vD is not None
            )
        with torch.autocast(student_hidden_TD.device.type, enabled=False):
            tokens = _evaluate(call, gradients)
            weight_A = call.token_weight_T[call.rows_A].double()
            loss = torch.dot(weight_A, tokens.value_A).to(call.dtype)
        zeros_T = call.token_weight_T.new_zeros(call.token_weight_T.shape, dtype=call.dtype)
        per_token_T = zeros_T.index_copy(0, call.rows_A, tokens.value_A.to(call.dtype))
        entropy_T = zeros_T.index_copy(0, call.rows_A, tokens.entropy_A)
        label_log_prob_T = zeros_T
        if call.label_T is not None:
            label_log_prob_T = zeros_T.index_copy(0, call.rows_A, tokens.label_log_prob_A)
        if gradients is not None:
            ctx.hidden_grad_TD = gradients.hidden_TD
            ctx.weight_grad_vD = None if accumulator_vD is not None else gradients.weight_vD
            ctx.accumulated_weight = student_weight_vD if accumulator_vD is not None else None
            ctx.input_dtypes = (student_hidden_TD.dtype, student_weight_vD.dtype)
            ctx.is_spent = False
        ctx.mark_non_differentiable(per_token_T, entropy_T, label_log_prob_T, tokens.excluded_A)
        return loss, per_token_T, entropy_T, label_log_prob_T, tokens.excluded_A

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        assert not ctx.is_spent, "a graph that is not retained runs backward once"
        is_retained = torch._C._autograd._get_current_graph_task_keep_graph()
        ctx.is_spent = not is_retained
        if ctx.accumulated_weight is not None:
            if is_retained or loss_grad != 1:
                raise ValueError(
                    "weight_grad_accumulator has the gradient for an upstream gradient of 1 and "
                    f"one backward; found {loss_grad.item():g}"
                    f"{' and a retained graph' if is_retained else ''}.  Put scales into "
                    "token_weight, or leave weight_grad_accumulator None"
                )
            ctx.accumulated_weight.grad_added_to_main_grad = True
        hidden_grad_TD, weight_grad_vD = (
            _scaled(gradient, loss_grad, dtype, is_retained)
            for gradient, dtype in zip(
                (ctx.hidden_grad_TD, ctx.weight_grad_vD), ctx.input_dtypes, strict=True
            )
        )
        if ctx.accumulated_weight is not None:
            weight_grad_vD = _zeros_like(ctx.accumulated_weight)
        if not is_retained:
            ctx.hidden_grad_TD = ctx.weight_grad_vD = ctx.accumulated_weight = None
        return hidden_grad_TD, weight_grad_vD, None, None, None


def _scaled(
    gradient: Tensor | None, scale: Tensor, dtype: torch.dtype, is_retained: bool
) -> Tensor | None:
    """gradient * scale in `dtype`; in place, or the gradient itself, unless a retained graph needs
    it again.
    """
    if gradient is None:
        return None
    if gradient.dtype != dtype:
        return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))
    if is_retained:
        return gradient * scale
    # On CUDA the question would cost more than the multiplication.
    if scale.device.type == "cpu" and scale == 1:
        return gradient
    return gradient.mul_(scale)


def _zeros_like(tensor: Tensor) -> Tensor:
    """Zeros that nobody reads.  On CPU numpy's: the system's zero pages, which cost nothing until
    they are touched.
    """
    if tensor.device.type != "cpu":
        return torch.zeros_like(tensor)
    return torch.from_numpy(np.zeros(tensor.nbytes, np.uint8)).view(tensor.dtype).view(tensor.shape)


class _Tokens(NamedTuple):
    """What is known of the tokens with a weight."""

    value_A: Tensor  # float64
    entropy_A: Tensor
    excluded_A: Tensor  # the student's mass on tokens that the teacher excludes
    label_log_prob_A: Tensor  # [0] without labels


def _evaluate(call: Call, gradients: _StudentGradients | None) -> _Tokens:
    """All chunks, each overlapping the one before where there are collectives; adds to the
    gradients.
    """
    num_tokens = len(call.rows_A)
    shard_value_A, entropy_A, excluded_A = call.token_weight_T.new_zeros(
        3, num_tokens, dtype=call.dtype
    )
    labels = None if call.label_T is None else Labels(call, call.label_T)

    def finish(chunk: Chunk) -> None:
        if labels is not None:  # before the logits become derivatives
            labels.take(chunk)
        out_Cv = None if gradients is None else gradients.destination(chunk)
        shard_value_A[chunk.tokens] = chunk.gradient(out_Cv)
        entropy_A[chunk.tokens] = chunk.rows_9C[Row.ENTROPY]
        excluded_A[chunk.tokens] = chunk.rows_9C[Row.EXCLUDED_MASS]
        if gradients is not None:
            gradients.add(chunk)

    needs_gradient = gradients is not None
    with call.chunks() as chunks:
        previous: Chunk | None = None
        for chunk in chunks:
            chunk.multiply_teacher()
            if previous is not None:
                previous.find_centre(needs_gradient)
            chunk.multiply_student()
            chunk.exchange_statistics()
            if previous is not None:
                finish(previous)
            previous = chunk
            if call.num_buffers == 1:  # no other rank to wait for
                chunk.find_centre(needs_gradient)
                finish(chunk)
                previous = None
        if previous is not None:
            previous.find_centre(needs_gradient)
            finish(previous)
    if gradients is not None:
        gradients.finish()
    if labels is None:
        value_A = call.tp.all_gather(shard_value_A).wait().double().sum(0)
        return _Tokens(value_A, entropy_A, excluded_A, excluded_A[:0])
    shards_2A = torch.stack([shard_value_A, labels.shard_log_probs()])
    value_2A = call.tp.all_gather(shards_2A).wait().double().sum(0)
    return _Tokens(value_2A[0], entropy_A, excluded_A, value_2A[1].to(call.dtype))


class _StudentGradients:
    """Carries the derivatives of logits on to the student tensors that need a gradient."""

    def __init__(
        self, call: Call, hidden_TD: Tensor | None, weight_vD: Tensor | None, accumulates: bool
    ) -> None:
        self._call = call
        self.hidden_TD = hidden_TD
        self.weight_vD = weight_vD
        self._has_weight_sum = accumulates
        self._buffer_Gv: Tensor | None = None
        self._collected: list[slice] = []  # chunks whose derivatives are in the buffer, in order
        if call.gradient_dtype != call.dtype and len(call.rows_A) > 0:
            shape = (call.gradient_rows, call.num_columns)
            self._buffer_Gv = torch.empty(
                shape, dtype=call.gradient_dtype, device=call.rows_A.device
            )

    def destination(self, chunk: Chunk) -> Tensor:
        """Where the chunk's derivatives go: over its logits, or into the gradient chunk."""
        if self._buffer_Gv is None:
            return chunk.student_Cv
        start = len(self._collected) * self._call.chunk_rows
        return self._buffer_Gv[start : start + len(chunk.rows_C)]

    def add(self, chunk: Chunk) -> None:
        if self._buffer_Gv is None:
            self._multiply(chunk.tokens, chunk.student_Cv)
            return
        self._collected.append(chunk.tokens)
        if len(self._collected) * self._call.chunk_rows == self._call.gradient_rows:
            self._multiply_collected()

    def finish(self) -> None:
        self._multiply_collected()
        if self.weight_vD is not None and not self._has_weight_sum:
            self.weight_vD.zero_()

    def _multiply_collected(self) -> None:
        if self._collected:
            assert self._buffer_Gv is not None
            tokens = slice(self._collected[0].start, self._collected[-1].stop)
            self._multiply(tokens, self._buffer_Gv[: tokens.stop - tokens.start])
            self._collected = []

    def _multiply(self, tokens: slice, gradient_Gv: Tensor) -> None:
        call = self._call
        student = call.student
        if self.hidden_TD is not None:
            product_GD = gradient_times_weight(
                gradient_Gv, student.weight_vX, call.tile_rows, call.dtype
            )
            self.hidden_TD.index_copy_(0, call.rows_A[tokens], product_GD)
        if self.weight_vD is not None and call.num_columns > 0:
            hidden_GD = call.take(student.hidden_TX, tokens)
            sum_vD = self.weight_vD[: call.num_columns]
            add_gradient_times_hidden_(
                sum_vD, gradient_Gv, hidden_GD, is_first=not self._has_weight_sum
            )
            if not self._has_weight_sum:
                self.weight_vD[call.num_columns :].zero_()
                self._has_weight_sum = True


def _refuse_excluded_tokens(excluded_A: Tensor, rows_A: Tensor) -> None:
    is_excluded_A = excluded_A > 0
    if is_excluded_A.any():
        raise ValueError(
            "the teacher's logit is -inf for a token that the student can sample, in "
            f"{int(is_excluded_A.sum())} of {len(rows_A)} tokens with a weight (first: row "
            f"{int(rows_A[is_excluded_A][0])}); the reverse KL is infinite there.  Exclude such "
            "tokens on both sides, give the teacher finite logits, or take teacher_neginf='floor'"
        )
