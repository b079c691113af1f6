"""What turns the student's hidden states into a loss.

An objective is made for one train step.  The trainer calls it once per micro-batch, on last-stage
ranks only; ``finish`` then gives a rank's part of the step's numbers, and what the trainer has
reduced is read by the objective again.  A train step names nothing of what an objective measures.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from mtopd.metrics_lines import DivergenceMetrics, HeadMetrics
from mtopd.objectives.cross_entropy import CrossEntropy
from mtopd.objectives.inputs import SampledTokens, TeacherFacts, TeacherRows
from mtopd.objectives.teacher_kl import TeacherKL
from mtopd.step_sums import LocalSums, StepSums
from mtopd.types import TrainStepPlan


class Objective(Protocol):
    """The loss of one train step against teachers."""

    def __call__(
        self, student_hidden_TD: torch.Tensor, output_weight_vD: torch.Tensor, micro_batch: Any
    ) -> torch.Tensor:
        """The micro-batch's loss, a plain sum over its T loss rows; 1/N is in their weights."""

    def finish(self) -> LocalSums:
        """This rank's numbers, after the last micro-batch; what the step held is let go."""

    def refuse_non_finite(self, sums: StepSums) -> None:
        """Raise NonFiniteGradients on every rank where the loss is NaN or inf."""

    def explain_non_finite(self) -> str:
        """Whose hidden states made a loss NaN or inf, in which samples.  Collective."""

    def metrics(self, sums: StepSums, plan: TrainStepPlan) -> DivergenceMetrics:
        """Its part of a train step's line."""

    def head_metrics(self, sums: StepSums) -> HeadMetrics:
        """What a step tells of heads, when it was refused, too."""


OBJECTIVES: dict[str, type[TeacherKL]] = {"reverse_kl": TeacherKL}

__all__ = [
    "OBJECTIVES",
    "CrossEntropy",
    "Objective",
    "SampledTokens",
    "TeacherFacts",
    "TeacherKL",
    "TeacherRows",
]
