"""Metrics that need both distributions, on a few tokens: entropies, forward KL, overlap of the likeliest tokens.

Legend: T tokens, D student hidden size, E teacher hidden size, v this rank's vocabulary rows, N tokens measured,
C tokens of a chunk, K likeliest tokens compared, R tensor-parallel ranks.

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
    call = replace(call, problem=problem, token_weight_T=_drawn(call.token_weight_T, num_tokens, seed))
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
    student_entropy_C, student_inverse_sum_C, student_max_C, _ = _row_numbers(call, student_Cv, teacher_Cv)
    # The reverse KL with the roles exchanged is the forward KL.
    teacher_entropy_C, teacher_inverse_sum_C, teacher_max_C, forward_kl_C = _row_numbers(call, teacher_Cv, student_Cv)
    student_top_CK, student_ids_CK = _likeliest(call, student_Cv, k)
    teacher_top_CK, teacher_ids_CK = _likeliest(call, teacher_Cv, k)
    is_shared_CKK = student_ids_CK[:, :, None] == teacher_ids_CK[:, None, :]

    def mass(top_CK: Tensor, max_C: Tensor, inverse_sum_C: Tensor, is_shared_CK: Tensor) -> Tensor:
        probs_CK = ((top_CK - max_C[:, None]) / call.problem.temperature).exp() * inverse_sum_C[:, None]
        return (probs_CK * is_shared_CK).sum(1)

    return torch.stack(
        [
            student_entropy_C,
            teacher_entropy_C,
            forward_kl_C,
            is_shared_CKK.sum((1, 2)) / k,
            mass(student_top_CK, student_max_C, student_inverse_sum_C, is_shared_CKK.any(2)),
            mass(teacher_top_CK, teacher_max_C, teacher_inverse_sum_C, is_shared_CKK.any(1)),
        ]
    )


def _row_numbers(call: Call, left_Cv: Tensor, right_Cv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of softmax(left): entropy, 1 / sum of exponentials, largest logit; and KL(left || right).  [C] each."""
    statistics_9C = call.row_statistics(left_Cv, right_Cv)
    statistics_R9C = call.tp.all_gather(statistics_9C).wait()
    rows_9C = call.kernels.merge(call.problem, statistics_R9C, left_Cv.new_ones(len(left_Cv)))
    value_C = call.row_gradient(left_Cv, right_Cv, rows_9C, None)[0]
    kl_C = call.tp.all_gather(value_C).wait().double().sum(0).to(call.dtype)
    return rows_9C[Row.ENTROPY], rows_9C[Row.STUDENT_INVERSE_SUM], rows_9C[Row.STUDENT_MAX], kl_C


def _likeliest(call: Call, logits_Cv: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of the whole vocabulary and their token ids, [C, K]."""
    top_2CK = logits_Cv.new_full((2, len(logits_Cv), k), -math.inf)
    num_local = min(k, call.num_columns)
    if num_local > 0:
        top = logits_Cv.topk(num_local, dim=1)
        top_2CK[0, :, :num_local] = top.values
        top_2CK[1, :, :num_local] = top.indices + call.tp.rank * call.shard_rows  # below 2**24: exact in float32
    top_R2CK = call.tp.all_gather(top_2CK).wait()
    all_2CK = top_R2CK.permute(1, 2, 0, 3).flatten(2)
    values_CK, order_CK = all_2CK[0].topk(k, dim=1)
    return values_CK, all_2CK[1].gather(1, order_CK).long()


def _transform_(raw_Cv: Tensor, transform: LogitTransform) -> None:
    raw_Cv.mul_(transform.scale)
    if transform.bias_v is not None:
        raw_Cv.add_(transform.bias_v)
    if transform.softcap is not None:
        raw_Cv.div_(transform.softcap).tanh_().mul_(transform.softcap)
