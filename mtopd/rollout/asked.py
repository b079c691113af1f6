"""What is asked of an engine, built when it is looked at: a rank holds 24 bytes a sample, whatever its
prompt, and the prompts that it has looked at last.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, overload

import numpy as np
import numpy.typing as npt

from mtopd.rollout.engine import Request
from mtopd.types import Prompt

_PROMPTS_AT_ONCE = 1024
Integers = npt.NDArray[np.integer[Any]]


class Table(Protocol):
    """Prompts by row."""

    def __getitem__(self, row: int, /) -> Prompt: ...


class Asked(Mapping[int, tuple[Prompt, Request]]):
    """By sample id, in ascending order: sample ``id_N[i]`` is response number ``sample_N[i]`` to the
    prompt in row ``row_N[i]`` of ``tables[table_N[i]]``, as iteration ``iteration_N[i]`` planned it.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        id_N: Integers,
        table_N: Integers,
        row_N: Integers,
        sample_N: Integers,
        iteration_N: Integers,
    ) -> None:
        self._tables = tables
        self._id_N = id_N.astype(np.int64)
        columns = table_N, row_N, sample_N, iteration_N
        self._columns = [column.astype(np.int32) for column in columns]
        assert (np.diff(self._id_N) > 0).all(), "sample ids ascend"
        # Samples of a row are neighbours, and share the object.
        self._prompt = functools.lru_cache(_PROMPTS_AT_ONCE)(lambda t, row: tables[t][row])

    def where(self, is_asked_N: npt.NDArray[np.bool_]) -> Asked:
        """These samples alone."""
        columns = (column[is_asked_N] for column in self._columns)
        return Asked(self._tables, self._id_N[is_asked_N], *columns)

    def __len__(self) -> int:
        return len(self._id_N)

    def __iter__(self) -> Iterator[int]:
        return map(int, self._id_N)

    def __contains__(self, sample_id: object) -> bool:
        return isinstance(sample_id, int) and self._place(sample_id) is not None

    def __getitem__(self, sample_id: int) -> tuple[Prompt, Request]:
        place = self._place(sample_id)
        if place is None:
            raise KeyError(sample_id)
        table, row, sample, iteration = (int(column[place]) for column in self._columns)
        prompt = self._prompt(table, row)
        return prompt, Request(
            sample_id, prompt.prompt_id, prompt.prompt_ids, sample, iteration=iteration
        )

    def _place(self, sample_id: int) -> int | None:
        place = int(np.searchsorted(self._id_N, sample_id))
        return place if place < len(self) and self._id_N[place] == sample_id else None


class Requests(Sequence[Request]):
    """Those of ``asked`` with these ids, in this order."""

    def __init__(self, asked: Mapping[int, tuple[Prompt, Request]], id_N: Integers) -> None:
        self._asked = asked
        self._id_N = id_N

    def __len__(self) -> int:
        return len(self._id_N)

    @overload
    def __getitem__(self, index: int) -> Request: ...
    @overload
    def __getitem__(self, index: slice) -> list[Request]: ...
    def __getitem__(self, index: int | slice) -> Request | list[Request]:
        if isinstance(index, slice):
            return [self._asked[int(sample_id)][1] for sample_id in self._id_N[index]]
        return self._asked[int(self._id_N[index])][1]
