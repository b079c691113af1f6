"""Row kernels in plain torch and float64: slow, exact, anywhere.  The other implementations are
tested against it.

Legend: C rows, v columns, K rows worked on at once.  Mathematics and names: rows.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mtopd.kernels.rows import (
    LOG_PROB_FLOOR,
    Kind,
    LogitTransform,
    Row,
    RowProblem,
    Statistic,
    merge,
)

_LIVE_TENSORS = 28  # float64 tensors of [K, v] alive at the worst moment
_EXCLUDED = 1e30  # log ratio where one side has no mass; finite, so that 0 * it is 0


class TorchRows:
    NAME = "torch"
    DEVICES = ()
    merge = staticmethod(merge)

    def statistics(self, problem: RowProblem, student_Cv: Tensor, teacher_Cv: Tensor) -> Tensor:
        statistics_9C = student_Cv.new_empty(len(Statistic), student_Cv.shape[0])
        for rows in _tiles(problem, student_Cv):
            student_Kv, _ = _transform(student_Cv[rows], problem.student)
            teacher_Kv, _ = _transform(teacher_Cv[rows], problem.teacher)
            student_max_K, teacher_max_K = student_Kv.amax(1), teacher_Kv.amax(1)
            columns = _columns(
                student_Kv, teacher_Kv, student_max_K, teacher_max_K, problem.temperature
            )
            student_sum_K, teacher_sum_K = (
                columns.student_exp_Kv.sum(1),
                columns.teacher_exp_Kv.sum(1),
            )
            excluded_Kv = columns.student_exp_Kv * columns.teacher_excludes_Kv
            is_near_Kv = (columns.delta_Kv.abs() < 0.5) & ~columns.excluded_Kv
            difference_Kv = torch.where(
                is_near_Kv,
                columns.student_exp_Kv * torch.expm1(-columns.delta_Kv),
                columns.teacher_exp_Kv - columns.student_exp_Kv,
            )
            values = {
                Statistic.STUDENT_MAX: student_max_K,
                Statistic.STUDENT_SUM: student_sum_K,
                Statistic.MEAN_DELTA: (columns.student_exp_Kv * columns.delta_Kv).sum(1)
                / student_sum_K,
                Statistic.MEAN_STUDENT: (columns.student_exp_Kv * columns.log_student_exp_Kv).sum(1)
                / student_sum_K,
                Statistic.TEACHER_MAX: teacher_max_K,
                Statistic.TEACHER_SUM: teacher_sum_K,
                Statistic.SUM_DIFFERENCE: difference_Kv.sum(1),
                Statistic.EXCLUDED_MASS: excluded_Kv.sum(1),
                Statistic.EXCLUDED_MEAN: (excluded_Kv * columns.log_student_exp_Kv).sum(1)
                / student_sum_K,
            }
            means = (Statistic.MEAN_DELTA, Statistic.MEAN_STUDENT, Statistic.EXCLUDED_MEAN)
            for name, value_K in values.items():
                no_mass_K = (
                    student_sum_K == 0
                    if name in means
                    else torch.zeros_like(student_sum_K, dtype=torch.bool)
                )
                statistics_9C[name, rows] = value_K.masked_fill(no_mass_K, 0).to(student_Cv.dtype)
        return statistics_9C

    def gradient(
        self,
        problem: RowProblem,
        student_Cv: Tensor,
        teacher_Cv: Tensor,
        rows_9C: Tensor,
        out_Cv: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        value_C, mean_C = rows_9C.new_empty(2, student_Cv.shape[0])
        for rows in _tiles(problem, student_Cv):
            student_Kv, slope_Kv = _transform(student_Cv[rows], problem.student)
            teacher_Kv, _ = _transform(teacher_Cv[rows], problem.teacher)
            row = {name: rows_9C[name, rows].double() for name in Row}
            columns = _columns(
                student_Kv,
                teacher_Kv,
                row[Row.STUDENT_MAX],
                row[Row.TEACHER_MAX],
                problem.temperature,
            )
            term_Kv, gradient_Kv, probs_Kv = _terms(problem, columns, row)
            value_C[rows] = term_Kv.sum(1).to(value_C.dtype)
            mean_C[rows] = gradient_Kv.sum(1).to(mean_C.dtype)
            if out_Cv is not None:
                if problem.needs_centre:
                    gradient_Kv -= probs_Kv * row[Row.CENTRE][:, None]
                gradient_Kv *= row[Row.ALPHA][:, None]
                if slope_Kv is not None:
                    gradient_Kv *= slope_Kv
                out_Cv[rows] = gradient_Kv.to(out_Cv.dtype)
        return value_C, mean_C


KERNELS = TorchRows()


@dataclass(frozen=True)
class _Columns:
    """Columns of some rows relative to the maxima given."""

    log_student_exp_Kv: Tensor  # 0 where the student excludes
    student_exp_Kv: Tensor
    teacher_exp_Kv: Tensor
    delta_Kv: Tensor  # 0 where either side excludes
    student_excludes_Kv: Tensor
    teacher_excludes_Kv: Tensor

    @property
    def excluded_Kv(self) -> Tensor:
        return self.student_excludes_Kv | self.teacher_excludes_Kv


def _columns(
    student_Kv: Tensor,
    teacher_Kv: Tensor,
    student_max_K: Tensor,
    teacher_max_K: Tensor,
    temperature: float,
) -> _Columns:
    student_excludes_Kv, teacher_excludes_Kv = student_Kv == -math.inf, teacher_Kv == -math.inf
    student_Kv = (
        student_Kv - student_max_K.masked_fill(student_max_K == -math.inf, 0)[:, None]
    ).div_(temperature)
    teacher_Kv = (
        teacher_Kv - teacher_max_K.masked_fill(teacher_max_K == -math.inf, 0)[:, None]
    ).div_(temperature)
    return _Columns(
        log_student_exp_Kv=student_Kv.masked_fill(student_excludes_Kv, 0),
        student_exp_Kv=student_Kv.exp(),
        teacher_exp_Kv=teacher_Kv.exp(),
        delta_Kv=(student_Kv - teacher_Kv).masked_fill_(
            student_excludes_Kv | teacher_excludes_Kv, 0
        ),
        student_excludes_Kv=student_excludes_Kv,
        teacher_excludes_Kv=teacher_excludes_Kv,
    )


def _terms(
    problem: RowProblem, columns: _Columns, row: dict[Row, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Terms of the value; p * phi (reverse_kl and forward_kl: already centred); p.  [K, v] each."""
    p_Kv = columns.student_exp_Kv * row[Row.STUDENT_INVERSE_SUM][:, None]
    q_Kv = columns.teacher_exp_Kv * row[Row.TEACHER_INVERSE_SUM][:, None]
    log_ratio_K1 = row[Row.LOG_RATIO][:, None]
    delta_Kv = columns.delta_Kv + log_ratio_K1
    if problem.kind == Kind.REVERSE_KL:
        log_prob_Kv = columns.log_student_exp_Kv + row[Row.STUDENT_INVERSE_SUM].log()[:, None]
        floored_Kv = torch.where(
            columns.teacher_excludes_Kv, log_prob_Kv - LOG_PROB_FLOOR, delta_Kv
        )
        delta_Kv = floored_Kv.masked_fill(columns.student_excludes_Kv, 0)
        near_Kv = p_Kv * _expm1_remainder(delta_Kv)
        is_near_Kv = (delta_Kv.abs() < 0.5) & ~columns.excluded_Kv
        term_Kv = torch.where(is_near_Kv, near_Kv, p_Kv * delta_Kv - p_Kv + q_Kv)
        return term_Kv, p_Kv * (delta_Kv - log_ratio_K1 - row[Row.CENTRE][:, None]), p_Kv
    delta_Kv = delta_Kv.masked_fill(columns.student_excludes_Kv, -_EXCLUDED)
    delta_Kv = delta_Kv.masked_fill(columns.teacher_excludes_Kv, _EXCLUDED)
    is_near_Kv = delta_Kv.abs() < 0.5
    difference_Kv = torch.where(is_near_Kv, -p_Kv * torch.expm1(-delta_Kv), p_Kv - q_Kv)
    if problem.kind == Kind.FORWARD_KL:
        far_Kv = p_Kv - q_Kv - q_Kv * delta_Kv
        far_Kv = far_Kv.masked_fill(columns.student_excludes_Kv & (q_Kv > 0), math.inf)
        return (
            torch.where(is_near_Kv, q_Kv * _expm1_remainder(-delta_Kv), far_Kv),
            difference_Kv,
            p_Kv,
        )
    if problem.kind == Kind.TVD:
        return difference_Kv.abs() / 2, p_Kv * difference_Kv.sign() / 2, p_Kv
    mix = problem.mixture
    mixture_Kv = mix.student_part * p_Kv + mix.teacher_part * q_Kv
    student = _mixture_term(p_Kv, mixture_Kv, delta_Kv, mix.student_part, mix.teacher_part)
    teacher = _mixture_term(q_Kv, mixture_Kv, -delta_Kv, mix.teacher_part, mix.student_part)
    share_Kv = torch.where(mixture_Kv > 0, difference_Kv / mixture_Kv, 0)
    phi_Kv = (
        mix.phi_share * share_Kv
        - mix.phi_log * student.log_ratio_Kv
        - mix.phi_excess * student.excess_Kv
    )
    return (
        mix.student_term * student.term_Kv + mix.teacher_term * teacher.term_Kv,
        p_Kv * phi_Kv,
        p_Kv,
    )


