"""The definitions of the divergences: dense, on one device, differentiated by autograd.  The oracle
of the tests.

Legend: T tokens, V vocabulary (padding already cut off by the caller).  Computes in the dtype it is
given, so that float64 logits give a float64 answer.  It does not guard -inf logits: the edge cases
have known numbers instead.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def divergence(
    name: str,
    student_logits_TV: Tensor,
    teacher_logits_TV: Tensor,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """The divergence `name` of `fused_linear_divergence` for each token in nats, [T]; no
    temperature**2 factor.
    """
    log_p_TV = (student_logits_TV / temperature).log_softmax(-1)
    log_q_TV = (teacher_logits_TV / temperature).log_softmax(-1)
    if name == "reverse_kl":
        return _kl(log_p_TV, log_q_TV)
    if name == "forward_kl":
        return _kl(log_q_TV, log_p_TV)
    if name == "skewed_reverse_kl":
        return _kl(log_p_TV, _log_mixture(log_p_TV, log_q_TV, beta))
    if name == "skewed_forward_kl":
        return _kl(log_q_TV, _log_mixture(log_q_TV, log_p_TV, beta))
    if name == "jsd":
        log_m_TV = _log_mixture(log_q_TV, log_p_TV, beta)
        return beta * _kl(log_q_TV, log_m_TV) + (1 - beta) * _kl(log_p_TV, log_m_TV)
    assert name == "tvd", name
    return (log_p_TV.exp() - log_q_TV.exp()).abs().sum(-1) / 2


def _kl(log_p_TV: Tensor, log_q_TV: Tensor) -> Tensor:
    return (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1)


def _log_mixture(log_p_TV: Tensor, log_q_TV: Tensor, part: float) -> Tensor:
    """log(part * p + (1 - part) * q)."""
    return torch.logaddexp(log_p_TV + math.log(part), log_q_TV + math.log(1 - part))
