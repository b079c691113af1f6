"""The learning rate of a train step, in closed form: what a schedule will do is said before any
optimizer exists.
"""

from __future__ import annotations

import math
from typing import Literal

Decay = Literal["linear", "cosine", "constant"]


def learning_rate(
    step: int, *, num_steps: int, lr: float, min_lr: float, warmup_steps: int, decay: Decay
) -> float:
    """Of train step ``step``, from 0, of ``num_steps``: what Megatron's schedule has for it.

    A linear warm-up moves already at the first step; the decay arrives at ``min_lr`` with the last.
    """
    number = step + 1
    if number <= warmup_steps:
        return lr * number / warmup_steps
    if decay == "constant":
        return lr
    last = max(num_steps, warmup_steps + 1)
    done = min((number - warmup_steps) / (last - warmup_steps), 1.0)
    share = 1.0 - done if decay == "linear" else 0.5 * (math.cos(math.pi * done) + 1.0)
    return min_lr + share * (lr - min_lr)
