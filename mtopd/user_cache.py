"""The user's folder of caches: what costs time to find again and is safe to lose.

``$XDG_CACHE_HOME``, else ``~/.cache``, as other programs have it.  Entries are JSON files that appear
whole or not at all, so that runs side by side may share them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtopd.files import read_json, write_json
from mtopd.types import MtopdError


def user_cache() -> Path | None:
    """The product's folder in it, which may not exist yet; None for a user without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mtopd"
    except RuntimeError:
        return None


def read_entry(kind: str, key: str) -> Mapping[str, Any] | None:
    """What was kept of this kind under this key; None for nothing, and for what is damaged."""
    try:
        found = read_json(_path(kind, key))
    except (OSError, MtopdError):
        return None
    return found if isinstance(found, dict) else None


def write_entry(kind: str, key: str, value: Mapping[str, Any]) -> None:
    """Keep ``value``.  Raises OSError where it cannot be written."""
    path = _path(kind, key)
    _make(path.parent.parent)
    path.parent.mkdir(exist_ok=True)
    write_json(path, value)


def note_path(name: str) -> Path | None:
    """Where a file of notes may be written; None where the folder cannot be made."""
    folder = user_cache()
    try:
        if folder is not None:
            _make(folder)
    except OSError:
        return None
    return folder and folder / f"{name}.json"


def _make(folder: Path) -> None:
    """For the user alone, whatever the umask: compiled kernels lie there, too, and are loaded."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _path(kind: str, key: str) -> Path:
    folder = user_cache()
    if folder is None:
        raise FileNotFoundError("this user has no home folder")
    return folder / kind / f"{key}.json"
