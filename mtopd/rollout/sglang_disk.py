"""Weights to servers by way of files, where no broadcast can reach them.

Every rank writes the buckets that it has as safetensors files into a folder that servers see too; they
read it when all are there.  A folder of ours has a mark and goes with its update; one that a killed
start left goes with the next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import torch

from mtopd.files import explain, remove_tree, write_json
from mtopd.hf_checkpoint import HFTensors
from mtopd.hf_weights import TensorSpec
from mtopd.hf_writer import INDEX, ShardFile
from mtopd.progress import say
from mtopd.rollout.sglang_servers import Servers
from mtopd.rollout.sglang_weights import WeightUpdate
from mtopd.safetensors_file import read_header
from mtopd.types import MtopdError

MARK = "mtopd-weights"
_LOAD_S = 3600.0  # a server reads a model


class DiskUpdate(WeightUpdate):
    """An update by files in ``folder``, which begins to exist with it; rank 0's part."""

    def __init__(self, servers: Servers, version: str, folder: Path) -> None:
        super().__init__(servers, version)
        self._folder = folder

    async def begin(self) -> None:
        await super().begin()
        await asyncio.to_thread(make_folder, self._folder)
        self._lap("begin")

    async def send(self, number: int, bucket: Mapping[str, torch.Tensor]) -> None:
        await asyncio.to_thread(write_bucket, self._folder, number, bucket)

    async def end(self, count: int) -> None:
        """All ranks have written: let every member read."""
        sizes = await asyncio.to_thread(write_index, self._folder, count)
        self._num_bytes = sum(sizes.values())
        self._lap("buckets")
        body = {
            "model_path": str(self._folder),
            "load_format": "safetensors",
            "flush_cache": True,
            "weight_version": self._version,
        }
        await self._accept("/update_weights_from_disk", body, _LOAD_S)
        self._lap("load")
        if any(map(self._tells_bytes, self._members)):
            await asyncio.to_thread(self._add_sums, [*sizes])

    def _add_sums(self, names: list[str]) -> None:
        stored = HFTensors(self._folder)
        for name in names:
            self._sent.add(name, stored[name])

    async def close(self) -> None:
        try:
            await asyncio.to_thread(remove_folder, self._folder)
        except OSError as error:  # the update has ended, well or not
            say(f"{self._folder} is left behind ({explain(error)}); the next update removes it")


def make_folder(folder: Path) -> None:
    """An empty folder with our mark; those beside it that have one are of updates that are over."""
    for former in folder.parent.glob("*"):
        remove_folder(former)
    folder.mkdir(parents=True)
    (folder / MARK).touch()


def remove_folder(folder: Path) -> None:
    if (folder / MARK).is_file():
        remove_tree(folder)


def write_bucket(folder: Path, number: int, bucket: Mapping[str, torch.Tensor]) -> None:
    """Raises OSError, with the file's name, where it cannot be written."""
    specs = [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in bucket.items()]
    file = ShardFile(folder / _file_name(number), specs)
    for name, tensor in bucket.items():
        file.write(name, tensor)
    file.close()


def write_index(folder: Path, count: int) -> dict[str, int]:
    """Look whether ``count`` buckets are there, whole; returns the bytes of each of their tensors.
    Raises MtopdError.
    """
    files: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for number in range(count):
        path = folder / _file_name(number)
        if not path.is_file():
            raise MtopdError(
                f"{path} is not there, which a rank has written: with rollout.weights disk the run "
                "directory has to be on a file system that all hosts of the run share"
            )
        for entry in read_header(path):
            files[entry.name], sizes[entry.name] = path.name, entry.stop - entry.start
    write_json(folder / INDEX, {"metadata": {}, "weight_map": files})
    return sizes


def _file_name(number: int) -> str:
    return f"bucket-{number:06d}.safetensors"
