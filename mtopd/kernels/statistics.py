"""Metrics that need both distributions, on a few tokens: entropies, forward KL, overlap of the likeliest tokens.

Legend: T tokens, D student hidden size, E teacher hidden size, v this rank's vocabulary rows, N tokens measured,
C tokens of a chunk, K likeliest tokens compared, R tensor-parallel ranks, A = R x K candidates,
M = 2 C: rows of student against teacher, then of teacher against student.

The tokens are drawn by a seed, alike on every tp rank, and their number is bounded by the caller: two products and a
look at the logits for each, in the workspace of `fused_linear_divergence`, nothing kept for a gradient.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mtopd.kernels.chunks import Call, Chunk
from mtopd.kernels.rows import LogitTransform, Row


class DistributionStatistics(NamedTuple):
    """One value for each token measured, [N]; bit-identical on every tp rank.  Entropies and KL in nats."""

    rows: Tensor  # which tokens, int64, ascending
    student_entropy: Tensor
    teacher_entropy: Tensor
    forward_kl: Tensor  # KL(teacher || student)
    overlap_ratio: Tensor  # of the k likeliest tokens of both models: how many they share, over k
    student_overlap_mass: Tensor  # student's probability of the shared ones
    teacher_overlap_mass: Tensor


@torch.no_grad()
def distribution_statistics(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    token_weight: Tensor,
    num_tokens: int,
    seed: int,
    k: int = 16,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    teacher_bias: Tensor | None = None,
    backend: str = "auto",
    workspace_bytes: int | None = None,
) -> DistributionStatistics:
    """Statistics of at most `num_tokens` tokens with a weight, drawn by `seed`; `k` is cut to the vocabulary.

    The other arguments are those of `fused_linear_divergence`; overlap as in arXiv:2604.13016 (k = 16 there).
    Raises ValueError for inputs that do not fit together.
    """
    if num_tokens < 1 or k < 1:
        raise ValueError(f"num_tokens is {num_tokens} and k is {k}; at least 1 of each is needed")
    call = Call.of(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        token_weight=token_weight,
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
    )
    transforms = (call.problem.student, call.problem.teacher)
    # Applied here, before the row kernels: the likeliest tokens are looked up in the finished logits.
    problem = replace(call.problem, student=LogitTransform(), teacher=LogitTransform())
    drawn_T = _drawn(call.token_weight_T, num_tokens, seed)
    call = replace(call, problem=problem, token_weight_T=drawn_T, most_rows=num_tokens)
    k = min(k, call.tp.size * call.shard_rows if vocab_size is None else vocab_size)
    with torch.autocast(student_hidden.device.type, enabled=False), call.chunks() as chunks:
        measured = [_measure(call, chunk, k, transforms) for chunk in chunks]
    empty = [call.token_weight_T.new_empty(6, 0, dtype=call.dtype)]
    return DistributionStatistics(call.rows_A, *torch.cat(measured or empty, 1))


def _drawn(token_weight_T: Tensor, num_tokens: int, seed: int) -> Tensor:
    """Weight 1 for the drawn tokens, 0 for the others.  Drawn on the CPU: alike on every kind of device."""
    rows_A = token_weight_T.nonzero().squeeze(1)
    order = torch.randperm(len(rows_A), generator=torch.Generator().manual_seed(seed))[:num_tokens]
    return torch.zeros_like(token_weight_T).index_fill_(0, rows_A[order.to(rows_A.device)], 1)


def _measure(call: Call, chunk: Chunk, k: int, transforms: tuple[LogitTransform, LogitTransform]) -> Tensor:
    """Rows of `DistributionStatistics` but the first, [6, C]."""
    chunk.multiply_teacher()
    chunk.multiply_student()
    student_Cv, teacher_Cv = chunk.student_Cv, chunk.teacher_Cv
    for logits_Cv, transform in zip((student_Cv, teacher_Cv), transforms, strict=True):
        _transform_(logits_Cv, transform)
    # The reverse KL with the roles exchanged is the forward KL; both directions travel in one exchange.
    statistics_9M = torch.cat(
        [call.row_statistics(student_Cv, teacher_Cv), call.row_statistics(teacher_Cv, student_Cv)], 1
    )
    statistics = call.tp.all_gather(statistics_9M)
    (student_top_CK, student_ids_CK), (teacher_top_CK, teacher_ids_CK) = _likeliest(call, (student_Cv, teacher_Cv), k)
    rows_9M = call.kernels.merge(call.problem, statistics.wait(), student_Cv.new_ones(statistics_9M.shape[1]))
    student_9C, teacher_9C = (rows_9C.contiguous() for rows_9C in rows_9M.chunk(2, 1))
    value_C = call.row_gradient(teacher_Cv, student_Cv, teacher_9C, None)[0]
    forward_kl_C = call.tp.all_gather(value_C).wait().double().sum(0).to(call.dtype)
    is_shared_CKK = student_ids_CK[:, :, None] == teacher_ids_CK[:, None, :]

    def mass(top_CK: Tensor, rows_9C: Tensor, is_shared_CK: Tensor) -> Tensor:
        """Probability of the shared tokens, of the model whose roles in `rows_9C` are the student's."""
        exponents_CK = (top_CK - rows_9C[Row.STUDENT_MAX][:, None]) / call.problem.temperature
        return (exponents_CK.exp() * rows_9C[Row.STUDENT_INVERSE_SUM][:, None] * is_shared_CK).sum(1)

    return torch.stack(
        [
            student_9C[Row.ENTROPY],
            teacher_9C[Row.ENTROPY],
            forward_kl_C,
            is_shared_CKK.sum((1, 2)) / k,
            mass(student_top_CK, student_9C, is_shared_CKK.any(2)),
            mass(teacher_top_CK, teacher_9C, is_shared_CKK.any(1)),
        ]
    )


def _likeliest(call: Call, models: tuple[Tensor, Tensor], k: int) -> list[tuple[Tensor, Tensor]]:
    """The k largest logits of the whole vocabulary and their token ids, [C, K], of both models."""
    top_22CK = models[0].new_full((2, 2, len(models[0]), k), -math.inf)
    num_local = min(k, call.num_columns)
    for top_2CK, logits_Cv in zip(top_22CK, models, strict=True) if num_local > 0 else ():
        top = logits_Cv.topk(num_local, dim=1)
        top_2CK[0, :, :num_local] = top.values
        top_2CK[1, :, :num_local] = top.indices + call.tp.rank * call.shard_rows  # below 2**24: exact in float32
    found = []
    for all_R2CK in call.tp.all_gather(top_22CK).wait().unbind(1):
        values_CA, ids_CA = all_R2CK.permute(1, 2, 0, 3).flatten(2)
        values_CK, order_CK = values_CA.topk(k, dim=1)
        found.append((values_CK, ids_CA.gather(1, order_CK).long()))
    return found


def _transform_(raw_Cv: Tensor, transform: LogitTransform) -> None:
    raw_Cv.mul_(transform.scale)
    if transform.bias_v is not None:
        raw_Cv.add_(transform.bias_v)
    if transform.softcap is not None:
        raw_Cv.div_(transform.softcap).tanh_().mul_(transform.softcap)
