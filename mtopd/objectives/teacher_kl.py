"""Full-vocabulary reverse KL to each token's own teacher: DeepSeek-V4 report (arXiv:2606.19348), eq. (29)."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from mtopd.kernels import DistributionStatistics, distribution_statistics, fused_linear_divergence

STATISTICS = DistributionStatistics._fields[1:]
STATISTICS_TOKENS = 64  # of each teacher in a train step on a dp rank


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
    """Consecutive loss rows of a micro-batch that belong to one teacher.  ``entries``: their samples, in order."""

    teacher_index: int
    start: int
    stop: int
    entries: Sequence[Any]


class TeacherKL:
    """objective(student_hidden_TD, output_weight_vD, micro_batch): sum over rows of weight x KL(student || teacher).

    One object for one train step.  ``micro_batch.payload`` is a list of TeacherRun in teacher order; the divergence is
    called once per run, with the one resident head.  ``hidden_states(run)`` fetches [T, E] of a run.  Runs on
    last-stage ranks only.  The gradient of ``output_weight_vD``, a parameter under Megatron's DDP, is added to its
    ``main_grad`` in forward, in float32.

    The metrics that need both distributions are measured on at most STATISTICS_TOKENS tokens of each teacher, drawn by
    ``seed``: of ``runs``, all that this rank has in the step, one is drawn by its number of rows, then tokens of it, so
    that every token is equally likely.  They are added up with the weight of all the teacher's tokens on this rank.
    ``statistics_s`` is the time that took.
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
        self._vocab_size, self._tp_group, self._seed = vocab_size, tp_group, seed
        self._rows_of_measured = _draw_runs(runs, seed)
        self._per_token: list[tuple[TeacherRun, torch.Tensor]] = []
        self.statistics_s = 0.0

    @staticmethod
    def metric_names(num_teachers: int) -> list[str]:
        """Names of the sums that a call returns, alike on all ranks."""
        of_a_teacher = ("loss", "kl_sum", "tokens", "non_finite", "measured", *STATISTICS)
        return ["entropy", *(f"{name}/{i}" for i in range(num_teachers) for name in of_a_teacher)]

    def __call__(
        self, student_hidden_TD: torch.Tensor, output_weight_vD: Any, micro_batch: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        # A micro-batch without rows must still reach backward on every stage.
        loss = student_hidden_TD[:0].sum().float()
        metrics = dict.fromkeys(
            self.metric_names(self._num_teachers), torch.zeros((), dtype=torch.float64, device=loss.device)
        )

        def add(name: str, value: torch.Tensor) -> None:
            metrics[name] = metrics[name] + value.double()

        for run in micro_batch.payload:
            with self._head(run.teacher_index) as head:
                rows = slice(run.start, run.stop)
                token_weight_T = micro_batch.token_weight_T[rows]
                tensors = (student_hidden_TD[rows], output_weight_vD, self._hidden_states(run), head.weight_vE)
                options: dict[str, Any] = {
                    "token_weight": token_weight_T,
                    "vocab_size": self._vocab_size,
                    "tp_group": self._tp_group,
                    "teacher_logit_scale": head.scale,
                    "teacher_softcap": head.softcap,
                }
                out = fused_linear_divergence(*tensors, **options, weight_grad_accumulator=output_weight_vD.main_grad)
                loss = loss + out.loss
                add(f"loss/{run.teacher_index}", (out.per_token.double() * token_weight_T.double()).sum())
                add(f"non_finite/{run.teacher_index}", (~out.per_token.isfinite()).sum())
                self._per_token.append((run, out.per_token))
                add("entropy", out.entropy.double().sum())
                add(f"kl_sum/{run.teacher_index}", out.per_token.double().sum())
                add(f"tokens/{run.teacher_index}", torch.tensor(run.stop - run.start))
                if run in self._rows_of_measured:
                    num_rows = self._rows_of_measured[run]
                    for name, value in self._statistics(tensors, options, num_rows).items():
                        add(f"{name}/{run.teacher_index}", value)
            del head, tensors  # the slot alone may hold it when the next teacher's is asked for
        return loss, metrics

    def non_finite(self) -> list[tuple[TeacherRun, list[int]]]:
        """Runs in which a token's divergence is NaN or inf, with those rows counted from the run's first."""
        found = [(run, (~values.isfinite()).nonzero()[:, 0].tolist()) for run, values in self._per_token]
        return [(run, rows) for run, rows in found if rows]

    def _statistics(
        self, tensors: tuple[torch.Tensor, ...], options: dict[str, Any], num_rows: int
    ) -> dict[str, torch.Tensor]:
        """Means over the measured tokens, times ``num_rows``; and how many were measured."""
        started = _now(tensors[0].device)
        found = distribution_statistics(*tensors, **options, num_tokens=STATISTICS_TOKENS, seed=self._seed)
        sums = {name: getattr(found, name).double().mean() * num_rows for name in STATISTICS}
        self.statistics_s += _now(tensors[0].device) - started
        return {"measured": torch.tensor(len(found.rows)), **sums}


def _draw_runs(runs: Sequence[TeacherRun], seed: int) -> dict[TeacherRun, int]:
    """A run of each teacher, and the rows that all runs of the teacher have.  Alike on all tp ranks."""
    of_teacher: dict[int, list[TeacherRun]] = {}
    for run in runs:
        of_teacher.setdefault(run.teacher_index, []).append(run)
    draw, drawn = random.Random(seed), {}
    for _, candidates in sorted(of_teacher.items()):
        rows = [run.stop - run.start for run in candidates]
        drawn[draw.choices(candidates, rows)[0]] = sum(rows)
    return drawn


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # once for each teacher and train step
    return time.perf_counter()
