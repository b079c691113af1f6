"""Which parallel sizes fit a model, and how that is said.

A size of an axis works when it divides everything the axis splits.  Promises:

- Every size that works is listed, and none that does not.
- A sentence about a size that does not work says what it does not divide, and which sizes work.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mtopd.types import MtopdError

# `--slices auto` asks for no more: tensor parallelism stays within a node
_MAX_AUTO_SLICES = 8


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel axes; ``etp`` of an expert's tensor parallelism."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int = 1

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    def __str__(self) -> str:
        axes = {"tp": self.tp, "pp": self.pp, "ep": self.ep, "dp": self.dp}
        return " ".join(f"{axis}{size}" for axis, size in axes.items() if size > 1) or "one rank"


def fitting_layouts(
    world_size: int, *, tp_counts: Iterable[int], num_layers: int, expert_counts: Sequence[int]
) -> Iterator[Layout]:
    """Layouts of a model on ``world_size`` ranks: every tp and pp that works.

    ``expert_counts``: experts of a layer and columns of an expert; without and with the largest ep.
    """
    for tp in working_sizes([*tp_counts, world_size]):
        for pp in working_sizes([num_layers, world_size // tp]):
            stage = world_size // pp
            layout = Layout(tp=tp, pp=pp, dp=stage // tp)
            if not expert_counts:
                yield layout
                continue
            experts, columns = expert_counts
            if columns % tp == 0:
                yield replace(layout, etp=tp)
            if (ep := working_sizes([experts, stage])[-1]) > 1:
                yield replace(layout, ep=ep)


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
