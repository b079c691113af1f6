"""The cache's folder: its mark, one sub-folder per teacher, and what may be deleted.

    <root>/FORMAT.json                                 the mark; put if absent
    <root>/t/<fingerprint, 16 hex>/teacher.json        what a row is; put if absent
    <root>/t/<fingerprint, 16 hex>/seg/<segment>/      zarr arrays
    <root>/t/<fingerprint, 16 hex>/index/<segment>.arrow   commit records; merged-<8 hex>.arrow: of many segments

Nothing is deleted from a folder that does not bear our mark.
"""

from __future__ import annotations

import json
import re
import shutil
from contextlib import suppress
from pathlib import Path

from mtopd.hidden_cache.durable import PARTIAL, make_dirs, publish_if_absent
from mtopd.hidden_cache.layout import HIDDEN_DTYPES, SegmentLayout
from mtopd.types import MtopdError

_MARK_NAME = "FORMAT.json"
_MARK = {"format": 1, "kind": "mtopd.hidden_cache"}
_STATE = "after final norm"
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_FOLDER_HEX = 16  # of the fingerprint; teacher.json holds all of it
_MAX_JSON_BYTES = 1 << 16


def is_marked(root: Path) -> bool:
    """Whether ``root`` is a hidden cache; False where nothing is there yet, MtopdError where
    something else is.
    """
    mark = root / _MARK_NAME
    # A mark that a crash cut short is ours too.
    is_new = not root.exists() or (
        root.is_dir() and all(path.match(f".{_MARK_NAME}.*{PARTIAL}") for path in root.iterdir())
    )
    # Looked at after the listing: another writer may have put mark and content there meanwhile.
    if mark.is_file():
        if _load_json(mark) != _MARK:
            raise MtopdError(
                f"{mark} is not {_MARK}: another version wrote it. Remove the folder or name "
                "another one"
            )
        return True
    if not is_new:
        raise MtopdError(
            f"{root} holds no {_MARK_NAME} and is not empty, so it is no hidden cache. Name "
            "another folder"
        )
    return False


def create_root(root: Path) -> None:
    if not is_marked(root):
        make_dirs(root)
        publish_if_absent(root / _MARK_NAME, json.dumps(_MARK).encode())


def create_teacher_folder(root: Path, layout: SegmentLayout) -> Path:
    """The folder of a teacher; refuses one that was begun with another fingerprint, size or dtype."""
    if not _FINGERPRINT.fullmatch(layout.teacher_fingerprint):
        raise MtopdError(
            f"teacher fingerprint {layout.teacher_fingerprint!r} is not a sha256 of 64 hex digits"
        )
    if layout.hidden_size < 1:
        raise MtopdError(f"hidden_size is {layout.hidden_size}, needed at least 1")
    folder = teacher_folder(root, layout)
    make_dirs(folder / "index")
    publish_if_absent(folder / "teacher.json", json.dumps(_teacher_facts(layout)).encode())
    found = load_teacher(folder)
    if found != layout:
        raise MtopdError(
            f"{folder} holds rows of {found}, not of {layout}. Remove the cache folder and compute "
            "it again"
        )
    return folder


def teacher_folder(root: Path, layout: SegmentLayout) -> Path:
    return root / "t" / layout.teacher_fingerprint[:_FOLDER_HEX]


def load_teacher(folder: Path) -> SegmentLayout:
    """What the rows under a teacher's folder are."""
    found = _load_json(folder / "teacher.json")
    with suppress(KeyError, TypeError):
        layout = SegmentLayout(
            found["teacher_fingerprint"], found["hidden_size"], found["hidden_dtype"]
        )
        sound = (
            type(layout.hidden_size) is int
            and layout.hidden_size > 0
            and layout.hidden_dtype in HIDDEN_DTYPES
        )
        named = (
            _FINGERPRINT.fullmatch(layout.teacher_fingerprint)
            and folder.name == layout.teacher_fingerprint[:16]
        )
        if sound and named and found == _teacher_facts(layout):
            return layout
    raise MtopdError(
        f"{folder / 'teacher.json'} does not describe the teacher of its folder; compute its rows "
        "again"
    )


def teacher_folders(root: Path) -> list[Path]:
    return [path for path in entries(root / "t") if not path.is_symlink()]


def index_paths(folder: Path) -> list[Path]:
    """The commit records of a teacher, in the order in which the first one wins."""
    return [path for path in entries(folder / "index") if path.suffix == ".arrow"]


def committed(root: Path) -> list[str]:
    """Names of all commit records of a cache, as its folders list them; nothing is read."""
    records = (path for teacher in teacher_folders(root) for path in index_paths(teacher))
    return [str(path.relative_to(root)) for path in records]


def index_path(segment: Path) -> Path:
    """The commit record of one segment."""
    return segment.parents[1] / "index" / f"{segment.name}.arrow"


def remove(root: Path) -> None:
    """Delete a cache folder and all in it.  One that is gone, or that a crash left empty, is no
    error.

    The mark goes last, so that a removal that was cut short can be repeated.
    """
    if root.is_symlink():
        raise MtopdError(
            f"{root} is a link; only a hidden cache's own folder is removed. Name that folder"
        )
    if not root.exists():
        return
    is_marked(root)  # refuses another's folder
    for path in entries(root):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _MARK_NAME:
            path.unlink()
    (root / _MARK_NAME).unlink(missing_ok=True)
    root.rmdir()


def entries(folder: Path) -> list[Path]:
    """What a folder holds, sorted; nothing if it is not there or a link: a cache never leaves its
    root.
    """
    return sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []


def _teacher_facts(layout: SegmentLayout) -> dict[str, object]:
    return {
        "teacher_fingerprint": layout.teacher_fingerprint,
        "hidden_size": layout.hidden_size,
        "hidden_dtype": layout.hidden_dtype,
        "state": _STATE,
    }


def _load_json(path: Path) -> dict:
    with suppress(FileNotFoundError, ValueError, RecursionError), path.open("rb") as file:
        found = json.loads(file.read(_MAX_JSON_BYTES))
        return found if isinstance(found, dict) else {}
    return {}
