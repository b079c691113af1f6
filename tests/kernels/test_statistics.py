"""Metrics of both distributions against their dense definitions; tp in divergence_ranks."""

import math
from typing import Any

import pytest
import torch
from divergence_cases import Case, dense_logits, make_case
from torch import Tensor

from mtopd.kernels import DistributionStatistics, distribution_statistics, output_logits, statistics


def measure(case: Case, **options: Any) -> DistributionStatistics:
    found = case.options
    student = output_logits(
        case.student_hidden_TD,
        case.student_weight_VD,
        logit_scale=found.get("student_logit_scale", 1.0),
        softcap=found.get("student_softcap"),
    )
    teacher = output_logits(
        case.teacher_hidden_TE, case.teacher_weight_VE, bias=found.get("teacher_bias")
    )
    shared = {name: found[name] for name in ("temperature", "vocab_size") if name in found}
    return distribution_statistics(student, teacher, **shared, **options)


def expected(case: Case, k: int) -> list[Tensor]:
    student_TV, teacher_TV = dense_logits(case.to(torch.float64))
    log_p, log_q = (z.log_softmax(-1) for z in (student_TV, teacher_TV))
    p, q = log_p.exp(), log_q.exp()
    top_p, top_q = (
        torch.zeros_like(z, dtype=torch.bool).scatter_(1, z.topk(k).indices, True) for z in (p, q)
    )
    shared = top_p & top_q
    return [
        -(p * log_p).sum(-1),
        -(q * log_q).sum(-1),
        (q * (log_q - log_p)).sum(-1),
        shared.sum(-1) / k,
        (p * shared).sum(-1),
        (q * shared).sum(-1),
    ]


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("k", [1, 16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.7, "student_logit_scale": -1.2, "student_softcap": 4.0},
        {
            "vocab_size": 981,
            "teacher_bias": torch.randn(1003, generator=torch.Generator().manual_seed(1)) * 3,
        },
    ],
    ids=["plain", "student", "teacher"],
)
def test_against_the_definitions(options: dict[str, Any], k: int, backend: str) -> None:
    case = make_case(distance=1.5, **options)
    actual = measure(case, k=k, backend=backend)
    for name, value, oracle in zip(actual._fields, actual, expected(case, k), strict=True):
        torch.testing.assert_close(value.double(), oracle.double(), rtol=2e-5, atol=2e-7, msg=name)
    assert options.get("student_logit_scale", 1) < 0 or 0 < actual.overlap_ratio.mean() < 1


def test_forward_kl_of_close_distributions() -> None:
    """It is put together from two sums that nearly cancel there."""
    for distance, tolerance in ((1e-1, 1e-5), (1e-2, 1e-4), (1e-3, 1e-3)):
        case = make_case(distance=distance)
        forward_kl = expected(case, 1)[2]
        assert 0.2 < forward_kl.mean() / distance**2 < 2
        error = (measure(case).forward_kl.double() - forward_kl).norm() / forward_kl.norm()
        assert error < tolerance, (distance, error)


def test_forward_kl_is_infinite_where_the_student_excludes() -> None:
    student, teacher = torch.zeros(3, 8), torch.zeros(3, 8)
    student[1, 2] = -math.inf
    found = distribution_statistics(student, teacher, k=2)
    assert found.forward_kl.tolist() == [0, math.inf, 0]
    excluded = distribution_statistics(teacher, student, k=2)  # by the teacher
    torch.testing.assert_close(excluded.forward_kl, torch.tensor([0, math.log(8 / 7), 0]))


def test_same_distributions_and_small_vocabularies() -> None:
    case = make_case(vocab_rows=7)
    case.teacher_hidden_TE, case.teacher_weight_VE = case.student_hidden_TD, case.student_weight_VD
    same = measure(case)
    assert not same.forward_kl.any() and bool((same.overlap_ratio == 1).all())
    torch.testing.assert_close(same.student_overlap_mass, torch.ones(37))
    assert torch.equal(same.student_entropy, same.teacher_entropy)


def test_narrow_weights_are_multiplied_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case().to(torch.bfloat16)
    whole = output_logits(case.student_hidden_TD, case.student_weight_VD)
    torch.testing.assert_close(
        whole, case.student_hidden_TD.float() @ case.student_weight_VD.float().T
    )
    monkeypatch.setattr(statistics, "_UPCAST_BYTES", 1000)
    tiles = output_logits(case.student_hidden_TD, case.student_weight_VD)
    torch.testing.assert_close(tiles, whole, rtol=1e-6, atol=1e-6)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="k is 0; at least 1 is needed"):
        measure(make_case(), k=0)
    with pytest.raises(ValueError, match="vocab_size is 2000"):
        distribution_statistics(torch.zeros(3, 8), torch.zeros(3, 8), vocab_size=2000)
    with pytest.raises(
        ValueError, match=r"\[3, 8\] torch.float32 and \[3, 7\] torch.float32; both must be"
    ):
        distribution_statistics(torch.zeros(3, 8), torch.zeros(3, 7))
