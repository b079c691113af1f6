"""Exact divergences over vocabularies too large for logits.  Imports nothing from mtopd; third
party: torch, numpy.
"""

from mtopd.kernels.divergence import Divergence, fused_linear_divergence
from mtopd.kernels.labels import label_log_probs
from mtopd.kernels.statistics import DistributionStatistics, distribution_statistics, output_logits

__all__ = [
    "DistributionStatistics",
    "Divergence",
    "distribution_statistics",
    "fused_linear_divergence",
    "label_log_probs",
    "output_logits",
]
