"""Weight files of an HF checkpoint, written tensor by tensor, by as many ranks as there are files.

What stands where follows from names, shapes and dtypes alone: the same weights give the same bytes,
whoever writes them and in whatever order they come.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mtopd.dtypes import safetensors_name
from mtopd.files import write_json
from mtopd.hf_weights import TensorSpec, cut
from mtopd.safetensors_file import header_bytes

SHARD_BYTES = 5 * 10**9  # as most of the hub's checkpoints are cut
INDEX = "model.safetensors.index.json"
_WRITE = 1 << 30  # bytes of a call: the system takes less than 2 GiB


@dataclass(frozen=True)
class Shard:
    """One weight file."""

    name: str
    tensors: tuple[TensorSpec, ...]


def plan_shards(tensors: Iterable[TensorSpec], shard_bytes: int = SHARD_BYTES) -> list[Shard]:
    """Tensors in their order, in files of at most ``shard_bytes``; a larger tensor has a file of its
    own.  What fits into one file is ``model.safetensors``, as everybody knows it.
    """
    parts = list(cut(tensors, shard_bytes, lambda tensor: tensor.nbytes))
    if len(parts) == 1:
        return [Shard("model.safetensors", tuple(parts[0]))]
    return [
        Shard(f"model-{number:05d}-of-{len(parts):05d}.safetensors", tuple(part))
        for number, part in enumerate(parts, start=1)
    ]


class ShardFile:
    """A weight file that is filled tensor by tensor, in any order; it has its whole size at once.

    Raises OSError, with the file's name, where it cannot be written.
    """

    def __init__(self, path: Path, tensors: Sequence[TensorSpec]) -> None:
        self._path = path
        # Wide dtypes first, so that every tensor begins at a multiple of its own.
        ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
        header = header_bytes(
            [(t.name, safetensors_name(t.dtype), t.shape) for t in ordered], {"format": "pt"}
        )
        self._places: dict[str, tuple[int, TensorSpec]] = {}
        end = len(header)
        for tensor in ordered:
            self._places[tensor.name] = end, tensor
            end += tensor.nbytes
        # Left open where writing fails: the start ends then.
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115
        self._write(memoryview(header), 0)
        os.ftruncate(self._file.fileno(), end)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Each tensor once, as it was announced."""
        start, spec = self._places.pop(name)
        assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, spec.dtype), (name, spec)
        if tensor.nbytes:
            bits = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            self._write(bits.numpy().data, start)

    def close(self) -> None:
        """Make it durable: all tensors have come."""
        assert not self._places, f"{self._path} lacks {min(self._places)}"
        try:
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def _write(self, data: memoryview, start: int) -> None:
        done = 0
        try:
            while done < len(data):
                piece = data[done : done + _WRITE]
                done += os.pwrite(self._file.fileno(), piece, start + done)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Say which file has which tensor, where there is more than one: written last."""
    if len(shards) > 1:
        total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
        files = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": files})
