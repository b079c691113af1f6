"""The numbers of one train step: each rank's part, and the sums that every rank gets.

A train step makes one reduction.  Its result is a type: ``Trainer.optimizer_step`` takes the
``StepSums`` that ``Trainer.reduce`` returned for the same step, so that no update can come before
the ranks know whether one of them holds a gradient that is NaN or inf.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


class NonFiniteGradients(Exception):
    """A loss or a gradient is NaN or inf: the step must not be taken."""


@dataclass(frozen=True)
class LocalSums:
    """This rank's part, under the same names on every rank.

    ``loss_rows``: scalar tensors summed over the loss rows of last-stage ranks, alike on all tp
    ranks; the values of other ranks are not looked at.  ``vectors``: likewise, [n] of each name.
    ``added``: summed over all ranks.  ``largest``: the largest value of any rank is taken.
    """

    loss_rows: Mapping[str, torch.Tensor]
    vectors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    added: Mapping[str, float] = field(default_factory=dict)
    largest: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StepSums:
    """What ``Trainer.reduce`` gives to every rank, float64 sums under the names of ``LocalSums``."""

    values: Mapping[str, float]
    num_bad_ranks: int  # ranks that hold a gradient which is NaN or inf
    backward: int  # number of the backward pass, so that the sums of another step are not taken
    vectors: Mapping[str, list[float]] = field(default_factory=dict)
