"""Inputs and the dense answer for the tests of the fused divergence.

Legend: T tokens, D student hidden size, E teacher hidden size, V vocabulary rows with padding. The
dense answer is autograd of the reference on whole logits, in any dtype; float64 on the same inputs
is the oracle.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtopd.kernels import Divergence, fused_linear_divergence, reference

ONE_ROW = 1  # workspace_bytes too small for a row: chunks of one
FEW_ROWS = 300_000
# Noise of the teacher, and the reverse KL that it makes.
LEVELS = [(1.15, 1.0), (0.07, 4e-3), (0.007, 4e-5)]


class Answer(NamedTuple):
    """What is compared, all detached."""

    loss: Tensor
    per_token: Tensor
    entropy: Tensor
    label_log_prob: Tensor
    hidden_grad: Tensor
    weight_grad: Tensor


@dataclass
class Case:
    """One set of inputs; `options` are keyword arguments of `fused_linear_divergence`."""

    student_hidden_TD: Tensor
    student_weight_VD: Tensor
    teacher_hidden_TE: Tensor
    teacher_weight_VE: Tensor
    token_weight_T: Tensor
    label_T: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Case:
        tensors = (
            self.student_hidden_TD,
            self.student_weight_VD,
            self.teacher_hidden_TE,
            self.teacher_weight_VE,
        )
        return Case(
            *(tensor.to(dtype) for tensor in tensors),
            self.token_weight_T,
            self.label_T,
            dict(self.options),
        )

    def leaves(self) -> tuple[Tensor, Tensor]:
        """Fresh copies of the student tensors that want a gradient."""
        hidden, weight = self.student_hidden_TD, self.student_weight_VD
        return hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()

    def call(
        self, student_hidden_TD: Tensor, student_weight_VD: Tensor, **options: Any
    ) -> Divergence:
        teacher = (self.teacher_hidden_TE, self.teacher_weight_VE)
        given = {"token_weight": self.token_weight_T, "labels": self.label_T}
        options = given | self.options | options
        return fused_linear_divergence(student_hidden_TD, student_weight_VD, *teacher, **options)


def make_case(
    num_tokens: int = 37,
    student_size: int = 24,
    teacher_size: int = 33,
    vocab_rows: int = 1003,
    *,
    distance: float = 1.0,
    masked: int = 3,
    seed: int = 0,
    **options: Any,
) -> Case:
    """A float32 case whose teacher logits are the student's plus `distance` times noise (KL is
    about its square).
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    num_extra = teacher_size - student_size
    assert num_extra > 0, "the noise lives in the hidden columns that only the teacher has"
    student_hidden_TD = randn(num_tokens, student_size)
    student_weight_VD = randn(vocab_rows, student_size) * (3 / student_size**0.5)
    teacher_hidden_TE = torch.cat([student_hidden_TD, distance * randn(num_tokens, num_extra)], 1)
    teacher_weight_VE = torch.cat(
        [student_weight_VD, randn(vocab_rows, num_extra) * (1.6 / num_extra**0.5)], 1
    )
    token_weight_T = torch.rand(num_tokens, generator=generator) + 0.1
    token_weight_T[:masked] = 0
    token_weight_T = token_weight_T[torch.randperm(num_tokens, generator=generator)]
    vocab_size = options.get("vocab_size") or vocab_rows
    label_T = torch.randint(vocab_size, (num_tokens,), generator=generator)
    return Case(
        student_hidden_TD,
        student_weight_VD,
        teacher_hidden_TE,
        teacher_weight_VE,
        token_weight_T,
        label_T,
        dict(options),
    )


def fused(case: Case, **options: Any) -> Answer:
    """The answer of the function under test, gradients of out.loss included."""
    hidden, weight = case.leaves()
    out = case.call(hidden, weight, **options)
    out.loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    values = (out.loss.detach(), out.per_token, out.entropy, out.label_log_prob)
    return Answer(*values, hidden.grad, weight.grad)


