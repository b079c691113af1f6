"""The teacher store: exact tensors for every tp, checksums, fingerprints, and what a damaged store
is refused for.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from mtopd.convert.teacher import add_teacher
from mtopd.safetensors_file import read_header
from mtopd.teacher_offload import store as store_module
from mtopd.teacher_offload.storage import FolderStorage
from mtopd.teacher_offload.store import (
    TeacherStore,
    check_files,
    open_store,
    read_blocks,
    read_range,
)
from mtopd.types import MtopdError
from tests.small_models import save_model

LAYER = "layers/00001.safetensors"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "BLOCK_BYTES", 4096)  # so that small models have many blocks


@pytest.fixture
def model_and_store(tmp_path: Path) -> tuple[torch.nn.Module, TeacherStore]:
    model = save_model(tmp_path / "hf", seed=1, layers=2, tied=False, vocab=109)
    return model, add_teacher("t", tmp_path / "hf", tmp_path / "t", slices=2)


def tensor(store: TeacherStore, path: str, name: str) -> torch.Tensor:
    (entry,) = [e for e in store.files[path].entries if e.name == name]
    data, _ = read_range(store.files[path], entry.start, entry.stop)
    return torch.from_numpy(np.array(data)).view(torch.float32).view(entry.shape)


def test_a_rank_opens_a_store_by_its_manifest_alone(
    model_and_store: tuple[torch.nn.Module, TeacherStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank opens every store: one file each, and not a byte of the files in it, however many
    those are.  Whether they are whole is looked at once, before the ranks start.
    """
    _, store = model_and_store
    read_into, found = FolderStorage.read_into, list[tuple[str, int]]()

    def counted(storage: FolderStorage, path: str, start: int, out: np.ndarray) -> None:
        found.append((path, len(out)))
        read_into(storage, path, start, out)

    monkeypatch.setattr(FolderStorage, "read_into", counted)
    opened = open_store(store.location)
    assert found == [("teacher.json", Path(store.location, "teacher.json").stat().st_size)]
    check_files(opened)
    assert {path for path, _ in found[1:]} == set(store.files) and len(found) == 1 + len(
        store.files
    )


def test_slices_join_to_the_checkpoints_tensors(
    model_and_store: tuple[torch.nn.Module, TeacherStore],
) -> None:
    model, store = model_and_store
    hf = dict(model.named_parameters())

    def joined(path: str, name: str) -> torch.Tensor:
        return torch.cat([tensor(store, path, f"slice.{i:04d}/{name}") for i in range(2)])

    assert torch.equal(
        joined(LAYER, "mlp.linear_fc1.weight.gate"), hf["model.layers.1.mlp.gate_proj.weight"]
    )
    assert torch.equal(
        joined(LAYER, "mlp.linear_fc1.weight.up"), hf["model.layers.1.mlp.up_proj.weight"]
    )
    assert torch.equal(
        joined(LAYER, "mlp.linear_fc2.weight.T").T, hf["model.layers.1.mlp.down_proj.weight"]
    )
    assert torch.equal(
        joined(LAYER, "self_attention.linear_proj.weight.T").T,
        hf["model.layers.1.self_attn.o_proj.weight"],
    )
    # 2 groups of 2 q heads, k, v of 16.
    qkv = joined(LAYER, "self_attention.linear_qkv.weight").view(2, 64, 64)
    assert torch.equal(qkv[:, 32:48].reshape(-1, 64), hf["model.layers.1.self_attn.k_proj.weight"])
    assert torch.equal(qkv[:, :32].reshape(-1, 64), hf["model.layers.1.self_attn.q_proj.weight"])
    head = joined("head.safetensors", "weight")
    assert (
        head.shape[0] == 110
        and torch.equal(head[:109], hf["lm_head.weight"])
        and not head[109:].any()
    )
    assert torch.equal(
        tensor(store, "final_norm.safetensors", "common/weight"), hf["model.norm.weight"]
    )


def test_a_ranks_part_is_one_range_of_whole_blocks(
    model_and_store: tuple[torch.nn.Module, TeacherStore],
) -> None:
    _, store = model_and_store
    for path in store.files:
        file = store.files[path]
        for section in (
            file.common(),
            file.slices(0, 1),
            file.slices(1, 1),
            file.slices(0, 2),
        ):
            if section:
                assert [a.stop for a in section[:-1]] == [b.start for b in section[1:]]
                blocks = file.blocks_of(section[0].start, section[-1].stop)
                assert (blocks[0].start, blocks[-1].stop) == (section[0].start, section[-1].stop)
        assert [b.stop for b in file.blocks[:-1]] == [b.start for b in file.blocks[1:]]
        assert file.blocks[-1].stop == Path(file.label).stat().st_size


