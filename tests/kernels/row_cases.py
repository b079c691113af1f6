"""Checks of one implementation of the row kernels, given the same float32 logits as the float64
oracle.

Legend: C rows, V all columns, v those of one (here simulated) rank.  `test_rows` runs them on the
implementations for CPU, `test_rows_triton` in a process of its own under Triton's interpreter, and on a
GPU where there is one.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from mtopd.kernels import reference
from mtopd.kernels.rows import (
    LOG_PROB_FLOOR,
    NO_BETA,
    Kind,
    LogitTransform,
    Row,
    RowKernels,
    RowProblem,
    mixture_of,
    no_columns,
)

INF = math.inf
DIVERGENCES: list[tuple[str, float | None]] = [
    *((name, None) for name in NO_BETA),
    *(
        (name, beta)
        for name in ("jsd", "skewed_reverse_kl", "skewed_forward_kl")
        for beta in (0.1, 0.5, 0.9)
    ),
]
SIX = [(name, beta) for name, beta in DIVERGENCES if beta in (None, 0.5)]
# Noise of the teacher's logits and the reverse KL that it makes, from 1 to 4e-7.
LEVELS = [(1.7, 1.0), (0.1, 4e-3), (0.01, 4e-5), (1e-3, 4e-7)]
GRADIENT_ERROR, VALUE_ERROR = 2e-6, 1e-5


class RowAnswer(NamedTuple):
    value_C: Tensor
    gradient_CV: Tensor  # of sum(weight * value) in the raw student logits
    entropy_C: Tensor


def problem(name: str, beta: float | None = None, **options: object) -> RowProblem:
    if beta is None:
        return RowProblem(kind=NO_BETA[name], **options)
    return RowProblem(kind=Kind.MIXTURE, mixture=mixture_of(name, beta), **options)


def logits_like_a_model(
    num_rows: int, num_columns: int, noise: float, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A bulk, twenty likely tokens in each row, and a teacher that differs by noise."""
    generator = torch.Generator().manual_seed(seed)
    student_CV = torch.randn(num_rows, num_columns, generator=generator) * 2.5
    likely = torch.stack(
        [torch.randperm(num_columns, generator=generator)[:20] for _ in range(num_rows)]
    )
    student_CV.scatter_(1, likely, 24 - 8 * torch.rand(num_rows, 20, generator=generator))
    return student_CV, student_CV + noise * torch.randn(num_rows, num_columns, generator=generator)


def run(
    kernels: RowKernels,
    problem: RowProblem,
    student_CV: Tensor,
    teacher_CV: Tensor,
    weight_C: Tensor | None = None,
    cuts: tuple[int, ...] = (),
) -> RowAnswer:
    """All steps of the seam; `cuts` split the columns over simulated ranks (equal cuts: a rank
    without columns).
    """
    weight_C = (
        torch.ones(student_CV.shape[0], dtype=student_CV.dtype) if weight_C is None else weight_C
    )
    weight_C = weight_C.to(student_CV.device)
    bounds = list(pairwise((0, *cuts, student_CV.shape[1])))
    shards = [(student_CV[:, a:b].clone(), teacher_CV[:, a:b].clone()) for a, b in bounds]
    problems = [_cut(problem, a, b) for a, b in bounds]
    live = [i for i, (a, b) in enumerate(bounds) if a < b]
    statistics = [
        kernels.statistics(problems[i], *shards[i])
        if i in live
        else no_columns(len(student_CV), student_CV)
        for i in range(len(bounds))
    ]
    rows_9C = kernels.merge(problem, torch.stack(statistics), weight_C)
    if problem.needs_centre:
        rows_9C[Row.CENTRE] = sum(
            kernels.gradient(problems[i], *shards[i], rows_9C, None)[1] for i in live
        )
    without = [kernels.gradient(problems[i], *shards[i], rows_9C, None)[0] for i in live]
    for i in live:
        torch.testing.assert_close(
            shards[i][0], student_CV[:, slice(*bounds[i])], rtol=0, atol=0, equal_nan=True
        )
    values = [kernels.gradient(problems[i], *shards[i], rows_9C, shards[i][0])[0] for i in live]
    torch.testing.assert_close(values, without, rtol=0, atol=0, equal_nan=True)
    return RowAnswer(
        sum(values), torch.cat([shard for shard, _ in shards], 1), rows_9C[Row.ENTROPY]
    )


def _cut(problem: RowProblem, start: int, stop: int) -> RowProblem:
    bias = problem.teacher.bias_v
    if bias is None:
        return problem
    teacher = LogitTransform(
        problem.teacher.scale, problem.teacher.softcap, bias[start:stop].contiguous()
    )
    return RowProblem(**{**vars(problem), "teacher": teacher})