def dense(case: Case, dtype: torch.dtype = torch.float64) -> Answer:
    """The answer of the reference on whole logits in `dtype`; rows without weight must hold finite
    numbers.
    """
    options = case.options
    case = case.to(dtype)
    hidden, weight = case.leaves()
    temperature = options.get("temperature", 1.0)
    student, teacher = _all_logits(case, hidden, weight)
    is_live = case.token_weight_T != 0
    name, beta = options.get("divergence", "reverse_kl"), options.get("beta")
    per_token = torch.where(
        is_live, reference.divergence(name, student, teacher, beta or 0.5, temperature), 0
    )
    loss = (case.token_weight_T.to(dtype) * per_token).sum()
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    log_probs = (student.detach() / temperature).log_softmax(-1)
    entropy = torch.where(is_live, -(log_probs.exp() * log_probs).sum(-1), 0)
    label_log_prob = log_probs.gather(1, case.label_T[:, None])[:, 0].where(is_live, 0)
    values = (loss.detach(), per_token.detach(), entropy, label_log_prob)
    return Answer(*values, hidden.grad, weight.grad)


def dense_logits(case: Case) -> tuple[Tensor, Tensor]:
    """Logits of student and teacher over the temperature, [T, V] without padding."""
    temperature = case.options.get("temperature", 1.0)
    student, teacher = _all_logits(case, case.student_hidden_TD, case.student_weight_VD)
    return student / temperature, teacher / temperature


def _all_logits(case: Case, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    options = case.options
    vocab_size, bias = options.get("vocab_size"), options.get("teacher_bias")
    student = _logits(hidden, weight, None, "student", options)[:, :vocab_size]
    teacher = _logits(case.teacher_hidden_TE, case.teacher_weight_VE, bias, "teacher", options)[
        :, :vocab_size
    ]
    return student, teacher


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, model: str, options: dict[str, Any]
) -> Tensor:
    logits = options.get(f"{model}_logit_scale", 1.0) * (hidden @ weight.T)
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    softcap = options.get(f"{model}_softcap")
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def relative_error(actual: Tensor, oracle: Tensor) -> float:
    """L2 norm of the difference over the L2 norm of the oracle, in float64."""
    return float((actual.double() - oracle.double()).norm() / oracle.double().norm())


def assert_level(case: Case, level: float) -> None:
    """The reverse KL of the case, whatever divergence it is made for, is about `level`, and not
    below 1.
    """
    reverse = Case(
        **{**vars(case), "options": {**case.options, "divergence": "reverse_kl", "beta": None}}
    )
    kl = dense(reverse).per_token
    mean_kl = float(kl.sum() / (kl != 0).sum())
    assert level / 2.5 < mean_kl < level * 2.5 and (level < 1 or mean_kl >= 1), mean_kl


def assert_as_good_as_dense(actual: Answer, case: Case, at_most: float | None = None) -> None:
    """No more than twice the error of plain dense float32 plus 2e-6, and no more than `at_most`.

    The loss is held to the rows that it sums: dense rows are off by 6e-3 where the errors of their
    sum cancel, by chance and on some CPUs, to 2e-6.
    """
    oracle, plain = dense(case), dense(case, torch.float32)
    rows = (case.token_weight_T.double() * actual.per_token.double()).sum()
    assert relative_error(actual.loss, rows) <= 1e-6, (actual.loss, rows)
    for name in Answer._fields:
        error = relative_error(getattr(actual, name), getattr(oracle, name))
        bound = 2 * relative_error(getattr(plain, name), getattr(oracle, name)) + 2e-6
        if name == "loss":
            bound = max(bound, relative_error(actual.per_token, oracle.per_token) / 2)
        assert error <= (bound if at_most is None else min(bound, at_most)), (
            f"{name}: {error:.2e} > {bound:.2e}"
        )