def test_the_tied_matrix_stands_once(tmp_path: Path) -> None:
    save_model(tmp_path / "hf", seed=1, layers=2, tied=True)
    store = add_teacher("t", tmp_path / "hf", tmp_path / "t", slices=1)
    assert (
        "head.safetensors" not in store.files and store.head is store.files["embedding.safetensors"]
    )


def test_the_fingerprint_names_the_bytes(tmp_path: Path) -> None:
    save_model(tmp_path / "a", seed=1, layers=2)
    save_model(tmp_path / "b", seed=2, layers=2)
    first = add_teacher("x", tmp_path / "a", tmp_path / "s1", slices=2)
    again = add_teacher("another name", tmp_path / "a", tmp_path / "s2", slices=2)
    other = add_teacher("x", tmp_path / "b", tmp_path / "s3", slices=2)
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_a_flipped_bit_is_found_when_its_block_is_read(
    model_and_store: tuple[torch.nn.Module, TeacherStore],
) -> None:
    _, store = model_and_store
    file = store.files[LAYER]
    with open(file.label, "r+b") as handle:
        handle.seek(-10, os.SEEK_END)
        byte = handle.read(1)
        handle.seek(-1, os.SEEK_CUR)
        handle.write(bytes([byte[0] ^ 1]))
    store = open_store(store.location)  # sizes and headers are right
    read_range(store.files[LAYER], file.blocks[1].start, file.blocks[1].stop)
    last = store.files[LAYER].blocks[-1]
    with pytest.raises(MtopdError, match=r"00001\.safetensors.*checksum"):
        read_blocks(store.files[LAYER], [last], np.empty(last.stop - last.start, np.uint8))