def oracle(
    name: str,
    beta: float | None,
    student_CV: Tensor,
    teacher_CV: Tensor,
    weight_C: Tensor | None = None,
    problem: RowProblem | None = None,
) -> RowAnswer:
    """Float64 autograd of the reference on the same logits."""
    problem = RowProblem() if problem is None else problem
    weight_C = torch.ones(len(student_CV)) if weight_C is None else weight_C
    raw_CV = student_CV.detach().cpu().double().requires_grad_()
    logits_CV, other_CV = (
        _transform(raw_CV, problem.student),
        _transform(teacher_CV.cpu().double(), problem.teacher),
    )
    value_C = reference.divergence(name, logits_CV, other_CV, beta or 0.5, problem.temperature)
    (value_C * weight_C.double()).sum().backward()
    assert raw_CV.grad is not None
    log_p_CV = (logits_CV.detach() / problem.temperature).log_softmax(-1)
    # The seam's derivative is in h @ W.T times the scale.
    gradient_CV = raw_CV.grad * problem.student.scale
    return RowAnswer(
        value_C.detach(), gradient_CV / problem.student.scale, -(log_p_CV.exp() * log_p_CV).sum(-1)
    )


def _transform(raw_CV: Tensor, transform: LogitTransform) -> Tensor:
    logits_CV = raw_CV * transform.scale
    if transform.bias_v is not None:
        logits_CV = logits_CV + transform.bias_v.cpu().double()
    return (
        logits_CV
        if transform.softcap is None
        else transform.softcap * torch.tanh(logits_CV / transform.softcap)
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.cpu().double() - expected).norm() / expected.norm())


def assert_close(
    actual: RowAnswer,
    expected: RowAnswer,
    what: object = "",
    gradient_error: float = GRADIENT_ERROR,
) -> None:
    error = relative_error(actual.gradient_CV, expected.gradient_CV)
    assert error <= gradient_error, f"{what}: gradient off by {error:.1e}"
    errors_C = (actual.value_C.cpu().double() - expected.value_C).abs() / expected.value_C
    assert errors_C.max() <= VALUE_ERROR, f"{what}: value off by {errors_C.max():.1e}"
    assert bool((actual.value_C >= 0).all()), f"{what}: negative"
    error = relative_error(actual.entropy_C, expected.entropy_C)
    assert error <= 1e-6, f"{what}: entropy off by {error:.1e}"


# -- checks ----------------------------------------------------------------------------------------


def check_levels(
    kernels: RowKernels, device: str, num_rows: int = 2, num_columns: int = 5003
) -> None:
    """Every divergence from KL 1 to 4e-7, columns that fill no vector and no block."""
    weight_C = torch.rand(num_rows, generator=torch.Generator().manual_seed(1)) + 0.5
    for noise, level in LEVELS:
        student_CV, teacher_CV = logits_like_a_model(num_rows, num_columns, noise)
        kl = oracle("reverse_kl", None, student_CV, teacher_CV).value_C.mean()
        assert level / 4 < kl < level * 4, kl
        for name, beta in DIVERGENCES:
            actual = run(
                kernels, problem(name, beta), student_CV.to(device), teacher_CV.to(device), weight_C
            )
            assert_close(
                actual, oracle(name, beta, student_CV, teacher_CV, weight_C), (name, beta, level)
            )


def check_ranks(kernels: RowKernels, device: str) -> None:
    """Columns over ranks: uneven, one column, none at the end, none at the start."""
    for noise in (1.7, 1e-3):
        student_CV, teacher_CV = logits_like_a_model(2, 700, noise, seed=3)
        for cuts in ((1, 350), (0, 256, 700)):
            for name, beta in SIX:
                actual = run(
                    kernels,
                    problem(name, beta),
                    student_CV.to(device),
                    teacher_CV.to(device),
                    cuts=cuts,
                )
                assert_close(
                    actual, oracle(name, beta, student_CV, teacher_CV), (name, cuts, noise)
                )


