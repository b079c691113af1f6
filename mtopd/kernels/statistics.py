"""Metrics that need both distributions, of a few tokens: entropies, forward KL, overlap of the
likeliest tokens.

Legend: N tokens measured, X hidden size, v this rank's vocabulary rows, K likeliest tokens
compared, R tensor-parallel ranks, A = R x K candidates, M = 2 N: rows of student against teacher,
then of teacher against student; 2 as a letter: student, teacher.

Tokens of different teachers are measured together, from finished logits: at small sizes a call
costs what its many short operations and its one exchange cost, whatever the number of tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mtopd.kernels.checks import check_matmul_precision, check_numbers
from mtopd.kernels.chunks import TensorParallel
from mtopd.kernels.products import hidden_times_weight_
from mtopd.kernels.rows import Row, RowProblem, no_columns, select_row_kernels

_UPCAST_BYTES = 64 << 20  # of an output layer, where the product needs its operands upcast


class DistributionStatistics(NamedTuple):
    """One value for each token, [N]; bit-identical on every tp rank.  Entropies and KL in nats."""

    student_entropy: Tensor
    teacher_entropy: Tensor
    forward_kl: Tensor  # KL(teacher || student)
    overlap_ratio: Tensor  # of the k likeliest tokens of both models: how many they share, over k
    student_overlap_mass: Tensor  # student's probability of the shared ones
    teacher_overlap_mass: Tensor


@torch.no_grad()
def output_logits(
    hidden: Tensor,
    weight: Tensor,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The logits of `fused_linear_divergence` before the temperature, [N, v], of a few tokens [N,
    X]; no gradient.

    In float32, or in float64 if an input is.  Raises ValueError where torch would round the
    products' operands.
    """
    check_matmul_precision(hidden, weight)
    has_float64 = torch.float64 in (hidden.dtype, weight.dtype)
    logits_Nv = hidden.new_empty(
        len(hidden), len(weight), dtype=torch.float64 if has_float64 else torch.float32
    )
    with torch.autocast(hidden.device.type, enabled=False):
        tile_rows = max(1, _UPCAST_BYTES // (weight.shape[1] * logits_Nv.itemsize))
        hidden_times_weight_(logits_Nv, hidden, weight, tile_rows)
        if logit_scale != 1:
            logits_Nv.mul_(logit_scale)
        if bias is not None:
            logits_Nv.add_(bias)
        if softcap is not None:
            logits_Nv.div_(softcap).tanh_().mul_(softcap)
    return logits_Nv


@torch.no_grad()
def distribution_statistics(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    k: int = 16,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> DistributionStatistics:
    """Statistics of tokens whose logits are [N, v]: this rank's columns, padding included, of
    `output_logits`.

    `k` is cut to the vocabulary.  Overlap as in arXiv:2604.13016 (k = 16 there).  One all-gather of
    4 (9 + 2 k) x 2 bytes a token.  The other arguments are those of `fused_linear_divergence`.
    Raises ValueError for inputs that do not fit together.
    """
    student_Nv, teacher_Nv = student_logits, teacher_logits
    if (
        student_Nv.shape != teacher_Nv.shape
        or student_Nv.dim() != 2
        or student_Nv.dtype != teacher_Nv.dtype
    ):
        found = (f"{list(logits.shape)} {logits.dtype}" for logits in (student_Nv, teacher_Nv))
        raise ValueError(
            f"student_logits and teacher_logits are {' and '.join(found)}; both must be [N, v] of "
            "a dtype"
        )
    if k < 1:
        raise ValueError(f"k is {k}; at least 1 is needed")
    tp = TensorParallel.of(tp_group)
    shard_rows = student_Nv.shape[1]
    check_numbers(
        positive={"temperature": temperature},
        finite={},
        vocab_size=vocab_size,
        num_columns=tp.size * shard_rows,
        workspace_bytes=None,
    )
    vocab_size = tp.size * shard_rows if vocab_size is None else vocab_size
    k, first = min(k, vocab_size), tp.rank * shard_rows
    both = [logits_Nv[:, : max(vocab_size - first, 0)] for logits_Nv in (student_Nv, teacher_Nv)]
    problem = RowProblem(temperature=temperature)
    kernels = select_row_kernels(backend, student_Nv.device.type, student_Nv.dtype)
    # The reverse KL with the roles exchanged is the forward KL; both directions travel in one
    # exchange.
    directions = [
        kernels.statistics(problem, *pair)
        if pair[0].shape[1]
        else no_columns(len(student_Nv), student_Nv)
        for pair in (both, both[::-1])
    ]
    statistics_9M, top_22NK = torch.cat(directions, 1), _likeliest(both, k, first)
    sizes = [statistics_9M.numel(), top_22NK.numel()]
    all_R = tp.all_gather(torch.cat([statistics_9M.flatten(), top_22NK.flatten()])).wait()
    statistics_R9M, top_R22NK = all_R.split(sizes, 1)
    rows_9M = kernels.merge(
        problem,
        statistics_R9M.unflatten(1, statistics_9M.shape),
        student_Nv.new_ones(statistics_9M.shape[1]),
    )
    rows_92N = rows_9M.unflatten(1, (2, -1))
    values_2NA, ids_2NA = top_R22NK.unflatten(1, top_22NK.shape).permute(1, 2, 3, 0, 4).flatten(3)
    values_2NK, order_2NK = values_2NA.topk(k, sorted=False)
    ids_2NK = ids_2NA.gather(2, order_2NK)
    exponents_2NK = (values_2NK - rows_92N[Row.STUDENT_MAX][..., None]) / temperature
    probs_2NK = exponents_2NK.exp() * rows_92N[Row.STUDENT_INVERSE_SUM][..., None]
    is_shared_NKK = ids_2NK[0][:, :, None] == ids_2NK[1][:, None, :]
    is_shared_2NK = torch.stack([is_shared_NKK.any(2), is_shared_NKK.any(1)])
    forward_kl_N = rows_92N[Row.CENTRE, 1] + rows_92N[Row.LOG_RATIO, 1]
    mass_2N = (probs_2NK * is_shared_2NK).sum(2)
    return DistributionStatistics(
        student_entropy=rows_92N[Row.ENTROPY, 0],
        teacher_entropy=rows_92N[Row.ENTROPY, 1],
        # The row kernels give a finite value to what the other model excludes.
        forward_kl=forward_kl_N.clamp(min=0).masked_fill(
            rows_92N[Row.EXCLUDED_MASS, 1] > 0, math.inf
        ),
        overlap_ratio=is_shared_2NK[0].sum(1) / k,
        student_overlap_mass=mass_2N[0],
        teacher_overlap_mass=mass_2N[1],
    )


def _likeliest(both: list[Tensor], k: int, first: int) -> Tensor:
    """[values, ids][student, teacher] of this rank's k largest logits, whose columns begin with
    token ``first``.
    """
    num_rows, num_columns = both[0].shape
    top_22NK = both[0].new_full((2, 2, num_rows, k), -math.inf)
    top_22NK[1] = -1
    for model, logits_Nv in enumerate(both) if num_columns else ():
        # Sorting would be the most expensive part of it.
        top = logits_Nv.topk(min(k, num_columns), sorted=False)
        top_22NK[0, model, :, :num_columns] = top.values
        top_22NK[1, model, :, :num_columns] = top.indices + first  # below 2**24: exact in float32
    return top_22NK
