"""``teachers add`` is streaming, resumable and atomic; removing spares what is not ours."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from mtopd.convert import teacher as teacher_module
from mtopd.convert.bridge import Bridge
from mtopd.convert.layer_parts import Parts, layer_parts
from mtopd.convert.teacher import add_teacher
from mtopd.dtypes import torch_dtype
from mtopd.hf_checkpoint import HFTensors
from mtopd.pipelines import cli
from mtopd.safetensors_file import read_header
from mtopd.teacher_offload.names import experts_path
from mtopd.teacher_offload.store import (
    TeacherStore,
    damaged_blocks,
    open_store,
    read_range,
)
from mtopd.teacher_offload.store_writer import StoreWriter, adding_folder, bears_mark, remove_store
from mtopd.tokenizer import load_tokenizer
from mtopd.types import MtopdError
from tests.conftest import REPOSITORY, on_small_disk
from tests.small_models import save_model
from tests.teacher_offload import kill_add


class Stopped(Exception):
    pass


def stop_after(files: int) -> object:
    def progress(done: int, total: int) -> None:
        if done == files:
            raise Stopped

    return progress


def interrupted(source: Path, target: Path, files: int) -> dict[str, int]:
    """Start an add that ends after ``files`` files; those files' times of change."""
    with pytest.raises(Stopped):
        add_teacher("t", source, target, slices=2, progress=stop_after(files))  # type: ignore[arg-type]
    assert not target.exists() and bears_mark(adding_folder(target))
    paths = adding_folder(target).rglob("*.safetensors")
    return {str(p.relative_to(adding_folder(target))): p.stat().st_mtime_ns for p in paths}


def unchanged(target: Path, before: dict[str, int]) -> set[str]:
    return {
        path for path, changed in before.items() if (target / path).stat().st_mtime_ns == changed
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_model(tmp_path / "hf", seed=1, layers=4, tied=False)
    return tmp_path / "hf"


def test_an_interrupted_add_goes_on_where_it_was(source: Path, tmp_path: Path) -> None:
    whole = add_teacher("t", source, tmp_path / "whole", slices=2)
    target = tmp_path / "stores" / "t"
    before = interrupted(source, target, 3)
    assert len(before) == 3
    assert add_teacher("t", source, target, slices=2).fingerprint == whole.fingerprint
    assert unchanged(target, before) == set(before)
    assert sorted(p.name for p in target.iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )
    again = {path: (target / path).stat().st_mtime_ns for path in before}
    # The same command once more.
    assert add_teacher("t", source, target, slices=2).fingerprint == whole.fingerprint
    assert unchanged(target, again) == set(again)


def test_a_finished_file_that_was_damaged_is_written_again(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "stores" / "t"
    before = interrupted(source, target, 3)
    with open(adding_folder(target) / "layers/00000.safetensors", "r+b") as file:
        file.seek(5000)
        file.write(b"\1\2\3")
    store = add_teacher("t", source, target, slices=2)
    assert unchanged(target, before) == set(before) - {"layers/00000.safetensors"}
    assert not damaged_blocks(store.layer(0))


@pytest.mark.parametrize("change", ["weights", "slices", "softcap"])
def test_another_source_starts_over(source: Path, tmp_path: Path, change: str) -> None:
    """Weights of the same shapes under the same path are another source: two teachers' files never
    mix.
    """
    target = tmp_path / "stores" / "t"
    before = interrupted(source, target, 3)
    options: dict[str, float] = {"slices": 2}
    if change == "weights":
        save_model(source, seed=2, layers=4, tied=False)
    else:
        options[change] = 1 if change == "slices" else 30.0
    store = add_teacher("t", source, target, **options)  # type: ignore[arg-type]
    assert unchanged(target, before) == set()
    assert store.fingerprint == add_teacher("u", source, tmp_path / "u", **options).fingerprint  # type: ignore[arg-type]
    assert store.manifest["head"]["softcap"] == options.get("softcap")
    with pytest.raises(MtopdError, match="holds another teacher"):
        add_teacher("t", source, target, slices=2, logit_scale=0.5)


@pytest.mark.parametrize(
    "options", [{"logit_scale": 0.0}, {"softcap": -1.0}, {"softcap": float("nan")}]
)
def test_a_head_transform_that_makes_no_sense_is_refused(
    source: Path, tmp_path: Path, options: dict[str, float]
) -> None:
    with pytest.raises(MtopdError, match="must be a positive number"):
        add_teacher("t", source, tmp_path / "t", slices=2, **options)  # type: ignore[arg-type]


def test_a_token_added_to_the_tokenizer_alone_does_not_matter(source: Path, tmp_path: Path) -> None:
    """The pad token that was added for training, without a row: the model never answers with it."""
    folder, said = source, []
    plain = add_teacher("t", folder, tmp_path / "plain", slices=1)
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    found = add_teacher("t", folder, tmp_path / "padded", slices=1, say=said.append)
    assert (found.vocab_size, found.fingerprint) == (plain.vocab_size, plain.fingerprint)
    assert found.manifest["probe"] == plain.manifest["probe"]
    assert said == [
        f"{folder}: the model has no rows for '[PAD]', added to its tokenizer: it never answers with them"
    ]
    table = json.loads((folder / "tokenizer.json").read_text())
    table["added_tokens"] = [t for t in table["added_tokens"] if t["content"] != "[PAD]"]
    table["model"]["vocab"]["word"] = plain.vocab_size
    (folder / "tokenizer.json").write_text(json.dumps(table))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "<pad>"}))
    with pytest.raises(
        MtopdError, match=r"rows for them, none for 'word': one of the two is another"
    ):
        add_teacher("t", folder, tmp_path / "other", slices=1)