class _MixtureTerm(NamedTuple):
    """Of KL(self || m)."""

    term_Kv: Tensor  # self log(self / m) - self + m
    log_ratio_Kv: Tensor  # log(m / self)
    excess_Kv: Tensor  # log(m / self) - (m - self) / m


def _mixture_term(
    self_Kv: Tensor, mixture_Kv: Tensor, delta_Kv: Tensor, w_self: float, w_other: float
) -> _MixtureTerm:
    """m = w_self self + w_other other; delta = log self - log other."""
    relative_Kv = w_other * torch.expm1(-delta_Kv.clamp(min=-1))  # m / self - 1
    log_small_Kv = relative_Kv.log1p()
    log_large_Kv = (w_self * delta_Kv.clamp(max=0).exp() + w_other).log() - delta_Kv
    log_ratio_Kv = torch.where(delta_Kv > -0.5, log_small_Kv, log_large_Kv)
    is_near_Kv = (relative_Kv.abs() < 0.35) & (delta_Kv > -0.5)
    # In float64 the plain difference keeps nine digits at the smallest KL that float32 logits can
    # express.
    remainder_Kv = (relative_Kv - log_small_Kv).clamp_(min=0)
    share_Kv = relative_Kv / (1 + relative_Kv)
    far_share_Kv = torch.where(mixture_Kv > 0, (mixture_Kv - self_Kv) / mixture_Kv, 0)
    return _MixtureTerm(
        torch.where(
            is_near_Kv, self_Kv * remainder_Kv, mixture_Kv - self_Kv - self_Kv * log_ratio_Kv
        ),
        log_ratio_Kv,
        torch.where(is_near_Kv, relative_Kv * share_Kv - remainder_Kv, log_ratio_Kv - far_share_Kv),
    )


