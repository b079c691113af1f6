"""What is asked is looked up, not held."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from mtopd.rollout.asked import Asked, Requests
from mtopd.rollout.engine import Request
from mtopd.types import Prompt

TOKENS = 250


class Table(Sequence[Prompt]):
    """Builds a prompt whenever it is asked for one, as the mapped table does."""

    def __init__(self, name: str, rows: int) -> None:
        self.name = name
        self.rows = rows
        self.built = 0

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: Any) -> Prompt:
        self.built += 1
        return Prompt(f"{self.name}/{row}", {"domain": self.name}, ids_of(row), 0)


def ids_of(row: int) -> tuple[int, ...]:
    return tuple(range(1000 + row, 1000 + row + TOKENS))


def some(rows: int, samples: int) -> tuple[list[Table], Asked]:
    """Both tables' rows from the last to the first, each several times."""
    tables = [Table("a", rows), Table("b", rows)]
    count = 2 * rows * samples
    row_N = np.tile(np.repeat(np.arange(rows)[::-1], samples), 2)
    table_N, sample_N = np.repeat([0, 1], count // 2), np.tile(np.arange(samples), 2 * rows)
    iteration_N = np.arange(count) // 8
    return tables, Asked(tables, np.arange(count), table_N, row_N, sample_N, iteration_N)


def test_samples_are_found_by_their_ids() -> None:
    _, asked = some(5, 3)
    expected = [
        Request(number, f"{name}/{row}", ids_of(row), k, iteration=number // 8)
        for t, name in enumerate("ab")
        for row in range(4, -1, -1)
        for k in range(3)
        for number in [15 * t + 3 * (4 - row) + k]
    ]
    assert [*asked] == [*range(30)]
    assert [request for _, request in asked.values()] == expected
    assert all(prompt.prompt_ids is request.prompt_ids for prompt, request in asked.values())
    odd = asked.where(np.arange(30) % 2 == 1)
    assert [request for _, request in odd.values()] == expected[1::2]
    assert 1 in odd and 0 not in odd and 30 not in odd
    for missing in (0, 30):
        with pytest.raises(KeyError):
            odd[missing]
    some_of = Requests(odd, np.array([9, 3, 5]))
    assert [*some_of] == [expected[9], expected[3], expected[5]]
    assert some_of[1:] == [expected[3], expected[5]] and len(some_of) == 3


def test_prompts_are_held_a_few_at_a_time() -> None:
    tables, asked = some(2000, 2)
    tracemalloc.start()
    for sample_id, request in zip(asked, Requests(asked, np.arange(8000)), strict=True):
        assert request.sample_id == sample_id
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [table.built for table in tables] == [2000, 2000], "once for all samples of a row"
    assert peak < 0.4 * 4000 * TOKENS * 36, "bytes of all prompts' numbers"
