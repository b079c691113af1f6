"""A bucket as a server reads one, and files for servers, without a server."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from mtopd.files import write_json
from mtopd.hf_checkpoint import HFTensors
from mtopd.rollout.sglang_broadcast import Piece, let_go, pieces
from mtopd.rollout.sglang_disk import MARK, make_folder, remove_folder, write_bucket, write_index
from mtopd.types import MtopdError


def read(piece: Piece) -> dict[str, torch.Tensor]:
    """As SGLang takes it apart: each tensor begins at a multiple of its own item size."""
    names, tensors, flat = piece
    found, start = {}, 0
    for name, tensor in zip(names, tensors, strict=True):
        assert start % tensor.itemsize == 0, name
        part = flat[start : start + tensor.nbytes]
        found[name] = part.view(tensor.dtype).view(tensor.shape)
        start += tensor.nbytes
    assert start == len(flat)
    return found


def block(*shapes: tuple[torch.dtype, int]) -> dict[str, torch.Tensor]:
    """Tensors of these lengths, one behind the other in one piece of memory."""
    memory = torch.arange(200, dtype=torch.uint8)
    found, start = {}, 0
    for number, (dtype, length) in enumerate(shapes):
        start += -start % dtype.itemsize
        stop = start + length * dtype.itemsize
        found[f"t{number}"] = memory[start:stop].view(dtype)
        start = stop
    return found


BF16, F32 = torch.bfloat16, torch.float32
ONE = block((F32, 4), (F32, 2), (BF16, 3))
CUT = {**ONE, "t1": ONE["t1"][:1]}  # rows of a vocabulary that no token has
ODD = block((BF16, 2), (BF16, 1), (F32, 3), (BF16, 1))  # a gap before the wide one
ASKEW = dict(list(block((BF16, 1), (BF16, 1), (F32, 2)).items())[1:])  # begins at an odd place


@pytest.mark.parametrize(
    ("bucket", "runs"),
    [
        (ONE, [["t0", "t1", "t2"]]),
        (CUT, [["t0", "t1"], ["t2"]]),
        (ODD, [["t0", "t1"], ["t2", "t3"]]),
        (ASKEW, [["t1"], ["t2"]]),
    ],
)
def test_what_lies_together_is_sent_without_a_copy(
    bucket: dict[str, torch.Tensor], runs: list[list[str]]
) -> None:
    found = pieces(bucket)
    assert [names for names, _, _ in found] == runs
    for piece in found:
        _, tensors, flat = piece
        assert flat.data_ptr() == tensors[0].data_ptr()
        for name, tensor in read(piece).items():
            assert torch.equal(tensor, bucket[name]), name


def test_what_lies_in_many_places_is_copied_into_one() -> None:
    torch.manual_seed(0)
    bucket = {f"t{n}": torch.randn(3, 2).to(BF16 if n % 2 else F32) for n in range(6)}
    bucket["t7"] = torch.randn(4, 3).T
    (piece,) = pieces(bucket)
    found = read(piece)
    assert found.keys() == bucket.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, bucket[name]), name


def test_files_of_many_writers_are_a_folder_that_is_whole_or_refused(tmp_path: Path) -> None:
    folder = tmp_path / "weights" / "000001"
    make_folder(folder)
    write_bucket(folder, 0, ONE)
    with pytest.raises(MtopdError, match=r"bucket-000001\.safetensors is not there"):
        write_index(folder, 2)
    write_bucket(folder, 1, {"last": torch.ones(3)})
    assert write_index(folder, 2) == {"t0": 16, "t1": 8, "t2": 6, "last": 12}
    stored = HFTensors(folder)
    for name, tensor in {**ONE, "last": torch.ones(3)}.items():
        assert torch.equal(stored[name], tensor) and stored[name].dtype == tensor.dtype


def test_only_folders_with_our_mark_are_removed(tmp_path: Path) -> None:
    left, foreign, folder = (tmp_path / name for name in ("000000", "mine", "000001"))
    make_folder(left)
    foreign.mkdir()
    make_folder(folder)
    assert not left.exists() and foreign.exists() and (folder / MARK).exists()
    remove_folder(foreign)
    remove_folder(folder)
    assert foreign.exists() and not folder.exists()


def test_where_the_former_starts_address_is_another_hosts_it_says_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note = tmp_path / "group.json"
    write_json(note, {"address": "192.0.2.1", "port": 29000, "size": 2})  # of no host (RFC 5737)
    with let_go(note):
        time.sleep(1.6)  # three looks
    said = capsys.readouterr().err
    assert said.count("looking for it at 192.0.2.1:29000, which cannot be had here") == 1, said
    assert "start it again" in said and not note.exists()