def check_offsets(kernels: RowKernels, device: str) -> None:
    """Offsets common to a row, and ranks whose maxima are further apart than float32 exponentiates."""
    student_CV, teacher_CV = logits_like_a_model(2, 500, 0.5, seed=4)
    # Exact at 1e4.
    student_CV, teacher_CV = (z.mul(64).round().div(64) for z in (student_CV, teacher_CV))
    for offset in (1e3, 1e4, -1e4):
        for name, beta in SIX:
            shifted = ((student_CV + offset).to(device), (teacher_CV - offset).to(device))
            actual = run(kernels, problem(name, beta), *shifted, cuts=(200,))
            assert_close(actual, oracle(name, beta, student_CV, teacher_CV), (name, offset))
    # Differences of 2000 that float32 cannot hold, where those that count are of 0.01.
    near_CV, near_teacher_CV = logits_like_a_model(2, 500, 0.01, seed=14)
    near_CV, near_teacher_CV = near_CV + 1e3, near_teacher_CV - 1e3
    for name, beta in SIX:
        actual = run(
            kernels,
            problem(name, beta),
            near_CV.to(device),
            near_teacher_CV.to(device),
            cuts=(200,),
        )
        assert_close(actual, oracle(name, beta, near_CV, near_teacher_CV), (name, "near"))
    for student_offset, teacher_offset in ((200, 0), (0, 200), (200, 200), (150, -150)):
        student, teacher = student_CV.clone(), teacher_CV.clone()
        student[:, 250:] += student_offset
        teacher[:, 250:] += teacher_offset
        for name, beta in SIX:
            actual = run(
                kernels, problem(name, beta), student.to(device), teacher.to(device), cuts=(250,)
            )
            expected = oracle(name, beta, student, teacher)
            if expected.gradient_CV.norm() > 1e-6:  # differences of 300 in float32: an ulp is 3e-5
                assert_close(
                    actual, expected, (name, student_offset, teacher_offset), gradient_error=3e-5
                )
            else:  # p is a single token, or both are: nothing to learn
                assert actual.gradient_CV.norm() <= 1e-6


def check_transforms(kernels: RowKernels, device: str) -> None:
    generator = torch.Generator().manual_seed(5)
    for columns in (500, 512):
        bias_v = torch.randn(columns, generator=generator).to(device)
        student_CV, teacher_CV = logits_like_a_model(2, columns, 2.0, seed=6)
        for options in (
            {"temperature": 0.3},
            {"temperature": 2.5, "student": LogitTransform(0.5), "teacher": LogitTransform(1.5)},
            {"temperature": 1.0, "student": LogitTransform(softcap=15.0)},
            {"temperature": 1.0, "teacher": LogitTransform(1.0, 20.0, bias_v)},
            {
                "temperature": 1.3,
                "student": LogitTransform(1.2, 30.0),
                "teacher": LogitTransform(0.8, 9.0, bias_v),
            },
        ):
            for name, beta in SIX:
                this = problem(name, beta, **options)
                actual = run(
                    kernels, this, student_CV.to(device), teacher_CV.to(device), cuts=(128,)
                )
                expected = oracle(name, beta, student_CV, teacher_CV, problem=this)
                # Logits of 30 that a transform has rounded to float32 are off by an ulp of 2e-6.
                assert_close(actual, expected, (name, options["temperature"]), gradient_error=4e-6)
    # Near convergence a temperature may not cost digits: it divides differences, not logits.
    student_CV, teacher_CV = logits_like_a_model(3, 500, 1e-3, seed=7)
    for name, beta in SIX:
        this = problem(name, beta, temperature=0.7)
        actual = run(kernels, this, student_CV.to(device), teacher_CV.to(device))
        assert_close(
            actual, oracle(name, beta, student_CV, teacher_CV, problem=this), (name, "temperature")
        )


_GRAD = [-0.029946, -0.081402, 0.111348]
# Worked out in float64.
EXTREMES: dict[str, tuple[list[float], list[float], float, list[float]]] = {
    "plain": ([1, 2, 3], [1, 2, 2.5], 0.02914512, _GRAD),
    "shifted": ([1001, 1002, 1003], [-999, -998, -997.5], 0.02914512, _GRAD),
    "both-neginf": ([1, 2, 3, -INF], [1, 2, 2.5, -INF], 0.02914512, [*_GRAD, 0]),
    "student-neginf": ([1, 2, 3, -INF], [1, 2, 2.5, 0], 0.07303138, [*_GRAD, 0]),
    "p-0": ([0, 200, 1], [0, 1, 200], 199, [0, 0, 0]),
    "q-0": ([0, 1, 2], [0, 1, 200], 65.87469, [11.858622, 32.235073, -44.093697]),
    "identical-shifted": ([10001, 10002, 10003], [-9999, -9998, -9997], 0, [0, 0, 0]),
    # Excluded where the student has no float32 mass.
    "no-mass": ([0, 200, 1], [-INF, 200, 1], 0, [0, 0, 0]),
}


