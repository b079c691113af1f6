"""The user's folder of caches."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mtopd.user_cache import note_path, read_entry, user_cache, write_entry


@pytest.mark.parametrize("first", ["note", "entry"])
def test_it_is_the_users_alone_whoever_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """Kernels are loaded from there: nobody else may put one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = os.umask(0o002)
    try:
        if first == "note":
            note_path("contents")
        else:
            write_entry("kind", "key", {"a": 1})
            assert read_entry("kind", "key") == {"a": 1}
    finally:
        os.umask(before)
    folder = user_cache()
    assert folder is not None and folder.stat().st_mode & 0o777 == 0o700
