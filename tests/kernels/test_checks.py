"""Inputs that do not fit together are refused before anything is computed, and the message says why."""

import math
from typing import Any

import pytest
import torch
from divergence_cases import fused, make_case
from torch import Tensor
from torch.utils.checkpoint import checkpoint

INF = math.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"divergence": "sideways"},
            "divergence='sideways' is unknown; known: 'reverse_kl', 'forward_kl', 'tvd', 'jsd'",
        ),
        ({"beta": 0.5}, "beta=0.5: divergence='reverse_kl' takes no beta"),
        ({"divergence": "jsd"}, "beta=None: divergence='jsd' needs a beta with 0 < beta < 1"),
        (
            {"divergence": "jsd", "beta": 0.0},
            "the limits are 'forward_kl' at 0 and 'reverse_kl' at 1",
        ),
        (
            {"divergence": "jsd", "beta": 1.0},
            "the limits are 'forward_kl' at 0 and 'reverse_kl' at 1",
        ),
        ({"divergence": "skewed_reverse_kl", "beta": 0}, "the limit at 0 is 'reverse_kl'"),
        ({"divergence": "skewed_forward_kl", "beta": INF}, "the limit at 0 is 'forward_kl'"),
        ({"divergence": "tvd", "beta": 0.1}, "divergence='tvd' takes no beta"),
        ({"teacher_neginf": "clamp"}, "teacher_neginf='clamp' is unknown"),
        ({"backend": "liger"}, "backend='liger' is unknown"),
        ({"backend": "triton"}, "backend='triton' works on cuda, but the tensors are on cpu"),
        (
            {"weight_grad_accumulator": torch.zeros(1003, 24)},
            "student_weight does not require a gradient",
        ),
        (
            {"weight_grad_accumulator": torch.zeros(1003, 23)},
            r"\[1003, 23\] on cpu, but student_weight is \[1003, 24\]",
        ),
        (
            {"weight_grad_accumulator": torch.zeros(1003, 24).bfloat16()},
            "a contiguous torch.float32 buffer",
        ),
        ({"weight_grad_accumulator": torch.zeros(24, 1003).T}, "a contiguous torch.float32 buffer"),
        ({"weight_grad_accumulator": 3}, "weight_grad_accumulator is int"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": INF}, "temperature is inf"),
        ({"student_softcap": -1.0}, "student_softcap is -1.0"),
        ({"teacher_logit_scale": float("nan")}, "teacher_logit_scale is nan"),
        ({"vocab_size": 1004}, "vocab_size is 1004.*1003 rows"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"workspace_bytes": 0}, "workspace_bytes is 0"),
        (
            {"token_weight": torch.ones(36)},
            "student_hidden has 37, teacher_hidden has 37, token_weight has 36",
        ),
        ({"token_weight": torch.ones(37, 1)}, r"token_weight has 2 dimensions \[37, 1\]"),
        ({"token_weight": torch.ones(37, dtype=torch.int64)}, "token_weight has dtype torch.int64"),
        ({"token_weight": torch.full((37,), float("nan"))}, "token_weight holds 37 NaN"),
        (
            {"token_weight": torch.ones(37, device="meta")},
            "token_weight is on meta, but student_hidden is on cpu",
        ),
        ({"teacher_bias": torch.zeros(1000)}, "teacher_weight has 1003, teacher_bias has 1000"),
        ({"labels": torch.ones(37)}, r"labels are torch.float32 \[37\]; int64 \[37\] is needed"),
        ({"labels": torch.ones(36).long()}, r"labels are torch.int64 \[36\]"),
        ({"labels": torch.ones(37, device="meta").long()}, "labels are on meta"),
        ({"labels": torch.arange(-1, 36)}, "labels are -1 to 35; 0 to 1002 is the vocabulary"),
        (
            {"labels": torch.arange(1000, 1037), "vocab_size": 1000},
            "labels are 1000 to 1036; 0 to 999 is the vocabulary",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    case = make_case()
    with pytest.raises(ValueError, match=message):
        case.call(case.student_hidden_TD, case.student_weight_VD, **change)


def test_rounded_products_are_refused() -> None:
    case = make_case()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with pytest.raises(ValueError, match="is 'medium': float32 operands would be rounded"):
            fused(case)
        assert fused(case.to(torch.float64)).loss.isfinite()
    finally:
        torch.set_float32_matmul_precision(before)


def test_mismatched_shapes_are_refused() -> None:
    case = make_case()
    with pytest.raises(ValueError, match="student_hidden has 23, student_weight has 24"):
        case.call(case.student_hidden_TD[:, 1:], case.student_weight_VD)
    with pytest.raises(ValueError, match="student_weight has 1002, teacher_weight has 1003"):
        case.call(case.student_hidden_TD, case.student_weight_VD[1:])
    case.teacher_hidden_TE = case.teacher_hidden_TE[:, 1:]
    with pytest.raises(ValueError, match="teacher_hidden has 32, teacher_weight has 33"):
        fused(case)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_accumulator_is_refused_under_recompute(use_reentrant: bool) -> None:
    case = make_case()
    hidden, weight = case.leaves()
    main_grad = torch.zeros(1003, 24)

    # The last product keeps an input: backward has to run all of this again.
    def loss(hidden_TD: Tensor) -> Tensor:
        loss = case.call(hidden_TD, weight, weight_grad_accumulator=main_grad).loss
        return loss + (hidden_TD * hidden_TD).sum()

    with pytest.raises(ValueError, match="cannot be used under activation recompute"):
        checkpoint(loss, hidden, use_reentrant=use_reentrant).backward()