def test_checking_files_reads_headers_alone_and_many_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a storage that answers no request before it has one for each of 14 files, checking
    them takes two rounds: the sizes of all files, then their headers, and nothing else.
    """
    save_model(tmp_path / "hf", seed=1, layers=12)
    add_teacher("t", tmp_path / "hf", tmp_path / "t", slices=2)
    lock, read = threading.Lock(), 0
    rounds = {
        "size": threading.Barrier(14, timeout=60),
        "header": threading.Barrier(14, timeout=60),
    }

    class Far(FolderStorage):
        def size(self, path: str) -> int | None:
            if path != "teacher.json":
                rounds["size"].wait()
            return super().size(path)

        def read_into(self, path: str, start: int, out: np.ndarray) -> None:
            nonlocal read
            if path != "teacher.json":
                rounds["header"].wait()
                with lock:
                    read += len(out)
            super().read_into(path, start, out)

    monkeypatch.setattr(store_module, "open_storage", Far)
    store = check_files(open_store(tmp_path / "t"))
    assert len(store.files) == 14
    assert read == sum(entry["header_bytes"] for entry in store.manifest["files"].values())


def spoil_manifest(folder: Path, change: object) -> None:
    path = folder / "teacher.json"
    manifest = json.loads(path.read_text())
    change(manifest)  # type: ignore[operator]
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update(schema="mtopd.teacher_store/9"), "schema"),
        (lambda m: m["files"].pop(LAYER), LAYER),
        (lambda m: m["files"][LAYER].update(sha256="0" * 64), "sha256"),
        (lambda m: m["files"][LAYER]["block_crc32c"].__setitem__(1, 7), "checksums"),
        (lambda m: m.update(fingerprint="0" * 64), "fingerprint"),
        (lambda m: m["files"].update({"/etc/hostname": m["files"][LAYER]}), "inside its folder"),
        (lambda m: m["files"].update({"../t/" + LAYER: m["files"][LAYER]}), "inside its folder"),
        (lambda m: m.pop("num_layers"), "malformed"),
        (lambda m: m["files"][LAYER].update(size=7), "malformed"),
        (lambda m: m["files"][LAYER].update(header_bytes=-8), "malformed"),
        (lambda m: m["files"][LAYER]["tensors"].pop(1), "starts at byte"),
        (lambda m: m["files"][LAYER]["tensors"][0].__setitem__(1, "F7"), "malformed"),
        (lambda m: m["files"][LAYER]["tensors"][0].__setitem__(2, [3]), "malformed"),
        (lambda m: m["files"][LAYER]["tensors"][0].__setitem__(3, "8"), "malformed"),
        (lambda m: m["files"][LAYER].update(tensors=[]), "malformed"),
    ],
)
def test_a_changed_manifest_is_refused(
    model_and_store: tuple[torch.nn.Module, TeacherStore], change: object, said: str
) -> None:
    _, store = model_and_store
    spoil_manifest(Path(store.location), change)
    with pytest.raises(MtopdError, match=said):
        open_store(store.location)


def test_a_link_out_of_the_store_is_refused(
    model_and_store: tuple[torch.nn.Module, TeacherStore], tmp_path: Path
) -> None:
    _, store = model_and_store
    outside = tmp_path / "outside.safetensors"
    os.replace(Path(store.location) / LAYER, outside)
    (Path(store.location) / LAYER).symlink_to(outside)
    with pytest.raises(MtopdError, match="link out of the store"):
        check_files(open_store(store.location))
    last = store.files[LAYER].blocks[-1]
    with pytest.raises(MtopdError, match="link out of the store"):  # a rank's read, too
        read_range(open_store(store.location).files[LAYER], last.start, last.stop)


def test_other_tensors_than_the_headers_are_refused_before_the_ranks_start(
    model_and_store: tuple[torch.nn.Module, TeacherStore],
) -> None:
    _, store = model_and_store

    def swap(manifest: dict) -> None:
        tensors = manifest["files"][LAYER]["tensors"]
        first, second, *_ = (i for i, t in enumerate(tensors) if t[0].endswith((".gate", ".up")))
        tensors[first][0], tensors[second][0] = tensors[second][0], tensors[first][0]

    spoil_manifest(Path(store.location), swap)
    with pytest.raises(MtopdError, match=f"{LAYER} holds other tensors than its manifest says"):
        check_files(open_store(store.location))


@pytest.mark.parametrize("layers", [1, 5])
def test_a_rank_opens_a_store_by_one_read_however_many_files_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int
) -> None:
    save_model(tmp_path / "hf", seed=1, layers=layers)
    store = add_teacher("t", tmp_path / "hf", tmp_path / "t", slices=2)
    touched: list[str] = []

    class Counting:
        """A storage that notes which file every call is about."""

        def __init__(self, folder: Path) -> None:
            self._storage = FolderStorage(folder)

        def __getattr__(self, name: str) -> object:
            found = getattr(self._storage, name)
            return (
                (lambda path, *rest: (touched.append(path), found(path, *rest))[1])
                if callable(found)
                else found
            )

    monkeypatch.setattr(store_module, "open_storage", Counting)
    opened = open_store(tmp_path / "t", expected=store.fingerprint)
    assert touched == ["teacher.json"]
    assert {p: (f.entries, f.blocks) for p, f in opened.files.items()} == {
        p: (f.entries, f.blocks) for p, f in store.files.items()
    }
    check_files(opened)
    assert set(touched) == {"teacher.json", *opened.files} and len(opened.files) == layers + 2


def test_another_store_than_the_run_began_with_is_refused(
    model_and_store: tuple[torch.nn.Module, TeacherStore],
) -> None:
    _, store = model_and_store
    with pytest.raises(MtopdError, match=f"holds the fingerprint {store.fingerprint[:16]}"):
        open_store(store.location, expected="0" * 64)


def test_a_run_calls_a_teacher_as_its_config_does(
    model_and_store: tuple[torch.nn.Module, TeacherStore],
) -> None:
    _, store = model_and_store
    named = [open_store(store.location, name=name) for name in ("math-a", "code-b", None)]
    assert [s.name for s in named] == ["math-a", "code-b", store.manifest["name"]]
    assert len({s.fingerprint for s in named}) == 1, "they are the same bytes all the same"


def test_a_failed_add_leaves_nothing(tmp_path: Path) -> None:
    save_model(tmp_path / "hf", seed=1, layers=2)
    weights = tmp_path / "hf" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 4)
    with pytest.raises(MtopdError, match="truncated"):
        add_teacher("t", tmp_path / "hf", tmp_path / "stores" / "t", slices=2)
    assert not (tmp_path / "stores").exists()


def test_slices_must_divide_the_architecture(tmp_path: Path) -> None:
    save_model(tmp_path / "hf", seed=1, layers=2)
    with pytest.raises(MtopdError, match=r"slices 3: .* has 2 key-value heads.*slices 1 or 2 work"):
        add_teacher("t", tmp_path / "hf", tmp_path / "t", slices=3)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"\xff" * 8, "claims"),
        (b"\x02\0\0\0\0\0\0\0[]", "not a table"),
        (b"\x02\0\0\0\0\0\0\0{{", "not JSON"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', "malformed"),
        (b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', "malformed"),
        (b'{"a":{"dtype":4,"shape":[1],"data_offsets":[0,4]}}', "malformed"),
        (b'{"a":{"dtype":"F4","shape":[8],"data_offsets":[0,4]}}', "'a' has dtype 'F4', which is"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', "starts at byte"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "truncated"),
    ],
)
def test_a_hostile_header_is_refused(tmp_path: Path, header: bytes, said: str) -> None:
    if header.startswith(b"{"):
        header = len(header).to_bytes(8, "little") + header
    path = tmp_path / "x.safetensors"
    path.write_bytes(header)
    with pytest.raises(MtopdError, match=said):
        read_header(path)
