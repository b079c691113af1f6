"""Truncated, emptied, missing, flipped and swapped files: each is found and named, when opened or
when read.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mtopd.convert.teacher import add_teacher
from mtopd.pipelines import cli
from mtopd.teacher_offload.store import check_files, open_store, read_range
from mtopd.types import MtopdError
from tests.small_models import save_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 11422654\n"
LAYER = "layers/00001.safetensors"
PATHS = ("embedding.safetensors", LAYER, "final_norm.safetensors", "head.safetensors")


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("originals")
    # One architecture: their files differ in nothing but values.
    for seed, name in enumerate(("t", "u")):
        save_model(root / f"hf-{name}", seed=seed, layers=2, tied=False)
        add_teacher(name, root / f"hf-{name}", root / name, slices=2)
    return root


@pytest.fixture
def stores(originals: Path, tmp_path: Path) -> Path:
    for name in ("t", "u"):
        shutil.copytree(originals / name, tmp_path / name)
    return tmp_path


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 16
    path.write_bytes(data)


def verify(monkeypatch: pytest.MonkeyPatch, store: Path) -> int:
    monkeypatch.setattr(sys, "argv", ["mtopd", "teachers", "verify", str(store)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_a_store_is_called_as_its_folder_is(
    stores: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """``ls`` lists folders: a store that was renamed is no other teacher in ``verify``."""
    (stores / "t").rename(stores / "moved")
    assert verify(monkeypatch, stores / "moved") == 0
    assert "teacher moved: " in capfd.readouterr().out


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda p: os.truncate(p, p.stat().st_size - 1), "has .* bytes, its manifest says"),
        (lambda p: os.truncate(p, 0), "has 0 bytes, its manifest says"),
        (lambda p: p.unlink(), "lacks"),
        (
            lambda p: p.write_text(POINTER),
            "is a git-lfs pointer, not the file; fetch it with git lfs",
        ),
    ],
    ids=["truncated", "emptied", "missing", "pointer"],
)
def test_a_wrong_size_is_found_before_the_ranks_start(
    stores: Path, path: str, damage: Callable[[Path], object], said: str
) -> None:
    damage(stores / "t" / path)
    with pytest.raises(MtopdError, match=said) as caught:
        check_files(open_store(stores / "t"))
    assert path in str(caught.value)
    check_files(open_store(stores / "u"))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["flipped", "swapped"])
def test_wrong_bytes_are_found_when_read(
    stores: Path,
    path: str,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damaged = [stores / "t"]
    assert verify(monkeypatch, stores / "t") == 0
    if kind == "flipped":
        flip(stores / "t" / path)
    else:
        os.rename(stores / "t" / path, stores / "kept")
        os.rename(stores / "u" / path, stores / "t" / path)
        os.rename(stores / "kept", stores / "u" / path)
        damaged.append(stores / "u")
    for folder in damaged:
        file = open_store(folder).files[path]
        with pytest.raises(MtopdError, match=f"{path}: bytes .* do not match"):
            read_range(file, file.entries[-1].start, file.entries[-1].stop)
        capsys.readouterr()
        assert verify(monkeypatch, folder) == 2
        said = capsys.readouterr().err
        assert (
            said.count("do not match their checksum") == said.count(f"{folder}/{path}: bytes") >= 1
        )


def test_a_file_cut_while_it_is_read_is_named(stores: Path) -> None:
    file = open_store(stores / "t").files[LAYER]
    os.truncate(file.label, file.blocks[-1].stop - 10)
    with pytest.raises(MtopdError, match=f"{LAYER} ends at byte"):
        read_range(file, 0, file.blocks[-1].stop)


def test_a_manifest_that_is_a_git_lfs_pointer_is_named_as_such(stores: Path) -> None:
    (stores / "t" / "teacher.json").write_text(POINTER)
    with pytest.raises(MtopdError, match=r"t/teacher\.json is a git-lfs pointer, not the file"):
        open_store(stores / "t")


def test_a_damaged_tokenizer_is_named(stores: Path) -> None:
    flip(stores / "t" / "tokenizer" / "tokenizer.json")
    with (
        pytest.raises(MtopdError, match=r"tokenizer/tokenizer\.json is missing or damaged"),
        open_store(stores / "t").tokenizer_folder(),
    ):
        pass
