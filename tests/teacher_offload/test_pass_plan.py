"""The sentences of `plan_pass` as properties."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtopd.teacher_offload.teacher_pass import plan_pass
from mtopd.types import MtopdError

TOKEN_BYTES = 8
LENGTHS = st.lists(st.integers(1, 60), max_size=40)


@given(LENGTHS, st.integers(1, 5), st.integers(1, 200), st.integers(60, 400))
def test_every_promise_holds(lengths: list[int], num_replicas: int, batch_tokens: int, wave_tokens: int) -> None:
    plans = plan_pass(
        lengths,
        num_replicas,
        batch_tokens=batch_tokens,
        token_bytes=TOKEN_BYTES,
        activation_budget=wave_tokens * TOKEN_BYTES,
    )
    assert len(plans) == num_replicas
    found = [i for waves in plans for wave in waves for batch in wave.batches for i in batch]
    assert sorted(found) == list(range(len(lengths))), "every sample once"
    assert len({len(waves) for waves in plans}) == 1, "all replicas run the same number of waves"
    for column in zip(*plans, strict=True):
        assert {wave.num_batches for wave in column} == {max(len(wave.batches) for wave in column)}
    for waves in plans:
        for wave in waves:
            padded = [len(batch) * max(lengths[i] for i in batch) for batch in wave.batches]
            assert sum(padded) <= wave_tokens
            assert all(p <= batch_tokens or len(b) == 1 for p, b in zip(padded, wave.batches, strict=True))
    loads = [sum(lengths[i] for w in waves for batch in w.batches for i in batch) for waves in plans]
    assert max(loads) - min(loads) <= max(lengths, default=0), "moving one sample could not balance them better"


@given(LENGTHS.filter(bool), st.integers(1, 5))
def test_one_wave_when_the_budget_allows(lengths: list[int], num_replicas: int) -> None:
    plans = plan_pass(lengths, num_replicas, batch_tokens=64, token_bytes=1, activation_budget=64 * len(lengths))
    assert all(len(waves) == 1 for waves in plans)


def test_waves_are_as_few_as_the_fullest_replica_needs() -> None:
    (waves,) = plan_pass([10] * 9, 1, batch_tokens=20, token_bytes=1, activation_budget=40)
    assert [[len(b) for b in w.batches] for w in waves] == [[2, 2], [2, 2], [1]]


def test_a_sample_beyond_the_budget_is_refused() -> None:
    with pytest.raises(MtopdError, match=r"activation_budget is 100 bytes.*13 tokens takes 104"):
        plan_pass([3, 13], 2, batch_tokens=64, token_bytes=8, activation_budget=100)
