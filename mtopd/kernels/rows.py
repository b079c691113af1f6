"""Rows of logits: the divergences, their derivatives, what the ranks exchange, and the seam of the
row kernels.

Legend: C rows (tokens) of a chunk, v valid vocabulary columns of this rank (may be 0), V all of
them, R ranks.

With a, b the logits of student and teacher over the temperature, p and q their softmaxes, delta =
log p - log q:

    reverse_kl          KL(p || q)                            g_v = p_v (delta_v - E_p[delta])
    forward_kl          KL(q || p)                            g_v = p_v - q_v
    skewed_reverse_kl   KL(p || m), m = beta p + (1 - beta) q
    skewed_forward_kl   KL(q || m), m = beta q + (1 - beta) p
    jsd                 beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p
    tvd                 1/2 sum_v |p_v - q_v|

    g_v = dL / da_v = p_v (phi_v - E_p[phi]),  phi_v = dL / dp_v up to a constant common to the row
    tvd: phi = sign(p - q) / 2.  The others, with m = w_p p + w_q q and L = c_p KL(p || m) + c_q KL(q || m):
    phi = -c_p log(m / p) - w_p (c_p p + c_q q) / m, written per divergence so that it does not cancel (`Mixture`)

A row is worked on in three steps: `statistics` of this rank's columns; `merge` of all ranks'
statistics into the few numbers of a row that hold for the whole vocabulary; `gradient`.  The centre
E_p[phi] of reverse_kl is among the statistics and forward_kl needs none; for the others `gradient`
runs once more before, without writing, to find it.

What keeps float32 exact where student and teacher are close (all three implementations do the
same):
* Exponents are taken relative to the row maxima.  Delta = (a - max a) - (b - max b) is formed from
  a - b with its rounding error carried along, so neither common offsets nor the distance of a
  column to the maximum cost digits.
* log p - log q = Delta + log_ratio.  log_ratio comes from sum(e_q - e_p), summed as e_p
  expm1(-Delta): its error is relative to Delta, not to 1.  The same form gives p - q.
* Values are sums of Bregman terms (q - p + p delta for reverse_kl), each >= 0, each from a series
  where it cancels.
* p and E_p come from the same exponentials, so the gradient of a row sums to zero.

What has no mass: columns >= vocab_size never reach the row kernels.  Student logits of -inf add q to the value
and nothing to the gradient.  Where the teacher's logit is -inf and the student's is not, log q is
LOG_PROB_FLOOR for reverse_kl (callers that want an error look at EXCLUDED_MASS); the other
divergences are finite there.  NaN logits give a NaN value. Formulas: Kullback-Leibler and
Jensen-Shannon as in Agarwal et al. (arXiv:2306.13649), skewed as in Ko et al. (arXiv:2402.03898),
tvd as in Wen et al. (arXiv:2307.15190).
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

LOG_PROB_FLOOR = math.log(torch.finfo(torch.float32).tiny)  # -87.3: q of it is 0 beside anything


class Kind(IntEnum):
    """How the gradient is made; the numbers are known to rows_cpu.cpp and rows_triton.py."""

    REVERSE_KL = 0
    FORWARD_KL = 1
    TVD = 2
    MIXTURE = 3


class Statistic(IntEnum):
    """Rows of `statistics`, [9, C]; sums and means over this rank's columns with e = exp(logit -
    max logit).
    """

    STUDENT_MAX = 0  # before the temperature; -inf on a rank without columns
    STUDENT_SUM = 1  # sum e_p
    MEAN_DELTA = 2  # sum e_p Delta / sum e_p
    MEAN_STUDENT = 3  # sum e_p log e_p / sum e_p
    TEACHER_MAX = 4
    TEACHER_SUM = 5  # sum e_q
    SUM_DIFFERENCE = 6  # sum e_q - sum e_p, exact where they are close
    EXCLUDED_MASS = 7  # sum e_p where the teacher's logit is -inf
    EXCLUDED_MEAN = 8  # the part of MEAN_STUDENT in those columns


class Row(IntEnum):
    """Rows of `merge`, [9, C]: what `gradient` needs to know of a row, then what callers ask for."""

    STUDENT_MAX = 0
    TEACHER_MAX = 1
    STUDENT_INVERSE_SUM = 2  # p = e_p * it
    TEACHER_INVERSE_SUM = 3
    LOG_RATIO = 4  # log p - log q = Delta + it
    CENTRE = 5  # E_p[Delta] for reverse_kl, E_p[phi] for tvd and mixtures, unused for forward_kl
    ALPHA = 6  # token_weight * student logit scale / temperature
    ENTROPY = 7  # -E_p[log p] in nats
    EXCLUDED_MASS = 8  # E_p[1 where the teacher's logit is -inf]


class Mixture(NamedTuple):
    """L = c_p KL(p || m) + c_q KL(q || m) with m = w_p p + w_q q.

    phi = -phi_log log(m / p) - phi_excess (log(m / p) - (m - p) / m) + phi_share (p - q) / m
    """

    student_part: float = 0.0  # w_p
    teacher_part: float = 1.0  # w_q
    student_term: float = 1.0  # c_p
    teacher_term: float = 0.0  # c_q
    phi_log: float = 1.0
    phi_excess: float = 0.0
    phi_share: float = 0.0


REVERSE_KL_AS_MIXTURE = Mixture()
NO_BETA = {"reverse_kl": Kind.REVERSE_KL, "forward_kl": Kind.FORWARD_KL, "tvd": Kind.TVD}
DIVERGENCES = (*NO_BETA, "jsd", "skewed_reverse_kl", "skewed_forward_kl")


def mixture_of(divergence: str, beta: float) -> Mixture:
    """The mixture form of a divergence that takes a beta."""
    return {
        "jsd": Mixture(1 - beta, beta, 1 - beta, beta, phi_log=1 - beta),
        "skewed_reverse_kl": Mixture(beta, 1 - beta, 1, 0, phi_log=1 - beta, phi_excess=beta),
        "skewed_forward_kl": Mixture(1 - beta, beta, 0, 1, phi_log=0, phi_share=(1 - beta) ** 2),
    }[divergence]


@dataclass(frozen=True)
class LogitTransform:
    """z = softcap * tanh((scale * raw + bias) / softcap), of raw = hidden @ weight.T."""

    scale: float = 1.0
    softcap: float | None = None
    bias_v: Tensor | None = None  # float32 or the compute dtype, cut to the valid columns


@dataclass(frozen=True)
class RowProblem:
    """What all rows of a call have in common."""

    kind: Kind = Kind.REVERSE_KL
    mixture: Mixture = REVERSE_KL_AS_MIXTURE  # read for Kind.MIXTURE only
    temperature: float = 1.0
    student: LogitTransform = LogitTransform()
    teacher: LogitTransform = LogitTransform()
    # Plain torch works on as many rows at a time as fit in it; the others need none.
    scratch_bytes: int = 16 << 20

    @property
    def needs_centre(self) -> bool:
        return self.kind in (Kind.TVD, Kind.MIXTURE)


class RowKernels(Protocol):
    """One implementation; the arguments are raw products, float32 (plain torch: float64 too)."""

    NAME: str
    DEVICES: tuple[str, ...]  # types of devices it works on; empty: any

    def statistics(self, problem: RowProblem, student_Cv: Tensor, teacher_Cv: Tensor) -> Tensor:
        """[9, C] in the order of `Statistic`; v > 0."""

    def merge(self, problem: RowProblem, statistics_R9C: Tensor, token_weight_C: Tensor) -> Tensor:
        """[9, C] in the order of `Row`: a pure function of its arguments, so alike on every rank."""

    def gradient(
        self,
        problem: RowProblem,
        student_Cv: Tensor,
        teacher_Cv: Tensor,
        rows_9C: Tensor,
        out_Cv: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """This rank's part of the value [C]; alpha * dL / d(raw student logit) goes to `out_Cv`
        (may be student_Cv).

        Without `out_Cv` nothing is written; the second result is this rank's part of E_p[phi], [C],
        for the kinds that need it (`rows_9C[CENTRE]` must be 0 then).
        """


def no_columns(num_rows: int, like: Tensor) -> Tensor:
    """The statistics of a rank whose shard is padding only."""
    statistics_9C = like.new_zeros(len(Statistic), num_rows)
    statistics_9C[[Statistic.STUDENT_MAX, Statistic.TEACHER_MAX]] = -math.inf
    return statistics_9C


def merge(problem: RowProblem, statistics_R9C: Tensor, token_weight_C: Tensor) -> Tensor:
    """See `RowKernels.merge`; in float64, ranks in order."""
    by_name = dict(zip(Statistic, statistics_R9C.double().unbind(1), strict=True))
    student_max_RC, teacher_max_RC = by_name[Statistic.STUDENT_MAX], by_name[Statistic.TEACHER_MAX]
    student_sum_RC, teacher_sum_RC = by_name[Statistic.STUDENT_SUM], by_name[Statistic.TEACHER_SUM]
    # From one rank's frame to the frame of the whole row.  A rank without mass has a shift of
    # -inf and sums of 0.
    student_max_C, teacher_max_C = student_max_RC.amax(0), teacher_max_RC.amax(0)
    student_shift_RC = (student_max_RC - student_max_C) / problem.temperature
    teacher_shift_RC = (teacher_max_RC - teacher_max_C) / problem.temperature
    frame_RC = _zero_unless_finite(student_shift_RC - teacher_shift_RC)
    student_shift_RC, teacher_shift_RC = _no_nan(student_shift_RC), _no_nan(teacher_shift_RC)
    student_factor_RC, teacher_factor_RC = student_shift_RC.exp(), teacher_shift_RC.exp()
    mass_RC = student_sum_RC * student_factor_RC
    mass_C, teacher_mass_C = mass_RC.sum(0), (teacher_sum_RC * teacher_factor_RC).sum(0)
    # sum e_q - sum e_p: one rank's difference moves with its teacher's frame, its student sum
    # with the distance of the two frames.
    difference_C = (
        by_name[Statistic.SUM_DIFFERENCE] * teacher_factor_RC
        + student_sum_RC * (teacher_factor_RC - student_factor_RC)
    ).sum(0)
    relative_C = difference_C / mass_C
    log_ratio_C = torch.where(
        relative_C.abs() < 0.5, torch.log1p(relative_C), teacher_mass_C.log() - mass_C.log()
    )
    excluded_C = (by_name[Statistic.EXCLUDED_MASS] * student_factor_RC).sum(0) / mass_C
    finite_shift_RC = _zero_unless_finite(student_shift_RC)
    log_mass_C = mass_C.log()
    mean_student_C = (mass_RC * (by_name[Statistic.MEAN_STUDENT] + finite_shift_RC)).sum(0) / mass_C
    mean_delta_C = (mass_RC * by_name[Statistic.MEAN_DELTA]).sum(0)
    mean_delta_C = (
        mean_delta_C + (_included(by_name) * student_factor_RC * frame_RC).sum(0)
    ) / mass_C
    # Columns that the teacher excludes: log q = LOG_PROB_FLOOR there.
    excluded_mean_C = (
        mass_RC * by_name[Statistic.EXCLUDED_MEAN]
        + by_name[Statistic.EXCLUDED_MASS] * student_factor_RC * finite_shift_RC
    ).sum(0) / mass_C
    mean_delta_C = mean_delta_C + torch.where(
        excluded_C > 0,
        excluded_mean_C - excluded_C * (log_mass_C + LOG_PROB_FLOOR + log_ratio_C),
        0,
    )
    rows = {
        Row.STUDENT_MAX: student_max_C,
        Row.TEACHER_MAX: teacher_max_C,
        Row.STUDENT_INVERSE_SUM: 1 / mass_C,
        Row.TEACHER_INVERSE_SUM: 1 / teacher_mass_C,
        Row.LOG_RATIO: log_ratio_C,
        Row.CENTRE: mean_delta_C
        if problem.kind == Kind.REVERSE_KL
        else torch.zeros_like(mean_delta_C),
        Row.ALPHA: token_weight_C.double() * (problem.student.scale / problem.temperature),
        Row.ENTROPY: log_mass_C - mean_student_C,
        Row.EXCLUDED_MASS: excluded_C,
    }
    return torch.stack([rows[name] for name in Row]).to(statistics_R9C.dtype)


def _included(by_name: dict[Statistic, Tensor]) -> Tensor:
    """sum e_p over the columns that the teacher does not exclude, [R, C]."""
    return by_name[Statistic.STUDENT_SUM] - by_name[Statistic.EXCLUDED_MASS]


def _zero_unless_finite(shift_RC: Tensor) -> Tensor:
    return torch.where(shift_RC.isfinite(), shift_RC, 0)


def _no_nan(shift_RC: Tensor) -> Tensor:
    """A row that is -inf on every rank: -inf - -inf."""
    return shift_RC.nan_to_num(nan=-math.inf, neginf=-math.inf)


@functools.cache
def select_row_kernels(backend: str, device_type: str, dtype: torch.dtype) -> RowKernels:
    """The implementation for a backend name; "auto" chooses and logs once what and why.

    Raises ValueError where a named backend cannot work on these tensors or cannot be had on this
    machine.
    """
    if backend == "auto":
        return _choose(device_type, dtype)
    if backend != "torch" and dtype != torch.float32:
        raise ValueError(
            f"backend={backend!r} computes in float32, but an input is {dtype}; use backend='torch'"
        )
    kernels = _load(backend)
    if kernels.DEVICES and device_type not in kernels.DEVICES:
        where = " or ".join(kernels.DEVICES)
        raise ValueError(
            f"backend={backend!r} works on {where}, but the tensors are on {device_type}; use "
            "'auto'"
        )
    return kernels


def _choose(device_type: str, dtype: torch.dtype) -> RowKernels:
    name, why = (
        {"cuda": "triton", "cpu": "cpu"}.get(device_type, "torch"),
        f"the tensors are on {device_type}",
    )
    if dtype != torch.float32:
        name, why = "torch", f"the inputs are {dtype} and the compiled kernels compute in float32"
    try:
        kernels = _load(name)
    except ValueError as refusal:
        logger.warning("divergence row kernels: plain torch, which is slow, because %s", refusal)
        return _load("torch")
    logger.info("divergence row kernels: %s, because %s", name, why)
    return kernels


def _load(name: str) -> RowKernels:
    """Import the module that chose this name; its import raises ValueError saying what to install."""
    kernels: RowKernels = importlib.import_module(f"mtopd.kernels.rows_{name}").KERNELS
    return kernels
