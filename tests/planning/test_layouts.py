"""Sizes that work, and the sentences about those that do not."""

from __future__ import annotations

import random

import pytest

from mtopd.planning import choose_slices, in_words, sizes_that_work, undivided, working_sizes
from mtopd.types import MtopdError

SMOLLM2 = {"key-value heads": 3, "attention heads": 9, "columns in an FFN": 1536}


def test_every_size_that_works_is_listed_and_no_other() -> None:
    draw = random.Random(0)
    for _ in range(200):
        counts = [draw.choice((1, 2, 3)) * draw.randint(1, 64) for _ in range(draw.randint(1, 4))]
        expected = [n for n in range(1, max(counts) + 1) if not any(c % n for c in counts)]
        assert working_sizes(counts) == expected


def test_a_sentence_names_what_is_not_divided_and_what_works() -> None:
    assert undivided(4, SMOLLM2) == "3 key-value heads and 9 attention heads"
    assert undivided(3, SMOLLM2) == ""
    assert sizes_that_work("tp", working_sizes(SMOLLM2.values())) == "tp 1 or 3 work"
    assert sizes_that_work("ep", [1]) == "ep 1 works"
    assert in_words([1, 2, 4], "or") == "1, 2 or 4"


@pytest.mark.parametrize(
    ("counts", "slices"),
    [(SMOLLM2, 3), ({"heads": 64, "columns": 48}, 8), ({"heads": 7}, 7), ({"heads": 11}, 1)],
)
def test_auto_takes_as_many_slices_as_work_within_a_node(
    counts: dict[str, int], slices: int
) -> None:
    assert choose_slices("auto", counts, "m") == slices
    assert choose_slices(slices, counts, "m") == slices


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        (2, "slices 2: m has 3 key-value heads and 9 attention heads; slices 1 or 3 work, or auto"),
        (0, "^slices 0: slices 1 or 3 work, or auto$"),
        (-3, "^slices -3: slices 1 or 3 work, or auto$"),
    ],
)
def test_other_numbers_of_slices_are_refused(slices: int, message: str) -> None:
    with pytest.raises(MtopdError, match=message):
        choose_slices(slices, SMOLLM2, "m")