def check_extremes(kernels: RowKernels, device: str) -> None:
    """Reverse KL on known vectors, then every divergence where one side has no mass."""
    for name, (student, teacher, kl, gradient) in EXTREMES.items():
        actual = run(
            kernels,
            problem("reverse_kl"),
            *(torch.tensor([z], dtype=torch.float32).to(device) for z in (student, teacher)),
        )
        torch.testing.assert_close(float(actual.value_C), float(kl), rtol=2e-6, atol=1e-30)
        torch.testing.assert_close(
            actual.gradient_CV[0].cpu(),
            torch.tensor(gradient, dtype=torch.float32),
            rtol=1e-6,
            atol=1e-6,
        )
        if not any(gradient):
            assert bool((actual.gradient_CV == 0).all()), name
    student_CV, teacher_CV = logits_like_a_model(3, 300, 1.0, seed=8)
    for name, beta in SIX:
        for columns in (slice(5, 25), slice(100, 300)):
            excluded_student, excluded_teacher = student_CV.clone(), teacher_CV.clone()
            excluded_student[:, columns] = excluded_teacher[:, columns] = -INF
            pairs = [(excluded_student, excluded_teacher)]
            if name != "forward_kl":
                pairs.append((excluded_student, teacher_CV))
            if name != "reverse_kl":
                pairs.append((student_CV, excluded_teacher))
            for student, teacher in pairs:
                for cuts in ((), (100,)):
                    actual = run(
                        kernels,
                        problem(name, beta),
                        student.to(device),
                        teacher.to(device),
                        cuts=cuts,
                    )
                    # exp(-1e4) is 0 in float64 too, and the reference stays finite
                    expected = oracle(name, beta, student.clamp(min=-1e4), teacher.clamp(min=-1e4))
                    # A bounded divergence near its bound: phi is the same for nearly all of p's
                    # mass.
                    assert_close(actual, expected, (name, columns, cuts), gradient_error=1e-5)
    infinite = run(
        kernels, problem("forward_kl"), excluded_student.to(device), teacher_CV.to(device)
    )
    assert bool((infinite.value_C == INF).all()) and bool(infinite.gradient_CV.isfinite().all())


def check_floor(kernels: RowKernels, device: str) -> None:
    """Reverse KL where the teacher excludes a token: log q is the floor there; the mass is
    reported.
    """
    student_CV, teacher_CV = logits_like_a_model(3, 300, 1.0, seed=9)
    teacher_CV[:2, :150] = -INF
    raw_CV = student_CV.double().requires_grad_()
    log_p_CV, log_q_CV = raw_CV.log_softmax(-1), teacher_CV.double().log_softmax(-1)
    log_q_CV = log_q_CV.masked_fill(log_q_CV == -INF, LOG_PROB_FLOOR)
    value_C = (log_p_CV.exp() * (log_p_CV - log_q_CV)).sum(-1)
    value_C.sum().backward()
    expected = RowAnswer(
        value_C.detach(), raw_CV.grad, -(log_p_CV.exp() * log_p_CV).sum(-1).detach()
    )
    this = problem("reverse_kl")
    for cuts in ((), (60, 200), (150,)):
        assert_close(
            run(kernels, this, student_CV.to(device), teacher_CV.to(device), cuts=cuts),
            expected,
            cuts,
        )
    statistics_9C = kernels.statistics(this, student_CV.to(device), teacher_CV.to(device))
    rows_9C = kernels.merge(this, statistics_9C[None], torch.ones(3, device=device))
    mass_C = log_p_CV.exp()[:, :150].sum(-1).detach() * torch.tensor([1, 1, 0])
    torch.testing.assert_close(rows_9C[Row.EXCLUDED_MASS].cpu().double(), mass_C, rtol=1e-6, atol=0)


def check_identities(kernels: RowKernels, device: str) -> None:
    """Equal logits: 0 and no gradient at all.  The gradient of a row sums to 0.  NaN stays in its
    row.
    """
    student_CV, teacher_CV = logits_like_a_model(5, 700, 1.0, seed=10)
    for name, beta in DIVERGENCES:
        this = problem(name, beta)
        same = run(kernels, this, student_CV.to(device), student_CV.to(device), cuts=(256,))
        assert not same.value_C.any() and not same.gradient_CV.any(), name
        other = run(kernels, this, student_CV.to(device), teacher_CV.to(device), cuts=(256,))
        sums_C = other.gradient_CV.double().sum(1).abs()
        assert bool((sums_C <= 2e-6 * other.gradient_CV.double().abs().sum(1)).all()), (
            name,
            sums_C,
        )
        for which in range(2):
            damaged = [student_CV.clone(), teacher_CV.clone()]
            damaged[which][2, 17] = math.nan
            out = run(kernels, this, *(z.to(device) for z in damaged), cuts=(256,))
            assert out.value_C.isnan().tolist() == [False, False, True, False, False], (name, which)
            assert not out.gradient_CV[[0, 1, 3, 4]].isnan().any()
            # A sign hides what it is the sign of.
            assert name == "tvd" or bool(out.gradient_CV[2].isnan().any())


CHECKS = [
    check_levels,
    check_ranks,
    check_offsets,
    check_transforms,
    check_extremes,
    check_floor,
    check_identities,
]
