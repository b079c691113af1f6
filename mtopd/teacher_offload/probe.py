"""Is the teacher in memory the one that was added?  Its log-probs of a few tokens against stored
reference ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mtopd.types import MtopdError

# Mean absolute difference, nats.  Measured on random models of 4 and 16 layers: float32 up to 2e-6;
# bfloat16 0.013 to 0.03 for dense ones and up to 0.19 where rounding sends a token to another
# expert; another teacher more than 2.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}
UNIFORM = 1e-4  # nats


def check_probe(
    reference: Mapping[str, Any], log_probs: np.ndarray, *, name: str, vocab_size: int, dtype: str
) -> float:
    """Mean absolute difference, in nats, between ``log_probs`` [T, K] and those of the stored
    probe.

    ``dtype`` is the one the teacher computes in ("float32", "bfloat16").  Raises MtopdError beyond
    its tolerance, when a log-prob is not finite, and, with another message, when all are -ln V.
    """
    expected = np.asarray(reference["log_probs"], np.float64)
    found = np.asarray(log_probs, np.float64)
    if found.shape != expected.shape:
        raise MtopdError(
            f"teacher {name!r}: {found.shape} log-probs came out of a probe of {expected.shape}"
        )
    if np.abs(found + math.log(vocab_size)).max() < UNIFORM:
        raise MtopdError(
            f"teacher {name!r}: the teacher's weights were not loaded: every log-prob is -ln V = "
            f"{-math.log(vocab_size):.3f}; add the teacher again"
        )
    difference = float(np.abs(found - expected).mean())
    if not difference <= TOLERANCE[dtype]:  # also when it is NaN
        raise MtopdError(
            f"teacher {name!r} is not the one that was added: its log-probs differ from those of "
            f"{reference['by']} by {difference:.4g} nats on average, {TOLERANCE[dtype]:g} is "
            f"allowed in {dtype}; "
            "add the teacher again"
        )
    return difference
