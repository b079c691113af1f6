"""The oracle itself, against numbers worked out by hand (kernels.md 8.1) and against torch's own KL."""

import torch

from mtopd.kernels.reference import reverse_kl


def test_direction_and_value() -> None:
    student, teacher = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 2.0, 2.5]])
    torch.testing.assert_close(reverse_kl(student, teacher), torch.tensor([0.02914512]), rtol=1e-5, atol=0)
    assert abs(reverse_kl(teacher, student) - reverse_kl(student, teacher)) > 1e-3


def test_equals_kl_div_with_the_student_as_target() -> None:
    student, teacher = torch.randn(2, 5, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_p, log_q = (student / 0.7).log_softmax(-1), (teacher / 0.7).log_softmax(-1)
    expected = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(reverse_kl(student, teacher, 0.7), expected)
