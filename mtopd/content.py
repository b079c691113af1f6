"""What a file or a folder holds, told apart from where it lies: size and sha256 of its files.

A file is read again only when its size or its times differ from what was noted of it the last time
(as git's index does), so that a large checkpoint is read once a run.  A file that changed within
the last seconds before it was read is not noted: another change could leave its times as they are.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from mtopd.files import read_json, write_json
from mtopd.types import MtopdError

_BLOCK = 16 << 20
_SETTLED_NS = 2_000_000_000  # coarse clocks of file systems tick every two seconds at worst
_LARGE = 1 << 30  # bytes; reading more than this is worth a line

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class FileContent:
    size: int
    mtime_ns: int
    ctime_ns: int  # nobody can set it: a file put back with its old time is read again
    sha256: str


Content = dict[str, FileContent]  # by name relative to the folder; a file's own name


def digest(content: Content) -> str:
    """sha256, hex, over names and contents: equal for equal files wherever they lie."""
    table = sorted((name, file.size, file.sha256) for name, file in content.items())
    return hashlib.sha256(json.dumps(table).encode()).hexdigest()


class ContentNotes:
    """Contents by absolute path, kept in a JSON file between starts; without ``path`` in memory."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._known = _load(path) if path is not None else {}
        self._is_new = False

    def content_of(
        self, place: Path, names: Iterable[str] | None = None, *, say: Say = lambda _: None
    ) -> Content:
        """The content of a file, or of a folder's files: ``names`` of them, else all that are not
        hidden.  Raises MtopdError for what cannot be read.
        """
        try:
            paths = _files(place, names)
            return {name: self._read(path, say) for name, path in paths.items()}
        except OSError as error:
            raise MtopdError(f"cannot read {error.filename or place}: {error.strerror}") from None

    def save(self) -> None:
        """Keep what was read since the last time."""
        if self._path is not None and self._is_new:
            write_json(self._path, {key: asdict(file) for key, file in self._known.items()})
            self._is_new = False

    def _read(self, path: Path, say: Say) -> FileContent:
        key, found = str(path.absolute()), path.stat()
        known = self._known.get(key)
        times = (found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        if known is not None and (known.size, known.mtime_ns, known.ctime_ns) == times:
            return known
        if found.st_size > _LARGE:
            say(f"reading {path} ({found.st_size / 1e9:.1f} GB) to know its content again")
        began = time.time_ns()
        content = FileContent(*times, _sha256(path))
        after = path.stat()
        if (after.st_size, after.st_mtime_ns, after.st_ctime_ns) != times:
            raise MtopdError(f"{path} changes while it is read; start again when it is complete")
        if began - max(found.st_mtime_ns, found.st_ctime_ns) > _SETTLED_NS:
            self._known[key], self._is_new = content, True
        return content


def _load(path: Path) -> dict[str, FileContent]:
    """What is noted; notes only save time, so damaged ones are none."""
    try:
        return {key: FileContent(**file) for key, file in read_json(path).items()}
    except (OSError, MtopdError, TypeError, AttributeError):
        return {}


def _files(place: Path, names: Iterable[str] | None) -> dict[str, Path]:
    if not place.is_dir():
        return {place.name: place}
    if names is None:
        found = (path for path in sorted(place.rglob("*")) if path.is_file())
        names = [str(path.relative_to(place)) for path in found]
        names = [name for name in names if not any(p.startswith(".") for p in Path(name).parts)]
    return {name: place / name for name in names}


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    block = memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            found.update(block[:count])
    return found.hexdigest()
