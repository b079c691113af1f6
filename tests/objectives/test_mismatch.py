"""Log-probs of trainer and rollout: the percentile of all ranks' tokens from added counts."""

from __future__ import annotations

import math

import pytest
import torch

from mtopd.objectives.mismatch import Mismatch
from mtopd.step_sums import StepSums


def measured(differences_T: torch.Tensor) -> Mismatch:
    mismatch = Mismatch(torch.device("cpu"))
    zeros_T = torch.zeros_like(differences_T)
    mismatch.add(differences_T, zeros_T, torch.ones_like(differences_T, dtype=torch.bool))
    return mismatch


def reduced(*ranks: Mismatch) -> StepSums:
    sums = [rank.sums() for rank in ranks]
    values = {name: float(sum(part[name] for part in sums)) for name in sums[0]}
    histogram = torch.stack([rank.histogram() for rank in ranks]).sum(0).tolist()
    return StepSums(values, 0, 0, {"abs_difference": histogram})


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.3, 40.0])
@pytest.mark.parametrize("num_tokens", [1, 7, 100, 101, 5000])
def test_the_percentile_is_that_of_all_tokens(num_tokens: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    differences = scale * torch.randn(num_tokens, generator=generator).clamp(-5, 5)
    parts = [measured(part) for part in differences.tensor_split(3)]
    found = Mismatch.metrics(reduced(*parts))
    wanted = float(differences.abs().sort().values[math.ceil(0.99 * num_tokens) - 1])
    assert found.log_prob_difference_p99 == pytest.approx(wanted, rel=0.046)
    mean, mean_abs = float(differences.double().mean()), float(differences.double().abs().mean())
    assert found.log_prob_difference == pytest.approx(mean, rel=1e-6)
    assert found.token_mult_prob_error == pytest.approx(math.exp(mean_abs), rel=1e-6)


def test_what_is_too_small_or_too_large_for_the_bins_is_counted() -> None:
    found = Mismatch.metrics(reduced(measured(torch.zeros(3))))
    assert found.log_prob_difference == 0 and found.token_mult_prob_error == 1
    assert 0 < found.log_prob_difference_p99 < 2**-23
    found = Mismatch.metrics(reduced(measured(torch.tensor([1e-3, -math.inf]))))
    assert found.log_prob_difference_p99 > 200
    # A step with NaN is refused, after its sums were made.
    assert int(measured(torch.tensor([math.nan, 1.0])).histogram().sum()) == 2


def test_tokens_without_a_weight_are_left_out() -> None:
    mismatch = Mismatch(torch.device("cpu"))
    is_trained = torch.tensor([True, False])
    mismatch.add(torch.tensor([-1.0, 0.0]), torch.tensor([-1.5, -9.0]), is_trained)
    assert Mismatch.metrics(reduced(mismatch)).log_prob_difference == 0.5


def test_a_step_without_trained_tokens_has_no_mismatch() -> None:
    found = Mismatch.metrics(reduced(Mismatch(torch.device("cpu"))))
    assert found.log_prob_difference is found.log_prob_difference_p99 is None
    assert found.token_mult_prob_error is None
