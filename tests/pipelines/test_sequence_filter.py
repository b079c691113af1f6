"""Which samples the sequence filter leaves out, given how far trainer and rollout are apart."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from mtopd.metrics_lines import SequenceFilterLine
from mtopd.pipelines import sequence_filter
from mtopd.types import MtopdError, SampleMetadata

SAMPLES = [
    SampleMetadata(sample_id=n, teacher_index=0, prompt_len=3, response_len=8, num_loss_tokens=n)
    for n in range(5)
]


def filtered(
    monkeypatch: pytest.MonkeyPatch, limit: float | None, means: list[float]
) -> tuple[list[int], list[Any]]:
    """Loss tokens of each sample, and the lines written."""
    sums = [mean * sample.num_loss_tokens for mean, sample in zip(means, SAMPLES, strict=True)]
    monkeypatch.setattr(sequence_filter, "difference_sums", lambda *_: sums)
    lines: list[Any] = []
    session: Any = SimpleNamespace(
        config=SimpleNamespace(train=SimpleNamespace(sequence_filter=limit)),
        metrics=SimpleNamespace(write=lambda line, iteration: lines.append(line)),
    )
    iteration: Any = SimpleNamespace(number=0)
    kept = sequence_filter.trained_samples(session, iteration, SAMPLES)
    assert [sample.sample_id for sample in kept] == [0, 1, 2, 3, 4], "every sample has its place"
    return [sample.num_loss_tokens for sample in kept], lines


def test_a_sample_above_the_limit_keeps_its_place_without_loss_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    means = [0.0, 0.9 * math.log(2), 1.1 * math.log(2), math.nan, 1e-6]
    tokens, (line,) = filtered(monkeypatch, 2.0, means)
    assert tokens == [0, 1, 0, 0, 4]
    assert isinstance(line, SequenceFilterLine)
    assert (line.samples, line.samples_filtered, line.tokens_filtered) == (5, 2, 5)


def test_without_a_limit_nothing_is_left_out_or_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert filtered(monkeypatch, None, [9.0] * 5) == ([0, 1, 2, 3, 4], [])


def test_a_filter_that_leaves_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MtopdError, match=r"leaves none of 5 samples: .* is 0\.8 nats, 0\.693 are"):
        filtered(monkeypatch, 2.0, [0.0, math.nan, 3.0, 0.8, 5.0])
