"""Which parallel sizes fit a model, and how that is said.

A size of an axis works when it divides everything the axis splits.  Promises:

- Every size that works is listed, and none that does not.
- A sentence about a size that does not work says what it does not divide, and which sizes work.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from mtopd.types import MtopdError

# `--slices auto` asks for no more: tensor parallelism stays within a node
_MAX_AUTO_SLICES = 8


def working_sizes(counts: Iterable[int]) -> list[int]:
    """The sizes that divide every count, 1 among them."""
    common = math.gcd(*counts)
    return [size for size in range(1, common + 1) if common % size == 0] if common else [1]


def undivided(size: int, counts: Mapping[str, int]) -> str:
    """What ``size`` does not divide, as "3 key-value heads and 9 attention heads"; empty where it
    divides all.
    """
    return in_words([f"{count} {what}" for what, count in counts.items() if count % size], "and")


def in_words(items: Sequence[object], last: str) -> str:
    """As "1, 2 or 4"; ``last`` is the word before the last item."""
    *others, final = [str(item) for item in items] or [""]
    return f"{', '.join(others)} {last} {final}" if others else final


def sizes_that_work(axis: str, sizes: Sequence[int]) -> str:
    """As "tp 1 or 3 work", "ep 1 works"."""
    return f"{axis} {in_words(sizes, 'or')} {'works' if len(sizes) == 1 else 'work'}"


def choose_slices(wanted: int | Literal["auto"], counts: Mapping[str, int], model: str) -> int:
    """How many slices a model's teacher store is cut into; ``counts`` is what they divide.

    auto: as many as work, up to 8.  Raises MtopdError for a number that does not work.
    """
    sizes = working_sizes(counts.values())
    if wanted == "auto":
        return max(size for size in sizes if size <= _MAX_AUTO_SLICES)
    if wanted not in sizes:
        why = undivided(wanted, counts) if wanted > 0 else ""
        has = f"{model} has {why}; " if why else ""
        raise MtopdError(f"slices {wanted}: {has}{sizes_that_work('slices', sizes)}, or auto")
    return wanted
