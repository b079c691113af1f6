"""The checks of this folder fail for implementations that are wrong: each test breaks one thing and
expects red.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from divergence_cases import assert_as_good_as_dense, fused, make_case
from row_cases import check_levels, check_transforms
from torch import Tensor

from mtopd.kernels import chunks, divergence, rows, rows_cpu


def zero_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "_scaled", lambda gradient, *_: torch.zeros_like(gradient))


def zero_gradient_of_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        divergence, "add_gradient_times_hidden_", lambda total, *_, **__: total.zero_()
    )


def scaled_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    original = divergence._scaled
    monkeypatch.setattr(
        divergence, "_scaled", lambda gradient, *rest: original(gradient, *rest).mul_(1.00001)
    )


def with_teacher(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[chunks.Head], chunks.Head]
) -> None:
    original = chunks.Call.of
    monkeypatch.setattr(
        chunks.Call,
        "of",
        lambda *tensors, **options: replace_teacher(original(*tensors, **options), change),
    )


def replace_teacher(call: chunks.Call, change: Callable[[chunks.Head], chunks.Head]) -> chunks.Call:
    return replace(call, teacher=change(call.teacher))


def transposed_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher's head read as if its rows were columns."""
    with_teacher(
        monkeypatch,
        lambda head: chunks.Head(head.hidden_TX, head.weight_vX.T.reshape(head.weight_vX.shape)),
    )


def one_row_off(monkeypatch: pytest.MonkeyPatch) -> None:
    with_teacher(monkeypatch, lambda head: chunks.Head(head.hidden_TX.roll(1, 0), head.weight_vX))


def last_chunk_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    original = chunks.Call._chunks
    monkeypatch.setattr(
        chunks.Call, "_chunks", lambda call, logits: iter(list(original(call, logits))[:-1])
    )


def labels_one_row_off(monkeypatch: pytest.MonkeyPatch) -> None:
    original = divergence.Labels
    monkeypatch.setattr(divergence, "Labels", lambda call, label_T: original(call, label_T.roll(1)))


@pytest.mark.parametrize(
    "mutant",
    [
        zero_gradient,
        zero_gradient_of_the_head,
        scaled_gradient,
        transposed_head,
        one_row_off,
        last_chunk_forgotten,
        labels_one_row_off,
    ],
    ids=lambda mutant: mutant.__name__,
)
def test_whole_function(
    mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(distance=1.15)
    assert_as_good_as_dense(fused(case, workspace_bytes=200_000), case, 3e-6)
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        assert_as_good_as_dense(fused(case, workspace_bytes=200_000), case, 3e-6)


class BrokenRows:
    """The CPU kernels with one thing wrong."""

    NAME = "cpu"
    DEVICES = ("cpu",)

    def __init__(self, broken: str) -> None:
        self._broken = broken

    def statistics(
        self, problem: rows.RowProblem, student_Cv: Tensor, teacher_Cv: Tensor
    ) -> Tensor:
        statistics_9C = rows_cpu.KERNELS.statistics(problem, student_Cv, teacher_Cv)
        if self._broken == "difference of sums rounded":
            by_sums_C = (
                statistics_9C[rows.Statistic.TEACHER_SUM]
                - statistics_9C[rows.Statistic.STUDENT_SUM]
            )
            statistics_9C[rows.Statistic.SUM_DIFFERENCE] = by_sums_C
        return statistics_9C

    def merge(
        self, problem: rows.RowProblem, statistics_R9C: Tensor, token_weight_C: Tensor
    ) -> Tensor:
        if self._broken == "weight forgotten":
            token_weight_C = torch.ones_like(token_weight_C)
        rows_9C = rows.merge(problem, statistics_R9C, token_weight_C)
        if self._broken == "centre of another row":
            rows_9C[rows.Row.CENTRE] = rows_9C[rows.Row.CENTRE].roll(1)
        return rows_9C

    def gradient(
        self,
        problem: rows.RowProblem,
        student_Cv: Tensor,
        teacher_Cv: Tensor,
        rows_9C: Tensor,
        out_Cv: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        value_C, mean_C = rows_cpu.KERNELS.gradient(
            problem, student_Cv, teacher_Cv, rows_9C, out_Cv
        )
        if out_Cv is not None and self._broken == "zero gradient":
            out_Cv.zero_()
        if out_Cv is not None and self._broken == "scaled gradient":
            out_Cv.mul_(1.000003)
        return (value_C * 1.00002 if self._broken == "scaled value" else value_C), mean_C


@pytest.mark.parametrize(
    "broken",
    [
        "zero gradient",
        "scaled gradient",
        "scaled value",
        "weight forgotten",
        "centre of another row",
        "difference of sums rounded",
    ],
)
def test_row_kernels(broken: str) -> None:
    check_levels(BrokenRows(""), "cpu")
    with pytest.raises(AssertionError):
        check_levels(BrokenRows(broken), "cpu")


def test_transforms() -> None:
    class NoSlope(BrokenRows):
        """Takes the softcap's derivative for 1."""

        def gradient(self, problem: rows.RowProblem, *rest: Any) -> tuple[Tensor, Tensor]:
            return super().gradient(
                rows.RowProblem(**{**vars(problem), "student": rows.LogitTransform()}), *rest
            )

    with pytest.raises(AssertionError):
        check_transforms(NoSlope(""), "cpu")
