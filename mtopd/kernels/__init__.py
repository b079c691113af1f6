"""Fused losses over the vocabulary.  Imports nothing from mtopd; third party: torch."""

from mtopd.kernels.fused_linear import Divergence, fused_linear_divergence

__all__ = ["Divergence", "fused_linear_divergence"]
