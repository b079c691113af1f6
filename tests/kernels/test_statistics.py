"""Metrics of both distributions against their dense definitions; the tokens drawn; tp in divergence_ranks."""

from typing import Any

import pytest
import torch
from divergence_cases import Case, dense_logits, make_case
from torch import Tensor

from mtopd.kernels import DistributionStatistics, distribution_statistics


def measure(case: Case, **options: Any) -> DistributionStatistics:
    tensors = (case.student_hidden_TD, case.student_weight_VD, case.teacher_hidden_TE, case.teacher_weight_VE)
    options = {"token_weight": case.token_weight_T, "num_tokens": 20, "seed": 7} | case.options | options
    return distribution_statistics(*tensors, **options)


def expected(case: Case, rows: Tensor, k: int) -> list[Tensor]:
    student_TV, teacher_TV = dense_logits(case.to(torch.float64))
    log_p, log_q = (z[rows].log_softmax(-1) for z in (student_TV, teacher_TV))
    p, q = log_p.exp(), log_q.exp()
    top_p, top_q = (torch.zeros_like(z, dtype=torch.bool).scatter_(1, z.topk(k).indices, True) for z in (p, q))
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
        {"vocab_size": 981, "teacher_bias": torch.randn(1003, generator=torch.Generator().manual_seed(1)) * 3},
        {"workspace_bytes": 60_000},
    ],
    ids=["plain", "student", "teacher", "chunks"],
)
def test_against_the_definitions(options: dict[str, Any], k: int, backend: str) -> None:
    case = make_case(distance=1.5, **options)
    before = case.student_hidden_TD.clone()
    actual = measure(case, k=k, backend=backend)
    assert len(actual.rows) == 20 and bool((case.token_weight_T[actual.rows] != 0).all())
    assert torch.equal(actual.rows, actual.rows.sort().values)
    for name, value, wanted in zip(actual._fields[1:], actual[1:], expected(case, actual.rows, k), strict=True):
        torch.testing.assert_close(value.double(), wanted.double(), rtol=2e-5, atol=2e-7, msg=name)
    assert options.get("student_logit_scale", 1) < 0 or 0 < actual.overlap_ratio.mean() < 1
    assert torch.equal(before, case.student_hidden_TD)


def test_tokens_are_drawn_by_the_seed_and_bounded() -> None:
    case = make_case(200, masked=50)
    first, again, other = (measure(case, seed=seed).rows for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(measure(case, num_tokens=500).rows) == 150
    assert all(len(tensor) == 0 for tensor in measure(make_case(5, masked=5)))


def test_same_distributions_and_small_vocabularies() -> None:
    case = make_case(vocab_rows=7)
    case.teacher_hidden_TE, case.teacher_weight_VE = case.student_hidden_TD, case.student_weight_VD
    same = measure(case)
    assert not same.forward_kl.any() and bool((same.overlap_ratio == 1).all())
    torch.testing.assert_close(same.student_overlap_mass, torch.ones(20))
    assert torch.equal(same.student_entropy, same.teacher_entropy)


def test_refusals() -> None:
    case = make_case()
    with pytest.raises(ValueError, match="num_tokens is 0 and k is 16"):
        measure(case, num_tokens=0)
    with pytest.raises(ValueError, match="vocab_size is 2000"):
        measure(case, vocab_size=2000)
