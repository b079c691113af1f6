"""The selection of prompts and the numbers of their answers: the planner's sentences, and what it refuses."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtopd.planning import number_samples, select_prompts
from mtopd.types import MtopdError


@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_prompts_come_once_in_an_epoch_and_resume_needs_no_state(
    num_prompts: int, count: int, seed: int
) -> None:
    num_iterations = 3 * num_prompts
    rows = [
        row for i in range(num_iterations) for row in select_prompts(num_prompts, count, i, seed)
    ]
    assert len(rows) == num_iterations * count
    for start in range(0, len(rows), num_prompts):
        assert sorted(rows[start : start + num_prompts]) == list(range(num_prompts))


def test_prompt_order_depends_on_seed_and_epoch() -> None:
    first, second = select_prompts(50, 50, 0, seed=3), select_prompts(50, 50, 1, seed=3)
    assert first != second != sorted(second)
    assert select_prompts(50, 50, 0, seed=4) not in (first, second)
    assert select_prompts(50, 7, 2, seed=3) == first[14:21]


@given(st.integers(1, 6), st.integers(1, 20), st.integers(1, 3), st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_no_draw_of_an_iteration_is_asked_for_twice(
    num_prompts: int, count: int, samples: int, iteration: int
) -> None:
    rows = select_prompts(num_prompts, count, iteration, seed=2)
    numbered = list(number_samples(rows, samples))
    assert [row for row, _ in numbered] == [row for row in rows for _ in range(samples)]
    assert len(set(numbered)) == count * samples
    if len(set(rows)) == count:  # runs without repeats keep the draws they always had
        assert numbered == [(row, number) for row in rows for number in range(samples)]
    for row in set(rows):  # dense: however often it comes
        numbers = sorted(number for other, number in numbered if other == row)
        assert numbers == list(range(rows.count(row) * samples))


@pytest.mark.parametrize("arguments", [(0, 1, 0, 0), (1, 0, 0, 0), (1, 1, -1, 0)])
def test_impossible_selections_are_refused(arguments: tuple[int, int, int, int]) -> None:
    with pytest.raises(MtopdError, match="at least one prompt"):
        select_prompts(*arguments)
