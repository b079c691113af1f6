"""The oracle itself, against numbers worked out by hand (spec 8.1), torch's own KL, and the
definitions' identities.
"""

import math

import pytest
import torch

from mtopd.kernels.reference import divergence

STUDENT, TEACHER = (
    torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64),
    torch.tensor([[1.0, 2.0, 2.5]]).double(),
)


def test_direction_and_value() -> None:
    assert float(divergence("reverse_kl", STUDENT, TEACHER)) == pytest.approx(0.02914512, rel=1e-6)
    assert float(divergence("forward_kl", STUDENT, TEACHER)) == pytest.approx(0.03020067, rel=1e-6)


def test_equals_torch_kl_div_between_the_stated_distributions() -> None:
    student, teacher = torch.randn(
        2, 5, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    log_p, log_q = (student / 0.7).log_softmax(-1), (teacher / 0.7).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()

    def kl(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.kl_div(right.log(), left, reduction="none").sum(-1)

    beta = 0.3
    expected = {
        "reverse_kl": kl(p, q),
        "forward_kl": kl(q, p),
        "skewed_reverse_kl": kl(p, beta * p + (1 - beta) * q),
        "skewed_forward_kl": kl(q, beta * q + (1 - beta) * p),
        "jsd": beta * kl(q, beta * q + (1 - beta) * p)
        + (1 - beta) * kl(p, beta * q + (1 - beta) * p),
        "tvd": (p - q).clamp(min=0).sum(-1),
    }
    for name, value in expected.items():
        torch.testing.assert_close(divergence(name, student, teacher, beta, 0.7), value)


def test_symmetries_and_bounds() -> None:
    far = torch.tensor([[60.0, 0.0]], dtype=torch.float64)
    assert float(divergence("jsd", far, far.flip(1), 0.5)) == pytest.approx(math.log(2))
    assert float(divergence("tvd", far, far.flip(1))) == pytest.approx(1)
    for name in ("jsd", "tvd"):
        torch.testing.assert_close(
            divergence(name, STUDENT, TEACHER, 0.5), divergence(name, TEACHER, STUDENT, 0.5)
        )
