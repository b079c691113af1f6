"""Row statistics of the reverse KL, and their merge over the ranks that share the vocabulary.

Legend: C rows of a token chunk, v valid vocabulary columns of this rank (may be 0), R ranks, 6 statistics of a row.

With a = student logits / temperature, b = teacher logits / temperature, p and q their softmaxes, Delta = a - b:

    loss of a row   KL(p || q) = sum_v p_v (delta_v + expm1(-delta_v)),   delta = log p - log q  (Bregman, terms >= 0)
    its gradient    dKL / da_v = p_v (Delta_v - E_p[Delta])

Every tensor of columns lives in the frame of this rank's own row maxima (a - max a, b - max b), so offsets common to
a row never enter a difference.  `merge` turns the gathered statistics into a few numbers for each row that carry that
frame over to the whole vocabulary.

Invariants: columns where the student has no mass add q to the loss and nothing to the gradient, and no 0 * inf is
ever formed; `merge` is a pure function of the gathered statistics in rank order, hence bit-identical on every rank; p
and E_p use the same exponentials, so the gradient of a row sums to zero; NaN logits give a NaN loss, never a number.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class ChunkColumns(NamedTuple):
    """The columns of one chunk on this rank, in the frame of the rank's own row maxima."""

    student_exp_Cv: Tensor  # exp(a - max a)
    teacher_exp_Cv: Tensor  # exp(b - max b)
    delta_Cv: Tensor  # (a - max a) - (b - max b), 0 where either side has no mass
    teacher_excludes_Cv: Tensor  # bool: the teacher's logit is -inf


class RowMerge(NamedTuple):
    """What a row needs to know of the whole vocabulary, in this rank's frame; [C] each."""

    student_scale_C: Tensor  # p = student_exp * student_scale
    teacher_scale_C: Tensor  # q = teacher_exp * teacher_scale
    log_ratio_C: Tensor  # log p - log q = delta + log_ratio
    mean_delta_C: Tensor  # E_p[delta]
    entropy_C: Tensor  # -E_p[log p], nats


def local_statistics(student_Cv: Tensor, teacher_Cv: Tensor) -> tuple[ChunkColumns, Tensor]:
    """Statistics [6, C] of this rank's columns: max a, S = sum e^a, E[delta], E[a], max b, sum e^b (local frame).

    Logits come divided by the temperature and are overwritten.  A rank without mass reports max -inf and zeros.
    """
    student_max_C = _subtract_row_max_(student_Cv)
    teacher_max_C = _subtract_row_max_(teacher_Cv)
    student_exp_Cv = student_Cv.exp()
    teacher_excludes_Cv = teacher_Cv == -math.inf
    no_student_mass_Cv = student_exp_Cv == 0
    delta_Cv = torch.sub(student_Cv, teacher_Cv).masked_fill_(teacher_excludes_Cv | no_student_mass_Cv, 0)
    student_sum_C = student_exp_Cv.sum(1)
    mean_student_C = student_Cv.masked_fill_(no_student_mass_Cv, 0).mul_(student_exp_Cv).sum(1) / student_sum_C
    mean_delta_C = torch.mul(student_exp_Cv, delta_Cv, out=student_Cv).sum(1) / student_sum_C
    teacher_exp_Cv = teacher_Cv.exp_()
    has_mass_C = student_sum_C != 0
    statistics_6C = torch.stack(
        (
            student_max_C,
            student_sum_C,
            torch.where(has_mass_C, mean_delta_C, 0),
            torch.where(has_mass_C, mean_student_C, 0),
            teacher_max_C,
            teacher_exp_Cv.sum(1),
        )
    )
    return ChunkColumns(student_exp_Cv, teacher_exp_Cv, delta_Cv, teacher_excludes_Cv), statistics_6C


def merge(statistics_R6C: Tensor, rank: int) -> RowMerge:
    """Merge the ranks' statistics in rank order, in float64, and express the result in the frame of `rank`."""
    student_max_RC, student_sum_RC, delta_RC, student_RC, teacher_max_RC, teacher_sum_RC = (
        statistics_R6C.double().unbind(1)
    )
    student_shift_RC = student_max_RC - student_max_RC.amax(0)
    teacher_shift_RC = teacher_max_RC - teacher_max_RC.amax(0)
    mass_RC = student_sum_RC * student_shift_RC.exp()
    mass_C = mass_RC.sum(0)
    teacher_mass_C = (teacher_sum_RC * teacher_shift_RC.exp()).sum(0)
    # A shift is -inf on a rank without mass: its own exponentials are 0 there, and 0 must not meet inf.
    frame_RC = _zero_unless_finite(student_shift_RC - teacher_shift_RC)
    mean_delta_C = (mass_RC * (delta_RC + frame_RC)).sum(0) / mass_C
    mean_student_C = (mass_RC * (student_RC + _zero_unless_finite(student_shift_RC))).sum(0) / mass_C
    return RowMerge(
        *(
            row_C.to(statistics_R6C.dtype)
            for row_C in (
                student_shift_RC[rank].exp() / mass_C,
                teacher_shift_RC[rank].exp() / teacher_mass_C,
                frame_RC[rank] + teacher_mass_C.log() - mass_C.log(),
                mean_delta_C - frame_RC[rank],
                mass_C.log() - mean_student_C,
            )
        )
    )


def loss_and_gradient(
    columns: ChunkColumns, rows: RowMerge, row_scale_C: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """This rank's part [C] of KL(p || q), and row_scale * dKL/da [C, v] (None without `row_scale_C`).

    The loss is +inf where the teacher excludes a token that the student can sample.  Overwrites `columns`.
    """
    probs_Cv = columns.student_exp_Cv.mul_(rows.student_scale_C[:, None])
    teacher_probs_Cv = columns.teacher_exp_Cv.mul_(rows.teacher_scale_C[:, None])
    log_ratio_Cv = columns.delta_Cv + rows.log_ratio_C[:, None]
    # Two forms of one term.  The first does not cancel near 0 and is never negative; the second cannot overflow.
    near_Cv = log_ratio_Cv.neg().expm1_().add_(log_ratio_Cv).mul_(probs_Cv)
    is_near_Cv = log_ratio_Cv.abs() < 0.5
    far_Cv = log_ratio_Cv.mul_(probs_Cv).sub_(probs_Cv).add_(teacher_probs_Cv)
    terms_Cv = torch.where(is_near_Cv, near_Cv, far_Cv)
    torch.where(probs_Cv == 0, teacher_probs_Cv, terms_Cv, out=terms_Cv)
    terms_Cv.masked_fill_(columns.teacher_excludes_Cv & (probs_Cv > 0), math.inf)
    loss_C = terms_Cv.sum(1)
    if row_scale_C is None:
        return loss_C, None
    return loss_C, columns.delta_Cv.sub_(rows.mean_delta_C[:, None]).mul_(probs_Cv).mul_(row_scale_C[:, None])


def _subtract_row_max_(logits_Cv: Tensor) -> Tensor:
    """Subtract each row's maximum in place and return it, [C]; a row of -inf (or without columns) keeps its values."""
    if logits_Cv.shape[1] == 0:
        return logits_Cv.new_full((logits_Cv.shape[0],), -math.inf)
    max_C = logits_Cv.amax(1)
    logits_Cv.sub_(max_C.masked_fill(max_C == -math.inf, 0)[:, None])
    return max_C


def _zero_unless_finite(shift_RC: Tensor) -> Tensor:
    return torch.where(shift_RC.isfinite(), shift_RC, 0)
