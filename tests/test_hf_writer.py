"""Weight files: which tensors in which file, the same bytes in whatever order they come."""

from __future__ import annotations

import json
import os
import random
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtopd.hf_checkpoint import HFTensors
from mtopd.hf_weights import TensorSpec
from mtopd.hf_writer import INDEX, ShardFile, plan_shards, write_index

TENSORS = {
    "b.odd": torch.arange(7).to(torch.bfloat16),
    "a.bias": torch.randn(5),
    "c.matrix": torch.randn(6, 4).T,  # not contiguous
    "d.empty": torch.zeros(0, 3),
    "e.scalar": torch.tensor(2.5),
}


def specs() -> list[TensorSpec]:
    return [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in TENSORS.items()]


def write(folder: Path, names: list[str], shard_bytes: int = 1 << 20) -> list[str]:
    """The tensors in the order ``names``; returns the files."""
    folder.mkdir()
    shards = plan_shards(specs(), shard_bytes)
    for shard in shards:
        file = ShardFile(folder / shard.name, shard.tensors)
        for name in names:
            if name in {tensor.name for tensor in shard.tensors}:
                file.write(name, TENSORS[name])
        file.close()
    write_index(folder, shards)
    return [shard.name for shard in shards]


def test_one_file_holds_what_the_librarys_holds_whatever_the_order(tmp_path: Path) -> None:
    names = list(TENSORS)
    assert write(tmp_path / "0", names) == ["model.safetensors"]
    for number in range(1, 4):
        random.Random(number).shuffle(names)
        write(tmp_path / str(number), names)
        assert os.listdir(tmp_path / str(number)) == ["model.safetensors"]
    contents = {(tmp_path / str(n) / "model.safetensors").read_bytes() for n in range(4)}
    assert len(contents) == 1
    found = load_file(tmp_path / "0" / "model.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    save_file({n: t.contiguous() for n, t in TENSORS.items()}, tmp_path / "ref", {"format": "pt"})
    data = sum(tensor.nbytes for tensor in TENSORS.values())
    assert (tmp_path / "ref").read_bytes()[-data:] == contents.pop()[-data:]


def test_more_than_a_file_holds_is_several_with_an_index(tmp_path: Path) -> None:
    names = write(tmp_path / "out", list(TENSORS), shard_bytes=40)
    assert names == [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*names, INDEX}
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    assert index["weight_map"]["c.matrix"] == names[1], "larger than a file: alone"
    found = HFTensors(tmp_path / "out")
    assert {name: found.file(name).name for name in found} == index["weight_map"]
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_what_was_announced_has_to_come_once_as_it_was(tmp_path: Path) -> None:
    (shard,) = plan_shards(specs())
    file = ShardFile(tmp_path / shard.name, shard.tensors)
    file.write("a.bias", TENSORS["a.bias"])
    with pytest.raises(KeyError):
        file.write("a.bias", TENSORS["a.bias"])
    with pytest.raises(AssertionError, match="odd"):
        file.write("b.odd", TENSORS["b.odd"].float())
    with pytest.raises(AssertionError, match=r"model\.safetensors lacks c\.matrix"):
        file.close()


def test_a_file_that_cannot_grow_is_named(tmp_path: Path) -> None:
    """By the limit on file sizes: like a full disk, one that the system answers with."""
    spec = TensorSpec("big", (1 << 20,), torch.uint8)
    file = ShardFile(tmp_path / "model.safetensors", [spec])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            file.write("big", torch.zeros(1 << 20, dtype=torch.uint8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.filename == str(tmp_path / "model.safetensors")