def _expm1_remainder(x_Kv: Tensor) -> Tensor:
    """x + expm1(-x) >= 0; by its series near 0, where the sum would cancel."""
    series_Kv = torch.zeros_like(x_Kv)
    for n in range(11, 1, -1):
        series_Kv = 1 / math.factorial(n) - series_Kv * x_Kv
    x_clamped_Kv = x_Kv.clamp(min=-1)
    return torch.where(
        x_Kv.abs() < 0.05, x_Kv * x_Kv * series_Kv, x_clamped_Kv + torch.expm1(-x_clamped_Kv)
    )


def _transform(raw_Kv: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor | None]:
    """Logits in float64, and their derivative in h @ W.T without the scale (None: 1)."""
    logits_Kv = raw_Kv.double() * transform.scale
    if transform.bias_v is not None:
        logits_Kv += transform.bias_v
    if transform.softcap is None:
        return logits_Kv, None
    logits_Kv /= transform.softcap
    # This form keeps its relative accuracy where 1 - tanh**2 has cancelled.
    slope_Kv = logits_Kv.cosh().pow_(-2)
    return logits_Kv.tanh_().mul_(transform.softcap), slope_Kv


def _tiles(problem: RowProblem, logits_Cv: Tensor) -> Iterator[slice]:
    num_rows, num_columns = logits_Cv.shape
    tile_rows = max(1, problem.scratch_bytes // (_LIVE_TENSORS * 8 * num_columns))
    return (
        slice(start, min(start + tile_rows, num_rows)) for start in range(0, num_rows, tile_rows)
    )