def test_one_writer_at_a_time(source: Path, tmp_path: Path) -> None:
    with (
        StoreWriter(tmp_path / "t", "somebody else"),
        pytest.raises(MtopdError, match="being written by another process"),
    ):
        add_teacher("t", source, tmp_path / "t", slices=2)
    assert add_teacher("t", source, tmp_path / "t", slices=2).name == "t"


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lustre without the flock option, FUSE (tox-dev/filelock#67)."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(MtopdError, match=rf"{tmp_path}: its file system has no locks \(flock: Func"),
        StoreWriter(tmp_path / "t", "source"),
    ):
        pass


def test_a_writer_that_is_overtaken_locks_the_folder_that_is_there_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening the lock file and locking it, another writer publishes: its folder is not
    ours to write.
    """
    moved, real = tmp_path / "moved", fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        if not moved.exists():
            os.rename(adding_folder(tmp_path / "t"), moved)
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with StoreWriter(tmp_path / "t", "source") as writer:
        assert sorted(p.name for p in writer.folder.iterdir()) == ["adding.json", "lock"]
        assert [p.name for p in moved.iterdir()] == ["lock"]


def test_kills_at_random_instants(tmp_path: Path) -> None:
    line = kill_add.run(6, tmp_path, seed=7)
    assert line.startswith("teachers add: 6 SIGKILLs")


def worker(name: str, *arguments: Path, before: tuple[str, ...] = ()) -> str:
    command = [
        *before,
        sys.executable,
        "-W",
        "ignore",
        "-m",
        f"tests.teacher_offload.{name}",
        *map(str, arguments),
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=REPOSITORY, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_memory_is_bounded_by_one_layer(source: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "large", seed=1, hidden=640, layers=10)
    # glibc maps tensors of a real layer (from 32 MiB on) one by one; make it do so with these small
    # ones, or its heap's fragments are measured.
    small_maps = ("env", "MALLOC_MMAP_THRESHOLD_=65536")
    grown = int(
        worker("add_memory", source, tmp_path / "large", tmp_path / "stores", before=small_maps)
    )
    store = open_store(tmp_path / "stores" / "large")
    layer = max(file.blocks[-1].stop for file in store.files.values())
    assert store.pass_bytes() > 9 * layer
    assert grown < 2 * layer, f"grew by {grown / layer:.2f} layers of {layer} bytes"


def test_a_full_disk_leaves_no_store_and_spares_the_others(source: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    said = worker("full_disk", disk, source, before=tuple(on_small_disk(disk, megabytes=4)))
    assert said.startswith("full disk: refused twice")


# -- experts and mixed dtypes ----------------------------------------------------------------------


def with_experts(
    bridge: Bridge, tensors: HFTensors, layer: int, slices: int
) -> tuple[Parts, Parts]:
    """A dense layer's parts, and for layers from 1 on three experts and a float32 router bias
    beside bfloat16.
    """
    parts, _ = layer_parts(bridge, tensors, layer, slices)
    parts = [(name, tensor.to(torch.bfloat16)) for name, tensor in parts]
    if layer == 0:
        return parts, []
    generator = torch.Generator().manual_seed(layer)
    # What follows it is not aligned.
    odd = ("common/odd", torch.randn(3, generator=generator).to(torch.bfloat16))
    bias = ("common/mlp.router.expert_bias", torch.randn(3, generator=generator))
    experts = [
        (
            f"expert.{i:04d}/linear_fc{n}.weight",
            torch.randn(24, 5, generator=generator).to(torch.bfloat16),
        )
        for i in range(3)
        for n in (1, 2)
    ]
    return [odd, bias, *parts], experts


def test_experts_are_ranges_of_their_own_file(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_module, "layer_parts", with_experts)
    target = tmp_path / "t"
    interrupted(source, target, 3)
    (
        adding_folder(target) / experts_path(1)
    ).unlink()  # a layer is reused with its experts or not at all
    store = add_teacher("t", source, target, slices=2)
    assert store.num_experts == 3 and store.experts(0) is None
    file = store.experts(1)
    assert file is not None
    for first, count in ((0, 1), (1, 2), (0, 3)):
        part = file.experts(first, count)
        assert [e.name.partition("/")[0] for e in part] == [
            f"expert.{i:04d}" for i in range(first, first + count) for _ in "ab"
        ]
        blocks = file.blocks_of(part[0].start, part[-1].stop)
        assert (blocks[0].start, blocks[-1].stop) == (part[0].start, part[-1].stop)
        assert all(a.stop == b.start for a, b in pairwise(part))
    dense = sum(
        e.stop - e.start
        for p, f in store.files.items()
        if p[:4] not in ("expe", "head")
        for e in f.entries
    )
    assert store.pass_bytes() == dense + 3 * 3 * 2 * 24 * 5 * 2


def value(store: TeacherStore, path: str, name: str) -> torch.Tensor:
    (entry,) = [e for e in store.files[path].entries if e.name == name]
    data, _ = read_range(store.files[path], entry.start, entry.stop)
    return torch.from_numpy(np.array(data)).view(torch_dtype(entry.dtype)).view(entry.shape)


def test_each_tensor_keeps_its_dtype_and_is_aligned(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_module, "layer_parts", with_experts)
    store = add_teacher("t", source, tmp_path / "t", slices=2)
    bias = dict(with_experts_tensors(source))["common/mlp.router.expert_bias"]
    assert torch.equal(
        value(store, "layers/00001.safetensors", "common/mlp.router.expert_bias"), bias
    )
    for file in store.files.values():
        for entry in read_header(Path(file.label)):
            assert entry.start % (4 if entry.dtype == "F32" else 2) == 0, entry


def with_experts_tensors(source: Path) -> Parts:
    from mtopd.hf_checkpoint import load_hf_config

    config = load_hf_config(source)
    bridge = Bridge(config, dtype=torch.float32, padded_vocab_size=config.vocab_size, tp=1)
    return with_experts(bridge, HFTensors(source), 1, 2)[0]


# -- removing and listing --------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["mtopd", "teachers", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_rm_removes_a_store_and_what_an_add_left_and_nothing_else(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stores = tmp_path / "stores"
    add_teacher("t", source, stores / "t", slices=2)
    interrupted(source, stores / "u", 2)
    (stores / "mine").mkdir()
    (stores / "mine" / "teacher.json").write_text(json.dumps({"schema": "a diploma"}))
    (stores / "link").symlink_to(stores / "t")
    for name in ("mine", "link", "absent"):
        assert command(monkeypatch, "rm", stores / name, "--yes") == 2
        assert "nothing was removed" in capsys.readouterr().err
    with StoreWriter(stores / "u", "somebody"):
        assert command(monkeypatch, "rm", stores / "u", "--yes") == 2
    for name in ("t", "u"):
        assert command(monkeypatch, "rm", stores / name, "--yes") == 0
    assert sorted(p.name for p in stores.iterdir()) == ["link", "mine"]


def test_stores_are_written_and_removed_in_folders_only(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (
        ("add", "t", "--from", source, "--to", "s3://bucket/t"),
        ("rm", "s3://bucket/t", "--yes"),
    ):
        assert command(monkeypatch, *arguments) == 2
        assert "that store's own tool" in capsys.readouterr().err


def test_a_killed_rm_leaves_what_can_be_removed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever file the deletion dies at, what is left bears the mark and is no store."""
    add_teacher("t", source, tmp_path / "t", slices=2)
    calls = 0
    real = Path.unlink

    def dies(path: Path, *arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Stopped
        real(path)

    monkeypatch.setattr(Path, "unlink", dies)
    with pytest.raises(Stopped):
        remove_store(tmp_path / "t")
    monkeypatch.undo()
    (left,) = tmp_path.glob(".t.*.removed")
    assert not (tmp_path / "t").exists()
    remove_store(left)
    assert not list(tmp_path.glob(".t*"))


def test_ls_names_stores_and_what_cannot_be_read(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stores = tmp_path / "stores"
    good = add_teacher("good", source, stores / "good", slices=2)
    add_teacher("bad", source, stores / "bad", slices=2)
    (stores / "bad" / "final_norm.safetensors").unlink()
    interrupted(source, stores / "half", 2)
    add_teacher("torn", source, stores / "torn", slices=2)
    os.truncate(stores / "torn" / "teacher.json", 100)
    (stores / "notes").mkdir()
    assert command(monkeypatch, "ls", stores) == 0
    said = capsys.readouterr().out
    assert "qwen3" in said and good.fingerprint[:16] in said and "F32" in said
    assert "bad cannot be read" in said and "lacks final_norm.safetensors" in said
    assert "torn cannot be read" in said and "is not valid JSON" in said
    assert ".half.adding is unfinished" in said and "notes" not in said
    assert command(monkeypatch, "ls", tmp_path / "nowhere") == 2


@pytest.mark.parametrize(
    ("name", "slices", "message"),
    [
        ("t", "0", "slices 0: slices 1 or 2 work, or auto"),
        ("t", "-2", "slices -2: slices 1 or 2 work, or auto"),
        ("t", "4", "has 2 key-value heads; slices 1 or 2 work, or auto"),
        ("t", "two", "slices 'two': give a number, or auto"),
        ("../t", "1", "a teacher's name begins with a letter or digit .* found '../t'"),
        ("a/b", "1", "letters, digits, _, . and - alone, found 'a/b'"),
    ],
)
def test_slices_and_names_are_refused_before_a_byte_is_written(
    source: Path,
    tmp_path: Path,
    name: str,
    slices: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["add", name, "--from", str(source), "--to", str(tmp_path / "to" / "stores")]
    monkeypatch.setattr(sys, "argv", ["mtopd", "teachers", *arguments, "--slices", slices])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    said = capsys.readouterr().err.replace("\n", " ")
    assert re.search(message, said), said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_auto_takes_as_many_slices_as_the_model_has(source: Path, tmp_path: Path) -> None:
    store = add_teacher("t", source, tmp_path / "auto", slices="auto")
    assert store.slices == 2
    # the same command again finds the store, whether the number is given or not
    assert add_teacher("t", source, tmp_path / "auto", slices=2).fingerprint == store.fingerprint
