"""Row kernels for CUDA in Triton: statistics and gradient read each logit once; merging is a third,
tiny launch.

Legend: C rows, v columns, R ranks.  Mathematics, names and invariants: rows.py.  One program walks
one row in blocks of columns; sums are merged over blocks in order, in float64.  Nothing depends on
other rows.

Importing this module raises ValueError where Triton is missing.  Under TRITON_INTERPRET=1 it works
on CPU tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtopd.kernels.rows import LOG_PROB_FLOOR, Kind, LogitTransform, Row, RowProblem, Statistic

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ValueError("Triton is not installed; install mtopd[gpu]") from error

MAX_BLOCK, NUM_WARPS = 2048, 8
_MERGE_ROWS = 128
_NUM_STATISTICS = tl.constexpr(len(Statistic))
_REVERSE_KL, _FORWARD_KL, _TVD = (
    tl.constexpr(int(k)) for k in (Kind.REVERSE_KL, Kind.FORWARD_KL, Kind.TVD)
)
_LOG_PROB_FLOOR = tl.constexpr(LOG_PROB_FLOOR)
_EXCLUDED = tl.constexpr(1e30)  # log ratio where one side has no mass; finite, so that 0 * it is 0
_SERIES_LIMIT = tl.constexpr(0.35)
_NEGINF = tl.constexpr(float("-inf"))


@triton.jit
def _expm1_remainder(x):
    """x + expm1(-x) >= 0 for |x| < 0.5."""
    poly = 1.0 / 40320
    poly = 1.0 / 5040 - poly * x
    poly = 1.0 / 720 - poly * x
    poly = 1.0 / 120 - poly * x
    poly = 1.0 / 24 - poly * x
    poly = 1.0 / 6 - poly * x
    poly = 0.5 - poly * x
    return x * x * poly


@triton.jit
def _log1p(y):
    """log(1 + y), and y - log(1 + y) >= 0 where |y| < _SERIES_LIMIT."""
    s = y / (2.0 + y)
    z = s * s
    tail = s * z * (2.0 / 3 + z * (2.0 / 5 + z * (2.0 / 7 + z * (2.0 / 9 + z * (2.0 / 11)))))
    return tl.where(tl.abs(y) < _SERIES_LIMIT, 2.0 * s + tail, tl.log(1.0 + y)), s * y - tail


@triton.jit
def _load(
    ptr,
    columns,
    mask,
    scale,
    softcap,
    bias_ptr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    BIASED: tl.constexpr,
):
    """Logits (-inf beyond the row), and the softcap's derivative there."""
    z = tl.load(ptr + columns, mask=mask, other=0.0).to(tl.float32)
    slope = 1.0
    if SCALED:
        z = z * scale
    if BIASED:
        z = z + tl.load(bias_ptr + columns, mask=mask, other=0.0)
    if CAPPED:
        x = z / softcap
        y = 2.0 * tl.abs(x)
        e = tl.exp(-y)
        tanh = tl.where(y < 0.5, y - _expm1_remainder(y), 1.0 - e) / (1.0 + e)
        z = softcap * tl.where(x < 0, -tanh, tanh)
        slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    return tl.where(mask, z, _NEGINF), slope


@triton.jit
def _difference(a, b):
    """a - b in two parts, exactly (Knuth)."""
    d = a - b
    b_part = a - d
    a_part = d + b_part
    return d, (a - a_part) + (b_part - b)


@triton.jit
def _columns(a, b, student_max, teacher_max, inverse_temperature):
    """log e_p, e_p, e_q and Delta relative to the maxima; who excludes what."""
    student_excludes = a == _NEGINF
    teacher_excludes = b == _NEGINF
    offset, offset_error = _difference(student_max, teacher_max)
    difference, error = _difference(a, b)
    delta = ((difference - offset) + (error - offset_error)) * inverse_temperature
    delta = tl.where(student_excludes | teacher_excludes, 0.0, delta)
    log_e = (a - student_max) * inverse_temperature
    student_exp = tl.exp(log_e)
    teacher_exp = tl.exp((b - teacher_max) * inverse_temperature)
    return (
        tl.where(student_excludes, 0.0, log_e),
        student_exp,
        teacher_exp,
        delta,
        student_excludes,
        teacher_excludes,
    )


