"""How far the trainer's log-probs of the sampled tokens are from those of the rollout.

With an exact engine the first train step of an iteration differs by rounding alone: it trains on
what its own weights sampled.  Whatever else is found there came with the engine: another dtype,
other kernels, stale weights.  Later steps add how far the student has moved since.

The 99th percentile is that of all ranks: each counts its tokens in the bins of one fixed histogram
of |difference|, equal on a log scale, and the counts are added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mtopd.metrics_lines import MismatchMetrics
from mtopd.step_sums import StepSums

# Eight bins an octave from 2^-24, a float32's rounding of 1, to 2^8 nats; what is below or above
# falls into the first or the last.  A percentile, the middle of its bin, is off by at most 4.5 %.
_BINS_PER_OCTAVE, _LOWEST, _HIGHEST = 8, -24, 8
_NUM_BINS = (_HIGHEST - _LOWEST) * _BINS_PER_OCTAVE
_QUANTILE = 0.99


class Mismatch:
    """The comparison of one train step."""

    def __init__(self, device: torch.device) -> None:
        self._differences = [torch.zeros(0, device=device)]

    def add(
        self, log_prob_R: torch.Tensor, rollout_log_prob_R: torch.Tensor, is_trained_R: torch.Tensor
    ) -> None:
        """Rows of this rank; those without a weight have no log-prob."""
        self._differences.append((log_prob_R - rollout_log_prob_R)[is_trained_R])

    def sums(self) -> dict[str, torch.Tensor]:
        """Sums over this rank's tokens."""
        difference_T = torch.cat(self._differences).double()
        return {"difference": difference_T.sum(), "abs_difference": difference_T.abs().sum()}

    def histogram(self) -> torch.Tensor:
        """[bins] how many of this rank's tokens are in each."""
        exponent_T = torch.cat(self._differences).abs().log2()
        bin_T = (exponent_T - _LOWEST) * _BINS_PER_OCTAVE
        # NaN, of a step that is refused, falls into the last bin.
        bin_T = bin_T.nan_to_num(nan=_NUM_BINS).floor().clamp(0, _NUM_BINS - 1)
        return torch.bincount(bin_T.long(), minlength=_NUM_BINS)

    @staticmethod
    def metrics(sums: StepSums) -> MismatchMetrics:
        counts = sums.vectors["abs_difference"]
        if (num_tokens := sum(counts)) == 0:
            return MismatchMetrics()
        return MismatchMetrics(
            log_prob_difference=sums.values["difference"] / num_tokens,
            log_prob_difference_p99=quantile(counts, _QUANTILE),
            token_mult_prob_error=math.exp(sums.values["abs_difference"] / num_tokens),
        )


def quantile(counts: Sequence[float], share: float) -> float:
    """In nats: the middle, on the log scale, of the bin that holds it."""
    left = share * sum(counts)
    for number, count in enumerate(counts):  # noqa: B007 - the last one reached is meant
        left -= count
        if left <= 0:
            break
    return float(2 ** (_LOWEST + (number + 0.5) / _BINS_PER_OCTAVE))
