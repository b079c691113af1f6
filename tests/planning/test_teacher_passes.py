"""The promises of `plan_pass` as properties."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtopd.planning import Wave, plan_pass
from mtopd.types import MtopdError

TOKEN_BYTES = 8
LENGTHS = st.lists(st.integers(1, 60), max_size=40)


@given(LENGTHS, st.integers(1, 5), st.integers(1, 200), st.integers(60, 400))
def test_every_promise_holds(
    lengths: list[int], num_replicas: int, batch_tokens: int, wave_tokens: int
) -> None:
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
            assert all(
                p <= batch_tokens or len(b) == 1 for p, b in zip(padded, wave.batches, strict=True)
            )
    loads = [
        sum(lengths[i] for w in waves for batch in w.batches for i in batch) for waves in plans
    ]
    assert max(loads) - min(loads) <= max(lengths, default=0), (
        "moving one sample could not balance them better"
    )


@given(LENGTHS.filter(bool), st.integers(1, 4), st.integers(60, 200), st.data())
def test_what_is_lacking_runs_in_the_rounds_of_the_whole_pass(
    lengths: list[int], num_replicas: int, wave_tokens: int, data: st.DataObject
) -> None:
    requested = data.draw(st.sets(st.integers(0, len(lengths) - 1), min_size=1))
    options = {"batch_tokens": 64, "token_bytes": 1, "activation_budget": wave_tokens}
    whole = plan_pass(lengths, num_replicas, **options)
    rest = plan_pass(lengths, num_replicas, **options, requested=requested)
    assert rounds(rest) == [
        batches for batches in rounds(whole) if requested & set().union(*batches)
    ]
    assert len(rest[0]) <= len(whole[0])
    for waves in rest:
        for wave in waves:
            assert (
                sum(len(batch) * max(lengths[i] for i in batch) for batch in wave.batches)
                <= wave_tokens
            )


def rounds(plans: list[list[Wave]]) -> list[list[list[int]]]:
    """What the replicas run side by side, round by round through all waves; an empty list is an
    empty batch.
    """
    found = []
    for column in zip(*plans, strict=True):
        assert len({wave.num_batches for wave in column}) == 1
        for k in range(column[0].num_batches):
            found.append([wave.batches[k] if k < len(wave.batches) else [] for wave in column])
    return found


@given(LENGTHS.filter(bool), st.integers(1, 5))
def test_one_wave_when_the_budget_allows(lengths: list[int], num_replicas: int) -> None:
    plans = plan_pass(
        lengths, num_replicas, batch_tokens=64, token_bytes=1, activation_budget=64 * len(lengths)
    )
    assert all(len(waves) == 1 for waves in plans)


def test_waves_are_as_few_as_the_fullest_replica_needs() -> None:
    (waves,) = plan_pass([10] * 9, 1, batch_tokens=20, token_bytes=1, activation_budget=40)
    assert [[len(b) for b in w.batches] for w in waves] == [[2, 2], [2, 2], [1]]
    (waves,) = plan_pass(
        [10] * 9, 1, batch_tokens=20, token_bytes=1, activation_budget=40, requested={0, 5, 8}
    )
    assert [w.batches for w in waves] == [[[0, 1], [4, 5]], [[8]]]


def test_a_sample_beyond_the_budget_is_refused() -> None:
    with pytest.raises(MtopdError, match=r"activation_budget is 100 bytes.*13 tokens takes 104"):
        plan_pass([3, 13], 2, batch_tokens=64, token_bytes=8, activation_budget=100)
