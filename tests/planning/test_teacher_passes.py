"""The promises of `plan_pass` as properties."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtopd.planning import Wave, plan_pass, quarters
from mtopd.types import MtopdError

TOKEN_BYTES = 8
LENGTHS = st.lists(st.integers(1, 60), max_size=40)
QUARTERS = st.lists(st.lists(st.integers(1, 60), max_size=12), min_size=1, max_size=4)


@given(st.integers(0, 50))
def test_quarters_hold_every_shard_once_in_its_order(count: int) -> None:
    shards = [f"batch-{i:05d}" for i in range(count)]
    found = quarters(shards)
    assert [name for quarter in found for name in quarter] == shards
    sizes = [len(quarter) for quarter in found]
    assert len(sizes) == min(4, count)
    assert not sizes or max(sizes) - min(sizes) <= 1


@given(QUARTERS, st.integers(1, 5), st.integers(1, 200), st.integers(60, 400))
def test_every_promise_holds(
    by_quarter: list[list[int]], num_replicas: int, batch_tokens: int, wave_tokens: int
) -> None:
    plans = plan_pass(
        by_quarter,
        num_replicas,
        batch_tokens=batch_tokens,
        token_bytes=TOKEN_BYTES,
        activation_budget=wave_tokens * TOKEN_BYTES,
    )
    lengths, number = flat(by_quarter)
    assert len(plans) == num_replicas
    found = [i for waves in plans for wave in waves for batch in wave.batches for i in batch]
    assert sorted(found) == list(range(len(lengths))), "every sample once"
    assert len({len(waves) for waves in plans}) == 1, "all replicas run the same number of waves"
    for waves in plans:
        for wave in waves:
            padded = [
                len(batch) * max(lengths[i] for i in batch) for batch in wave.batches if batch
            ]
            assert sum(padded) <= wave_tokens
            for tokens, batch in zip(padded, filter(bool, wave.batches), strict=True):
                assert tokens <= batch_tokens or len(batch) == 1
                assert 16 * (tokens - sum(lengths[i] for i in batch)) <= batch_tokens
    for side_by_side in rounds(plans):
        assert len({number[i] for batch in side_by_side for i in batch}) == 1, "of one quarter"
    for quarter, own in enumerate(by_quarter):
        loads = [
            sum(
                lengths[i]
                for w in waves
                for batch in w.batches
                for i in batch
                if number[i] == quarter
            )
            for waves in plans
        ]
        assert max(loads) - min(loads) <= max(own, default=0), (
            "moving one sample could not balance them better"
        )


@given(QUARTERS, st.integers(1, 4), st.integers(60, 200), st.data())
def test_a_quarter_runs_in_the_same_rounds_with_others_and_without(
    by_quarter: list[list[int]], num_replicas: int, wave_tokens: int, data: st.DataObject
) -> None:
    """What makes a state's bits independent of when its quarter was read."""
    options = {"batch_tokens": 64, "token_bytes": 1, "activation_budget": wave_tokens}
    chosen = data.draw(st.lists(st.sampled_from(range(len(by_quarter))), unique=True).map(sorted))
    _, number = flat(by_quarter)
    rounds_of = [
        [batches for batches in rounds(plan_pass(by_quarter, num_replicas, **options))
         if number[next(i for batch in batches for i in batch)] == quarter]
        for quarter in chosen
    ]  # fmt: skip
    ids = [i for i, quarter in enumerate(number) if quarter in chosen]
    part = plan_pass([by_quarter[quarter] for quarter in chosen], num_replicas, **options)
    named = [[[ids[i] for i in batch] for batch in batches] for batches in rounds(part)]
    assert named == [batches for quarter in rounds_of for batches in quarter]


@given(QUARTERS.filter(any), st.integers(1, 4), st.integers(60, 200), st.data())
def test_what_is_lacking_runs_in_the_rounds_of_the_whole_pass(
    by_quarter: list[list[int]], num_replicas: int, wave_tokens: int, data: st.DataObject
) -> None:
    lengths, _ = flat(by_quarter)
    requested = data.draw(st.sets(st.integers(0, len(lengths) - 1), min_size=1))
    options = {"batch_tokens": 64, "token_bytes": 1, "activation_budget": wave_tokens}
    whole = plan_pass(by_quarter, num_replicas, **options)
    rest = plan_pass(by_quarter, num_replicas, **options, requested=requested)
    assert rounds(rest) == [
        batches for batches in rounds(whole) if requested & set().union(*batches)
    ]
    assert len(rest[0]) <= len(whole[0])
    for waves in rest:
        for wave in waves:
            assert (
                sum(len(batch) * max(lengths[i] for i in batch) for batch in wave.batches if batch)
                <= wave_tokens
            )


def flat(by_quarter: list[list[int]]) -> tuple[list[int], list[int]]:
    """The length of every sample, and its quarter."""
    lengths = [length for quarter in by_quarter for length in quarter]
    return lengths, [n for n, quarter in enumerate(by_quarter) for _ in quarter]


def rounds(plans: list[list[Wave]]) -> list[list[list[int]]]:
    """What the replicas run side by side, round by round through all waves; an empty list is an
    empty batch.
    """
    return [
        list(batches)
        for column in zip(*plans, strict=True)
        for batches in zip(*(wave.batches for wave in column), strict=True)
    ]


@given(LENGTHS.filter(bool), st.integers(1, 5))
def test_one_wave_when_the_budget_allows(lengths: list[int], num_replicas: int) -> None:
    plans = plan_pass(
        [lengths], num_replicas, batch_tokens=64, token_bytes=1, activation_budget=64 * len(lengths)
    )
    assert all(len(waves) == 1 for waves in plans)


def test_waves_are_as_few_as_the_fullest_replica_needs() -> None:
    (waves,) = plan_pass([[10] * 9], 1, batch_tokens=20, token_bytes=1, activation_budget=40)
    assert [[len(b) for b in w.batches] for w in waves] == [[2, 2], [2, 2], [1]]
    (waves,) = plan_pass(
        [[10] * 9], 1, batch_tokens=20, token_bytes=1, activation_budget=40, requested={0, 5, 8}
    )
    assert [w.batches for w in waves] == [[[0, 1], [4, 5]], [[8]]]
    (waves,) = plan_pass([[10, 9, 9]], 1, batch_tokens=31, token_bytes=1, activation_budget=40)
    assert [w.batches for w in waves] == [[[0, 1], [2]]], (
        "two tokens of padding are over a sixteenth"
    )
    (waves,) = plan_pass([[10] * 3, [10]], 1, batch_tokens=20, token_bytes=1, activation_budget=40)
    assert [w.batches for w in waves] == [[[0, 1], [2], [3]]]


def test_a_sample_beyond_the_budget_is_refused() -> None:
    with pytest.raises(MtopdError, match=r"activation_budget is 100 bytes.*13 tokens takes 104"):
        plan_pass([[3, 13]], 2, batch_tokens=64, token_bytes=8, activation_budget=100)
