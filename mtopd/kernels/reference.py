"""The definition of the divergence: dense, on one device, differentiated by autograd.  The oracle of the tests.

Legend: T tokens, V vocabulary (padding already cut off by the caller).  Computes in the dtype it is given, so that
float64 logits give a float64 answer.  It does not guard -inf logits: the edge cases have known numbers instead.
"""

from __future__ import annotations

from torch import Tensor


def reverse_kl(student_logits_TV: Tensor, teacher_logits_TV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(student || teacher) of each token in nats, [T]: sum_v p_v (log p_v - log q_v); no temperature**2 factor."""
    student_log_probs_TV = (student_logits_TV / temperature).log_softmax(-1)
    teacher_log_probs_TV = (teacher_logits_TV / temperature).log_softmax(-1)
    return (student_log_probs_TV.exp() * (student_log_probs_TV - teacher_log_probs_TV)).sum(-1)
