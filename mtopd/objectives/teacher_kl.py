"""Full-vocabulary reverse KL to each token's own teacher: DeepSeek-V4 report (arXiv:2606.19348),
eq. (29).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from mtopd.kernels import (
    DistributionStatistics,
    distribution_statistics,
    fused_linear_divergence,
    output_logits,
)

STATISTICS = DistributionStatistics._fields
STATISTICS_TOKENS = 64  # of each teacher in a train step on a dp rank
_STATISTICS_BATCH = 256  # tokens whose logits are held, of both models, until they are compared
_SUMS = ("loss", "kl_sum", "tokens", "non_finite")  # over a teacher's tokens


class Head(Protocol):
    """A teacher's output layer on this rank: the same vocabulary rows as the student's shard."""

    @property
    def weight_vE(self) -> torch.Tensor: ...
    @property
    def scale(self) -> float: ...
    @property
    def softcap(self) -> float | None: ...


@dataclass(frozen=True, eq=False)
class TeacherRun:
    """Consecutive loss rows of a micro-batch that belong to one teacher.  ``entries``: their
    samples, in order.
    """

    teacher_index: int
    start: int
    stop: int
    entries: Sequence[Any]


class TeacherKL:
    """objective(student_hidden_TD, output_weight_vD, micro_batch): sum over rows of weight x
    KL(student || teacher).

    One object for one train step.  ``micro_batch.payload`` is a list of TeacherRun in teacher
    order; the divergence is called once per run, with the one resident head.
    ``hidden_states(run)`` fetches [T, E] of a run.  Runs on last-stage ranks only.  The gradient of
    ``output_weight_vD``, a parameter under Megatron's DDP, is added to its ``main_grad`` in
    forward, in float32.

    The metrics that need both distributions are measured on at most STATISTICS_TOKENS tokens of
    each teacher, drawn by ``seed``: of ``runs``, all that this rank has in the step, one is drawn
    by its number of rows, then tokens of it, so that every token is equally likely.  A call keeps
    the logits of the drawn ones; ``statistics``, after the last call, compares them and adds them
    up with the weight of all the teacher's tokens on this rank.  ``statistics_s`` is the time that
    the comparison took.
    """

    def __init__(
        self,
        *,
        num_teachers: int,
        head: Callable[[int], AbstractContextManager[Head]],
        hidden_states: Callable[[TeacherRun], torch.Tensor],
        vocab_size: int,
        tp_group: dist.ProcessGroup | None,
        runs: Sequence[TeacherRun],
        seed: int,
    ) -> None:
        self._num_teachers, self._head, self._hidden_states = num_teachers, head, hidden_states
        self._vocab_size, self._tp_group = vocab_size, tp_group
        self._drawn = _draw(runs, seed)
        self._to_compare: list[tuple[TeacherRun, torch.Tensor, torch.Tensor]] = []
        self._statistics: dict[str, torch.Tensor] = {}
        self._per_token: list[tuple[TeacherRun, torch.Tensor]] = []
        self.statistics_s = 0.0

    @staticmethod
    def metric_names(num_teachers: int) -> list[str]:
        """Names of the sums that calls and ``statistics`` return, alike on all ranks."""
        return [
            *_names(num_teachers, _SUMS),
            *_names(num_teachers, ("measured", *STATISTICS)),
            "entropy",
        ]

    def __call__(
        self, student_hidden_TD: torch.Tensor, output_weight_vD: Any, micro_batch: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        # A micro-batch without rows must still reach backward on every stage.
        loss = student_hidden_TD[:0].sum().float()
        zero = torch.zeros((), dtype=torch.float64, device=loss.device)
        metrics = dict.fromkeys([*_names(self._num_teachers, _SUMS), "entropy"], zero)

        def add(name: str, value: torch.Tensor) -> None:
            metrics[name] = metrics[name] + value.double()

        for run in micro_batch.payload:
            with self._head(run.teacher_index) as head:
                rows = slice(run.start, run.stop)
                student_hidden_RD, teacher_hidden_RE = (
                    student_hidden_TD[rows],
                    self._hidden_states(run),
                )
                token_weight_R = micro_batch.token_weight_T[rows]
                out = fused_linear_divergence(
                    student_hidden_RD,
                    output_weight_vD,
                    teacher_hidden_RE,
                    head.weight_vE,
                    token_weight=token_weight_R,
                    vocab_size=self._vocab_size,
                    tp_group=self._tp_group,
                    teacher_logit_scale=head.scale,
                    teacher_softcap=head.softcap,
                    weight_grad_accumulator=output_weight_vD.main_grad,
                )
                loss = loss + out.loss
                add(
                    f"loss/{run.teacher_index}",
                    (out.per_token.double() * token_weight_R.double()).sum(),
                )
                add(f"non_finite/{run.teacher_index}", (~out.per_token.isfinite()).sum())
                self._per_token.append((run, out.per_token))
                add("entropy", out.entropy.double().sum())
                add(f"kl_sum/{run.teacher_index}", out.per_token.double().sum())
                add(f"tokens/{run.teacher_index}", torch.tensor(run.stop - run.start))
                if run in self._drawn:
                    self._keep_logits(
                        run, student_hidden_RD, output_weight_vD, teacher_hidden_RE, head
                    )
            del head  # the slot alone may hold it when the next teacher's is asked for
        return loss, metrics

    def non_finite(self) -> list[tuple[TeacherRun, list[int]]]:
        """Runs in which a token's divergence is NaN or inf, with those rows counted from the run's
        first.
        """
        found = [
            (run, (~values.isfinite()).nonzero()[:, 0].tolist()) for run, values in self._per_token
        ]
        return [(run, rows) for run, rows in found if rows]

    def statistics(self) -> dict[str, torch.Tensor]:
        """Sums over the teachers' tokens as the measured ones give them, and how many those are;
        collective over tp.
        """
        if self._to_compare:
            self._compare()
        zero = torch.zeros((), dtype=torch.float64)
        return (
            dict.fromkeys(_names(self._num_teachers, ("measured", *STATISTICS)), zero)
            | self._statistics
        )

    @torch.no_grad()
    def _keep_logits(
        self,
        run: TeacherRun,
        student_hidden_RD: torch.Tensor,
        output_weight_vD: Any,
        teacher_hidden_RE: torch.Tensor,
        head: Head,
    ) -> None:
        rows_N = torch.tensor(self._drawn[run].rows, device=teacher_hidden_RE.device)
        student_Nv = output_logits(student_hidden_RD[rows_N], output_weight_vD)
        teacher_Nv = output_logits(
            teacher_hidden_RE[rows_N], head.weight_vE, logit_scale=head.scale, softcap=head.softcap
        )
        self._to_compare.append((run, student_Nv, teacher_Nv))
        if (
            sum(len(logits_Nv) for _, logits_Nv, _ in self._to_compare)
            > _STATISTICS_BATCH - STATISTICS_TOKENS
        ):
            self._compare()

    def _compare(self) -> None:
        """Take what was kept into the sums.  Of all teachers at once: one exchange between tp
        ranks.
        """
        runs, student, teacher = zip(*self._to_compare, strict=True)
        self._to_compare = []
        started = _now(student[0].device)
        found = distribution_statistics(
            torch.cat(student),
            torch.cat(teacher),
            vocab_size=self._vocab_size,
            tp_group=self._tp_group,
        )
        of_runs = torch.stack(found).double().split([len(logits_Nv) for logits_Nv in student], 1)
        for run, values_6N in zip(runs, of_runs, strict=True):
            sums = (values_6N.mean(1) * self._drawn[run].num_rows).unbind()
            self._statistics |= zip(
                (f"{name}/{run.teacher_index}" for name in STATISTICS), sums, strict=True
            )
            self._statistics[f"measured/{run.teacher_index}"] = torch.tensor(values_6N.shape[1])
        self.statistics_s += _now(student[0].device) - started


def _names(num_teachers: int, names: Sequence[str]) -> list[str]:
    return [f"{name}/{teacher}" for teacher in range(num_teachers) for name in names]


class _Drawn(NamedTuple):
    rows: list[int]  # to be measured, counted from the run's first
    num_rows: int  # of all the teacher's runs


def _draw(runs: Sequence[TeacherRun], seed: int) -> dict[TeacherRun, _Drawn]:
    """A run of each teacher, and tokens of it.  Alike on all tp ranks."""
    of_teacher: dict[int, list[TeacherRun]] = {}
    for run in runs:
        of_teacher.setdefault(run.teacher_index, []).append(run)
    draw, drawn = random.Random(seed), {}
    for _, candidates in sorted(of_teacher.items()):
        num_rows = [run.stop - run.start for run in candidates]
        (run,) = draw.choices(candidates, num_rows)
        drawn[run] = _Drawn(_spread(run.stop - run.start, draw), sum(num_rows))
    return drawn


def _spread(num_rows: int, draw: random.Random) -> list[int]:
    """Rows at equal distances, from a random one on: each as likely as any other, of as many
    samples as can be.
    """
    count, offset = min(STATISTICS_TOKENS, num_rows), draw.randrange(num_rows)
    return [(number * num_rows + offset) // count for number in range(count)]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # once or twice in a train step
    return time.perf_counter()
