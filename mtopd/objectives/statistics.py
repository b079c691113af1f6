"""The metrics that need both distributions, measured on a few tokens of each teacher.

At most STATISTICS_TOKENS tokens of each teacher on a dp rank, drawn by the step's seed: of the
teacher's runs in the step one is drawn by its number of rows, then tokens of it, so that every
token is equally likely.  The logits of the drawn ones are kept until they are compared, all
teachers' together: one exchange between tp ranks.  A mean over the drawn tokens counts with the
weight of all the teacher's tokens on this rank.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from mtopd.kernels import DistributionStatistics, distribution_statistics
from mtopd.types import TeacherRun

STATISTICS = DistributionStatistics._fields
STATISTICS_TOKENS = 64  # of each teacher in a train step on a dp rank
_STATISTICS_BATCH = 256  # tokens whose logits are held, of both models, until they are compared


class TokenStatistics:
    """The comparison of one train step."""

    def __init__(
        self,
        runs: Sequence[TeacherRun],
        *,
        seed: int,
        vocab_size: int,
        tp_group: dist.ProcessGroup | None,
    ) -> None:
        """``runs``: all that this rank has in the step."""
        self._vocab_size = vocab_size
        self._tp_group = tp_group
        self._drawn = draw(runs, seed)
        self._to_compare: list[tuple[TeacherRun, torch.Tensor, torch.Tensor]] = []
        self._sums: dict[str, torch.Tensor] = {}
        self.seconds = 0.0  # that the comparison took

    def rows(self, run: TeacherRun) -> list[int]:
        """The run's rows that are measured, counted from its first."""
        return self._drawn[run].rows if run in self._drawn else []

    @torch.no_grad()
    def keep(self, run: TeacherRun, student_Nv: torch.Tensor, teacher_Nv: torch.Tensor) -> None:
        """Take the logits of the run's measured rows."""
        self._to_compare.append((run, student_Nv, teacher_Nv))
        held = sum(len(logits_Nv) for _, logits_Nv, _ in self._to_compare)
        if held > _STATISTICS_BATCH - STATISTICS_TOKENS:
            self._compare()

    def sums(self) -> dict[str, torch.Tensor]:
        """``<statistic>/<teacher index>``: sums over the teachers' tokens as the measured ones give
        them; ``measured/<teacher index>``: how many those are.  Collective over tp.
        """
        if self._to_compare:
            self._compare()
        return self._sums

    @torch.no_grad()
    def _compare(self) -> None:
        runs, student, teacher = zip(*self._to_compare, strict=True)
        self._to_compare = []
        started = _now(student[0].device)
        found = distribution_statistics(
            torch.cat(student),
            torch.cat(teacher),
            vocab_size=self._vocab_size,
            tp_group=self._tp_group,
        )
        by_run = torch.stack(found).double().split([len(logits_Nv) for logits_Nv in student], 1)
        for run, values_6N in zip(runs, by_run, strict=True):
            sums = (values_6N.mean(1) * self._drawn[run].num_rows).unbind()
            names = (f"{name}/{run.teacher_index}" for name in STATISTICS)
            self._sums |= zip(names, sums, strict=True)
            self._sums[f"measured/{run.teacher_index}"] = torch.tensor(values_6N.shape[1])
        self.seconds += _now(student[0].device) - started


class Drawn(NamedTuple):
    """What is measured of a teacher."""

    rows: list[int]  # of the drawn run, counted from its first
    num_rows: int  # of all the teacher's runs


def draw(runs: Sequence[TeacherRun], seed: int) -> dict[TeacherRun, Drawn]:
    """A run of each teacher, and tokens of it.  The same on all tp ranks."""
    by_teacher: dict[int, list[TeacherRun]] = {}
    for run in runs:
        by_teacher.setdefault(run.teacher_index, []).append(run)
    generator, drawn = random.Random(seed), {}
    for _, candidates in sorted(by_teacher.items()):
        num_rows = [run.stop - run.start for run in candidates]
        (run,) = generator.choices(candidates, num_rows)
        drawn[run] = Drawn(_spread(run.stop - run.start, generator), sum(num_rows))
    return drawn


def _spread(num_rows: int, generator: random.Random) -> list[int]:
    """Rows at equal distances, from a random one on: each as likely as any other, of as many
    samples as can be.
    """
    count, offset = min(STATISTICS_TOKENS, num_rows), generator.randrange(num_rows)
    return [(number * num_rows + offset) // count for number in range(count)]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # once or twice in a train step
    return time.perf_counter()
