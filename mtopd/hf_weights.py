"""Weights of HF folders in buckets: a part of a model at a time, so that no rank holds a copy of all.

A bucket is a dict from HF names to tensors, of bounded size; a model is an iterable of buckets in
which every tensor comes once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from mtopd.families import model_facts
from mtopd.hf_checkpoint import HFTensors, load_hf_config
from mtopd.types import MtopdError

T = TypeVar("T")
Bucket = dict[str, torch.Tensor]
BUCKET_BYTES = 256 << 20


@dataclass(frozen=True)
class TensorSpec:
    """An HF tensor before it is there."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def cut(items: Iterable[T], bucket_bytes: int, nbytes: Callable[[T], int]) -> Iterator[list[T]]:
    """Items in their order, as many at a time as ``bucket_bytes`` hold; a larger one comes alone."""
    found: list[T] = []
    total = 0
    for item in items:
        size = nbytes(item)
        if found and total + size > bucket_bytes:
            yield found
            found, total = [], 0
        found.append(item)
        total += size
        del item  # else the last of a bucket stays while the next one is read
    if found:
        yield found


def in_buckets(tensors: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int) -> Iterator[Bucket]:
    """Tensors in their order, as many in a bucket as ``bucket_bytes`` hold; a larger tensor has a
    bucket of its own.
    """
    return map(dict, cut(tensors, bucket_bytes, lambda pair: pair[1].nbytes))


def read_weights(folder: Path, bucket_bytes: int = BUCKET_BYTES) -> Iterator[Bucket]:
    """All tensors of an HF checkpoint that answering takes."""
    stored = HFTensors(folder)
    names = _names_that_answer(folder, stored)
    return in_buckets(((name, stored[name]) for name in names), bucket_bytes)


def average_weights(folders: Sequence[Path], bucket_bytes: int = BUCKET_BYTES) -> Iterator[Bucket]:
    """The plain mean of checkpoints, in the dtypes of the first: a running float32 sum, tensor by
    tensor.
    """
    check_average(folders)
    first, *others = [HFTensors(folder) for folder in folders]

    def mean(name: str) -> torch.Tensor:
        tensor = first[name]
        total = tensor.float()
        for other in others:
            total += other[name].float()
        return (total / len(folders)).to(tensor.dtype)

    names = _names_that_answer(folders[0], first)
    return in_buckets(((name, mean(name)) for name in names), bucket_bytes)


def check_average(folders: Sequence[Path]) -> None:
    """Raise MtopdError unless the checkpoints have the same tensors: only then is their mean that
    of models.
    """
    first, *others = folders
    wanted = _shapes_that_answer(first)
    for folder in others:
        found = _shapes_that_answer(folder)
        if differing := sorted(wanted.keys() ^ found.keys()):
            has, lacks = (first, folder) if differing[0] in wanted else (folder, first)
            raise MtopdError(
                f"{lacks} has no tensor {differing[0]!r}, which {has} has; they cannot be averaged"
            )
        for name, shape in wanted.items():
            if found[name] != shape:
                raise MtopdError(
                    f"{name!r} has shape {found[name]} in {folder} and {shape} in {first}; they "
                    "cannot be averaged"
                )


def _shapes_that_answer(folder: Path) -> dict[str, tuple[int, ...]]:
    stored = HFTensors(folder)
    return {name: stored.shape(name) for name in _names_that_answer(folder, stored)}


def _names_that_answer(folder: Path, stored: HFTensors) -> list[str]:
    facts = model_facts(load_hf_config(folder))
    tied = {"lm_head.weight"} if facts.has_tied_embeddings else set()
    return [
        name
        for name in stored
        if not (facts.is_behind_last(name) or name in tied or name.endswith("inv_freq"))
    ]