@triton.jit
def _finite_or_zero(x):
    return tl.where(x == _NEGINF, 0.0, x)


@triton.jit
def statistics_kernel(
    student_ptr,
    teacher_ptr,
    out_ptr,
    student_stride,
    student_scale,
    student_softcap,
    student_bias_ptr,
    teacher_stride,
    teacher_scale,
    teacher_softcap,
    teacher_bias_ptr,
    num_rows,
    num_columns,
    inverse_temperature,
    STUDENT_SCALED: tl.constexpr,
    STUDENT_CAPPED: tl.constexpr,
    STUDENT_BIASED: tl.constexpr,
    TEACHER_SCALED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    TEACHER_BIASED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [9, C] in the order of `Statistic`.  The maxima run along; the sums move to each new pair
    of them.
    """
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    student_max = tl.full((), _NEGINF, tl.float32)
    teacher_max = tl.full((), _NEGINF, tl.float32)
    sum_p = tl.zeros((), tl.float64)
    sum_delta = tl.zeros((), tl.float64)
    sum_log_e = tl.zeros((), tl.float64)
    sum_q = tl.zeros((), tl.float64)
    sum_difference = tl.zeros((), tl.float64)
    excluded = tl.zeros((), tl.float64)
    excluded_log_e = tl.zeros((), tl.float64)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < num_columns
        a, _ = _load(
            student_ptr, columns, mask, student_scale, student_softcap, student_bias_ptr,
            STUDENT_SCALED, STUDENT_CAPPED, STUDENT_BIASED,
        )  # fmt: skip
        b, _ = _load(
            teacher_ptr, columns, mask, teacher_scale, teacher_softcap, teacher_bias_ptr,
            TEACHER_SCALED, TEACHER_CAPPED, TEACHER_BIASED,
        )  # fmt: skip
        new_student_max = tl.maximum(student_max, tl.max(a, 0))
        new_teacher_max = tl.maximum(teacher_max, tl.max(b, 0))
        m = _finite_or_zero(new_student_max)
        n = _finite_or_zero(new_teacher_max)
        # What came before, seen from the new maxima.  Before any mass a maximum is -inf and its
        # sums are 0.
        shift_p = ((_finite_or_zero(student_max) - m) * inverse_temperature).to(tl.float64)
        shift_q = ((_finite_or_zero(teacher_max) - n) * inverse_temperature).to(tl.float64)
        factor_p = tl.where(student_max == _NEGINF, 0.0, tl.exp(shift_p))
        factor_q = tl.where(teacher_max == _NEGINF, 0.0, tl.exp(shift_q))
        shift_p = tl.where(student_max == _NEGINF, 0.0, shift_p)
        shift_q = tl.where(teacher_max == _NEGINF, 0.0, shift_q)
        sum_delta = factor_p * (sum_delta + (sum_p - excluded) * (shift_p - shift_q))
        sum_log_e = factor_p * (sum_log_e + sum_p * shift_p)
        excluded_log_e = factor_p * (excluded_log_e + excluded * shift_p)
        sum_difference = factor_q * sum_difference + sum_p * (factor_q - factor_p)
        sum_p = factor_p * sum_p
        sum_q = factor_q * sum_q
        excluded = factor_p * excluded
        student_max = new_student_max
        teacher_max = new_teacher_max

        log_e, e_p, e_q, delta, student_excludes, teacher_excludes = _columns(
            a, b, m, n, inverse_temperature
        )
        is_near = (tl.abs(delta) < 0.5) & (student_excludes == 0) & (teacher_excludes == 0)
        difference = tl.where(is_near, e_p * (_expm1_remainder(delta) - delta), e_q - e_p)
        e_excluded = tl.where(teacher_excludes, e_p, 0.0)
        sum_p += tl.sum(e_p, 0)
        sum_delta += tl.sum(e_p * delta, 0)
        sum_log_e += tl.sum(e_p * log_e, 0)
        sum_q += tl.sum(e_q, 0)
        sum_difference += tl.sum(difference, 0)
        excluded += tl.sum(e_excluded, 0)
        excluded_log_e += tl.sum(e_excluded * log_e, 0)
    inverse = tl.where(sum_p == 0, 0.0, 1.0 / tl.where(sum_p == 0, 1.0, sum_p))
    out_ptr += row
    tl.store(out_ptr, student_max)
    tl.store(out_ptr + num_rows, sum_p.to(tl.float32))
    tl.store(out_ptr + 2 * num_rows, (sum_delta * inverse).to(tl.float32))
    tl.store(out_ptr + 3 * num_rows, (sum_log_e * inverse).to(tl.float32))
    tl.store(out_ptr + 4 * num_rows, teacher_max)
    tl.store(out_ptr + 5 * num_rows, sum_q.to(tl.float32))
    tl.store(out_ptr + 6 * num_rows, sum_difference.to(tl.float32))
    tl.store(out_ptr + 7 * num_rows, excluded.to(tl.float32))
    tl.store(out_ptr + 8 * num_rows, (excluded_log_e * inverse).to(tl.float32))


@triton.jit
def merge_kernel(
    statistics_ptr,
    weight_ptr,
    rows_ptr,
    num_rows,
    inverse_temperature,
    alpha_scale,
    num_ranks,
    HAS_CENTRE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`rows.merge`, one row for each lane; ranks in order."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < num_rows
    student_max = tl.full((BLOCK,), _NEGINF, tl.float32)
    teacher_max = tl.full((BLOCK,), _NEGINF, tl.float32)
    for rank in range(num_ranks):
        ptr = statistics_ptr + rank * _NUM_STATISTICS * num_rows + row
        student_max = tl.maximum(student_max, tl.load(ptr, mask=mask, other=0.0))
        teacher_max = tl.maximum(teacher_max, tl.load(ptr + 4 * num_rows, mask=mask, other=0.0))
    mass = tl.zeros((BLOCK,), tl.float64)
    teacher_mass = tl.zeros((BLOCK,), tl.float64)
    difference = tl.zeros((BLOCK,), tl.float64)
    sum_delta = tl.zeros((BLOCK,), tl.float64)
    sum_log_e = tl.zeros((BLOCK,), tl.float64)
    excluded = tl.zeros((BLOCK,), tl.float64)
    excluded_log_e = tl.zeros((BLOCK,), tl.float64)
    for rank in range(num_ranks):
        ptr = statistics_ptr + rank * _NUM_STATISTICS * num_rows + row
        rank_student_max = tl.load(ptr, mask=mask, other=0.0)
        rank_p = tl.load(ptr + num_rows, mask=mask, other=1.0).to(tl.float64)
        rank_delta = tl.load(ptr + 2 * num_rows, mask=mask, other=0.0).to(tl.float64)
        rank_log_e = tl.load(ptr + 3 * num_rows, mask=mask, other=0.0).to(tl.float64)
        rank_teacher_max = tl.load(ptr + 4 * num_rows, mask=mask, other=0.0)
        rank_q = tl.load(ptr + 5 * num_rows, mask=mask, other=1.0).to(tl.float64)
        rank_difference = tl.load(ptr + 6 * num_rows, mask=mask, other=0.0).to(tl.float64)
        rank_excluded = tl.load(ptr + 7 * num_rows, mask=mask, other=0.0).to(tl.float64)
        rank_excluded_log_e = tl.load(ptr + 8 * num_rows, mask=mask, other=0.0).to(tl.float64)
        has_p = rank_student_max != _NEGINF
        has_q = rank_teacher_max != _NEGINF
        shift_p = (
            tl.where(has_p, rank_student_max.to(tl.float64) - student_max.to(tl.float64), 0.0)
            * inverse_temperature
        )
        shift_q = (
            tl.where(has_q, rank_teacher_max.to(tl.float64) - teacher_max.to(tl.float64), 0.0)
            * inverse_temperature
        )
        factor_p = tl.where(has_p, tl.exp(shift_p), 0.0)
        factor_q = tl.where(has_q, tl.exp(shift_q), 0.0)
        frame = tl.where(has_p & has_q, shift_p - shift_q, 0.0)
        mass += rank_p * factor_p
        teacher_mass += rank_q * factor_q
        difference += rank_difference * factor_q + rank_p * (factor_q - factor_p)
        sum_delta += factor_p * (rank_p * rank_delta + (rank_p - rank_excluded) * frame)
        sum_log_e += factor_p * rank_p * (rank_log_e + shift_p)
        excluded += factor_p * rank_excluded
        excluded_log_e += factor_p * (rank_p * rank_excluded_log_e + rank_excluded * shift_p)
    relative = difference / mass
    log_mass = tl.log(mass)
    log_ratio = tl.where(
        tl.abs(relative) < 0.5, tl.log(1.0 + relative), tl.log(teacher_mass) - log_mass
    )
    excluded = excluded / mass
    floored = excluded_log_e / mass - excluded * (log_mass + _LOG_PROB_FLOOR + log_ratio)
    centre = sum_delta / mass + tl.where(excluded > 0, floored, 0.0)
    weight = tl.load(weight_ptr + row, mask=mask, other=0.0)
    rows_ptr += row
    tl.store(rows_ptr, student_max, mask=mask)
    tl.store(rows_ptr + num_rows, teacher_max, mask=mask)
    tl.store(rows_ptr + 2 * num_rows, (1.0 / mass).to(tl.float32), mask=mask)
    tl.store(rows_ptr + 3 * num_rows, (1.0 / teacher_mass).to(tl.float32), mask=mask)
    tl.store(rows_ptr + 4 * num_rows, log_ratio.to(tl.float32), mask=mask)
    tl.store(
        rows_ptr + 5 * num_rows,
        centre.to(tl.float32) if HAS_CENTRE else tl.zeros((BLOCK,), tl.float32),
        mask=mask,
    )
    tl.store(rows_ptr + 6 * num_rows, weight * alpha_scale, mask=mask)
    tl.store(rows_ptr + 7 * num_rows, (log_mass - sum_log_e / mass).to(tl.float32), mask=mask)
    tl.store(rows_ptr + 8 * num_rows, excluded.to(tl.float32), mask=mask)


@triton.jit
def _mixture_term(probs, mixture, delta, near_expm1, far_exp, is_near, w_self, w_other):
    """Of KL(probs || m): the Bregman term, log(m / probs), log(m / probs) - (m - probs) / m.

    m = w_self * probs + w_other * other; delta = log probs - log other; near_expm1 = expm1(-delta)
    where is_near; far_exp = exp(-|delta|).
    """
    is_small = delta > -0.5
    y = tl.where(is_small, w_other * tl.where(is_near, near_expm1, far_exp - 1.0), 0.0)
    log_small, remainder = _log1p(y)
    log_ratio = tl.where(is_small, log_small, tl.log(w_self * far_exp + w_other) - delta)
    use_series = is_small & (tl.abs(y) < _SERIES_LIMIT)
    has_mass = mixture > 0
    far_share = tl.where(has_mass, (mixture - probs) / tl.where(has_mass, mixture, 1.0), 0.0)
    term = tl.where(use_series, probs * remainder, mixture - probs - probs * log_ratio)
    excess = tl.where(use_series, y * (y / (1.0 + y)) - remainder, log_ratio - far_share)
    return term, log_ratio, excess


@triton.jit
def gradient_kernel(
    student_ptr,
    teacher_ptr,
    gradient_ptr,
    rows_ptr,
    value_ptr,
    mean_ptr,
    student_stride,
    student_scale,
    student_softcap,
    student_bias_ptr,
    teacher_stride,
    teacher_scale,
    teacher_softcap,
    teacher_bias_ptr,
    gradient_stride,
    num_rows,
    num_columns,
    inverse_temperature,
    student_part,
    teacher_part,
    student_term,
    teacher_term,
    phi_log,
    phi_excess,
    phi_share,
    KIND: tl.constexpr,
    WRITE: tl.constexpr,
    STUDENT_SCALED: tl.constexpr,
    STUDENT_CAPPED: tl.constexpr,
    STUDENT_BIASED: tl.constexpr,
    TEACHER_SCALED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    TEACHER_BIASED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Value [C] and E_p[phi] [C] of this rank's columns; with WRITE the derivatives, in place or
    elsewhere.
    """
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    gradient_ptr += row * gradient_stride
    rows_ptr += row
    student_max = _finite_or_zero(tl.load(rows_ptr))
    teacher_max = _finite_or_zero(tl.load(rows_ptr + num_rows))
    inverse_p = tl.load(rows_ptr + 2 * num_rows)
    inverse_q = tl.load(rows_ptr + 3 * num_rows)
    log_ratio = tl.load(rows_ptr + 4 * num_rows)
    centre = tl.load(rows_ptr + 5 * num_rows)
    alpha = tl.load(rows_ptr + 6 * num_rows)
    log_prob_offset = tl.log(inverse_p) - _LOG_PROB_FLOOR
    value = tl.zeros((), tl.float64)
    mean = tl.zeros((), tl.float64)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < num_columns
        a, slope = _load(
            student_ptr, columns, mask, student_scale, student_softcap, student_bias_ptr,
            STUDENT_SCALED, STUDENT_CAPPED, STUDENT_BIASED,
        )  # fmt: skip
        b, _ = _load(
            teacher_ptr, columns, mask, teacher_scale, teacher_softcap, teacher_bias_ptr,
            TEACHER_SCALED, TEACHER_CAPPED, TEACHER_BIASED,
        )  # fmt: skip
        log_e, e_p, e_q, delta, student_excludes, teacher_excludes = _columns(
            a, b, student_max, teacher_max, inverse_temperature
        )
        p = e_p * inverse_p
        q = e_q * inverse_q
        if KIND == _REVERSE_KL:
            excluded = student_excludes | teacher_excludes
            floored = log_e + log_prob_offset
            u = tl.where(excluded, floored - log_ratio, delta) - centre
            delta = tl.where(excluded, tl.where(student_excludes, 0.0, floored), delta + log_ratio)
            is_near = (tl.abs(delta) < 0.5) & (excluded == 0)
            term = tl.where(is_near, p * _expm1_remainder(delta), p * delta - p + q)
            gradient = p * u
        else:
            delta = tl.where(student_excludes, -_EXCLUDED, delta + log_ratio)
            delta = tl.where(teacher_excludes, _EXCLUDED, delta)
            is_near = tl.abs(delta) < 0.5
            remainder = _expm1_remainder(delta)
            difference = tl.where(is_near, p * (delta - remainder), p - q)
            if KIND == _FORWARD_KL:
                far = tl.where(student_excludes & (q > 0), float("inf"), p - q - q * delta)
                term = tl.where(is_near, q * _expm1_remainder(-delta), far)
                gradient = difference
            elif KIND == _TVD:
                term = 0.5 * tl.abs(difference)
                gradient = p * tl.where(difference > 0, 0.5, tl.where(difference < 0, -0.5, 0.0))
            else:
                far_exp = tl.exp(-tl.abs(delta))
                mixture = student_part * p + teacher_part * q
                p_term, log_m_p, excess = _mixture_term(
                    p,
                    mixture,
                    delta,
                    remainder - delta,
                    far_exp,
                    is_near,
                    student_part,
                    teacher_part,
                )
                q_term, _, _ = _mixture_term(
                    q,
                    mixture,
                    -delta,
                    _expm1_remainder(-delta) + delta,
                    far_exp,
                    is_near,
                    teacher_part,
                    student_part,
                )
                term = student_term * p_term + teacher_term * q_term
                has_mass = mixture > 0
                share = tl.where(has_mass, difference / tl.where(has_mass, mixture, 1.0), 0.0)
                gradient = p * (phi_share * share - phi_log * log_m_p - phi_excess * excess)
        value += tl.sum(term, 0)
        if WRITE:
            if KIND >= _TVD:
                gradient = gradient - p * centre
            gradient = gradient * alpha
            if STUDENT_CAPPED:
                gradient = gradient * slope
            tl.store(gradient_ptr + columns, gradient.to(gradient_ptr.dtype.element_ty), mask=mask)
        else:
            mean += tl.sum(gradient, 0)
    tl.store(value_ptr + row, value.to(tl.float32))
    tl.store(mean_ptr + row, mean.to(tl.float32))


class TritonRows:
    NAME = "triton"
    # The decorator gives another type under TRITON_INTERPRET=1.
    DEVICES = ("cuda",) if isinstance(gradient_kernel, triton.JITFunction) else ("cuda", "cpu")

    def statistics(self, problem: RowProblem, student_Cv: Tensor, teacher_Cv: Tensor) -> Tensor:
        num_rows, num_columns = student_Cv.shape
        statistics_9C = torch.empty(len(Statistic), num_rows, device=student_Cv.device)
        statistics_kernel[(num_rows,)](
            student_Cv,
            teacher_Cv,
            statistics_9C,
            *_model_arguments(problem.student, problem.teacher, student_Cv, teacher_Cv),
            num_rows,
            num_columns,
            1 / problem.temperature,
            **_options(problem, num_columns),
        )
        return statistics_9C

    def merge(self, problem: RowProblem, statistics_R9C: Tensor, token_weight_C: Tensor) -> Tensor:
        num_ranks, _, num_rows = statistics_R9C.shape
        rows_9C = torch.empty(len(Row), num_rows, device=statistics_R9C.device)
        merge_kernel[(triton.cdiv(num_rows, _MERGE_ROWS),)](
            statistics_R9C.contiguous(),
            token_weight_C.float(),
            rows_9C,
            num_rows,
            1 / problem.temperature,
            problem.student.scale / problem.temperature,
            num_ranks,
            HAS_CENTRE=problem.kind == Kind.REVERSE_KL,
            BLOCK=_MERGE_ROWS,
        )
        return rows_9C

    def gradient(
        self,
        problem: RowProblem,
        student_Cv: Tensor,
        teacher_Cv: Tensor,
        rows_9C: Tensor,
        out_Cv: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        num_rows, num_columns = student_Cv.shape
        value_C, mean_C = torch.empty(2, num_rows, device=student_Cv.device)
        gradient_kernel[(num_rows,)](
            student_Cv,
            teacher_Cv,
            student_Cv if out_Cv is None else out_Cv,
            rows_9C,
            value_C,
            mean_C,
            *_model_arguments(problem.student, problem.teacher, student_Cv, teacher_Cv),
            student_Cv.stride(0) if out_Cv is None else out_Cv.stride(0),
            num_rows,
            num_columns,
            1 / problem.temperature,
            *problem.mixture,
            KIND=int(problem.kind),
            WRITE=out_Cv is not None,
            **_options(problem, num_columns),
        )
        return value_C, mean_C


def _model_arguments(
    student: LogitTransform, teacher: LogitTransform, student_Cv: Tensor, teacher_Cv: Tensor
) -> tuple[Tensor | float | int, ...]:
    """Strides, then scale, softcap and bias of each model; a tensor that is not read stands for no
    bias.
    """
    arguments: list[Tensor | float | int] = []
    for transform, logits_Cv in ((student, student_Cv), (teacher, teacher_Cv)):
        assert logits_Cv.stride(1) == 1
        bias = logits_Cv if transform.bias_v is None else transform.bias_v
        arguments += [logits_Cv.stride(0), transform.scale, transform.softcap or 1.0, bias]
    return tuple(arguments)


def _options(problem: RowProblem, num_columns: int) -> dict[str, object]:
    models = (problem.student, problem.teacher)
    is_plain = all(model == LogitTransform() for model in models)
    return {
        "STUDENT_SCALED": problem.student.scale != 1,
        "STUDENT_CAPPED": problem.student.softcap is not None,
        "STUDENT_BIASED": problem.student.bias_v is not None,
        "TEACHER_SCALED": problem.teacher.scale != 1,
        "TEACHER_CAPPED": problem.teacher.softcap is not None,
        "TEACHER_BIASED": problem.teacher.bias_v is not None,
        "BLOCK": min(MAX_BLOCK, triton.next_power_of_2(num_columns)),
        "num_warps": NUM_WARPS,
        # A product fused into the error-free difference would not be rounded by itself.
        "enable_fp_fusion": is_plain,
    }


KERNELS = TritonRows()
