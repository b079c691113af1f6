"""A teacher store is written: file by file into a hidden folder beside it, then published with one
rename.

What is promised:
* ``teachers/NAME`` appears whole or not at all.  Until then everything is in
  ``teachers/.NAME.adding``.
* A finished file is durable before its record is, and only recorded files whose checksums still
  hold are used again by the next start.  The records belong to one source: another one starts over.
* One writer at a time (flock; the kernel drops it when the writer dies, however it dies).
* A folder is removed only if it bears our schema mark, and is renamed first: no half of it ever
  looks like a store.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import google_crc32c
import numpy as np

from mtopd.dtypes import item_size
from mtopd.files import fsync_dir, publish_tree, read_json, write_json
from mtopd.safetensors_file import header_bytes, parse_header
from mtopd.teacher_offload.names import MANIFEST, section_of
from mtopd.teacher_offload.storage import FolderStorage
from mtopd.teacher_offload.store import (
    SCHEMA,
    Block,
    TeacherStore,
    block_ranges,
    block_table_sha256,
    check_file,
    check_files,
    damaged_blocks,
    file_in_manifest,
    fingerprint,
    open_store,
)
from mtopd.types import MtopdError

ADDING_SCHEMA = "mtopd.teacher_store.adding/1"
_RECORDS = "adding.json"
_LOCK = "lock"

# stored name, values (bfloat16 as its uint16 bits), safetensors dtype
Tensor = tuple[str, np.ndarray, str]


def adding_folder(target: Path) -> Path:
    return target.with_name(f".{target.name}.adding")


class StoreWriter:
    """Writes the store ``target`` from the source that ``source`` identifies.  A context manager:
    it holds the lock.

    ``path in writer``: the file is finished, by this start or an earlier one; ``write`` skips it.
    """

    def __init__(self, target: Path, source: str) -> None:
        self.target = target
        self.source = source
        self.folder = adding_folder(target)
        self._files: dict[str, dict[str, Any]] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> StoreWriter:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_locked(self.folder))
            stack.enter_context(self._named_errors())
            self._resume()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise MtopdError(
                f"cannot write {self.target}: {error.strerror}; {len(self._files)} finished files "
                f"are kept in {self.folder}: make room and start the same command again, or remove them with "
                "`mtopd teachers rm`"
            ) from error

    def _resume(self) -> None:
        # another writer may have published while this one waited for nothing
        if self.target.exists():
            raise MtopdError(f"{self.target} exists; remove it first, or choose another name")
        records = read_json(self.folder / _RECORDS) if (self.folder / _RECORDS).exists() else {}
        if records.get("schema") == ADDING_SCHEMA and records.get("source") == self.source:
            self._files = records["files"]
            # A layer's two files go together: the one record stands for the work of both.
            bad = {
                Path(path).name
                for path, entry in self._files.items()
                if not self._is_whole(path, entry)
            }
            self._files = {
                path: entry for path, entry in self._files.items() if Path(path).name not in bad
            }
        # Unrecorded files go before anything is written: they may have filled the disk.
        for path in self.folder.iterdir():
            if path.name in (_RECORDS, _LOCK):
                continue
            if not path.is_dir():
                if path.name not in self._files:
                    path.unlink()
            elif not any(name.startswith(f"{path.name}/") for name in self._files):
                shutil.rmtree(path)
        self._record()

    def _is_whole(self, path: str, entry: Mapping[str, Any]) -> bool:
        try:
            file = file_in_manifest(FolderStorage(self.folder), path, entry)
            check_file(file)
            return not damaged_blocks(file)
        except MtopdError:
            return False

    def _record(self) -> None:
        write_json(
            self.folder / _RECORDS,
            {"schema": ADDING_SCHEMA, "source": self.source, "files": self._files},
        )

    def __contains__(self, path: str) -> bool:
        return path in self._files

    def write(self, path: str, tensors: Sequence[Tensor]) -> None:
        """Write one file and record it, both durable on return; nothing when it is there already."""
        if path not in self._files:
            try:
                self._files[path] = write_store_file(self.folder / path, tensors)
            except OSError:
                (self.folder / path).unlink(missing_ok=True)  # a full disk gets the room back
                raise
            self._record()

    def num_sections(self, path: str) -> int:
        """Sections of a written file, the header not counted; 0 when there is no such file."""
        return len({section_of(name) for name, *_ in self._files.get(path, {}).get("tensors", ())})

    def publish(self, manifest: Mapping[str, Any]) -> TeacherStore:
        """Write teacher.json, give the folder its name, open it.  ``tokenizer/`` was put there by
        the caller.
        """
        write_json(
            self.folder / MANIFEST,
            {
                "schema": SCHEMA,
                "source": self.source,
                **manifest,
                "files": self._files,
                "fingerprint": fingerprint(self._files),
            },
        )
        publish_tree(self.folder, self.target)
        for name in (_RECORDS, _LOCK):
            (self.target / name).unlink()
        return check_files(open_store(self.target))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold ``folder/lock``; the folder is made when needed.  Raises MtopdError when somebody else
    holds it.
    """
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and folder.parent.is_dir():
                continue  # published or removed between the two calls
            raise MtopdError(
                f"cannot write to {folder.parent}: {error.strerror}; choose another folder"
            ) from None
        try:
            _lock(descriptor, folder)
            # A lock on a file that was renamed meanwhile locks another store: try again.
            if _is_at(descriptor, folder / _LOCK):
                yield
                return
        finally:
            os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise MtopdError(
            f"{folder} is being written by another process; wait for it to end"
        ) from None
    except OSError as error:
        raise MtopdError(
            f"cannot write to {folder.parent}: its file system has no locks (flock: {error.strerror}); "
            "choose a folder on another one, and copy the whole store there"
        ) from error


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file still has this name: the folder may have been published before we got
    the lock.
    """
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def write_store_file(path: Path, tensors: Sequence[Tensor]) -> dict[str, Any]:
    """Write ``tensors``, whose sections stand together, durably; returns the file's manifest entry.

    Arrays may be views of any strides: one tensor at a time is made contiguous.
    """
    sections: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        sections.setdefault(section_of(tensor[0]), []).append(tensor)
    ordered = [
        t for part in sections.values() for t in sorted(part, key=lambda t: -item_size(t[2]))
    ]
    header = header_bytes([(name, dtype, array.shape) for name, array, dtype in ordered])
    size = len(header) + sum(array.nbytes for _, array, _ in ordered)
    entries = parse_header(str(path), header, size)
    for entry in entries:
        if entry.start % item_size(entry.dtype):
            raise MtopdError(
                f"{path}: tensor {entry.name!r} would not be aligned; its section mixes dtypes "
                "unevenly"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    sums = _BlockSums([stop for _, stop in block_ranges(entries, len(header))])
    with open(path, "wb") as file:
        for array in (np.frombuffer(header, np.uint8), *(array for _, array, _ in ordered)):
            chunk = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            file.write(chunk.data)
            sums.add(chunk)
        file.flush()
        os.fsync(file.fileno())
    # The parent as well: this file may be the first in its folder.
    for folder in (path.parent, path.parent.parent):
        fsync_dir(folder)
    blocks = [
        Block(*bounds, crc)
        for bounds, crc in zip(block_ranges(entries, len(header)), sums.crcs, strict=True)
    ]
    return {
        "size": size,
        "tensors": [[e.name, e.dtype, list(e.shape), e.start, e.stop] for e in entries],
        "header_bytes": len(header),
        "block_crc32c": sums.crcs,
        "sha256": block_table_sha256(blocks),
    }


class _BlockSums:
    """crc32c of each block of a byte stream; ``stops`` are the blocks' ends."""

    def __init__(self, stops: Sequence[int]) -> None:
        self.crcs: list[int] = []
        self._stops = stops
        self._position = 0
        self._crc = 0

    def add(self, chunk: np.ndarray) -> None:
        while len(chunk):
            stop = self._stops[len(self.crcs)]
            part, chunk = np.split(chunk, [stop - self._position])
            self._crc = google_crc32c.extend(self._crc, part)
            self._position += len(part)
            if self._position == stop:
                self.crcs.append(self._crc)
                self._crc = 0


# -- removing --------------------------------------------------------------------------------------


def bears_mark(folder: Path) -> bool:
    """Whether ``folder`` is a teacher store of any version, or what a killed ``teachers add`` or
    ``rm`` left.
    """
    for name in (MANIFEST, _RECORDS):
        try:
            schema = json.loads((folder / name).read_text(encoding="utf-8"))["schema"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(schema, str) and schema.startswith(
            ("mtopd.teacher_store/", "mtopd.teacher_store.adding/")
        ):
            return not folder.is_symlink()
    return False


def remove_store(folder: Path) -> None:
    """Delete a store, or what is left of one.  Raises MtopdError when it bears no mark of ours or
    is being written.
    """
    if not bears_mark(folder):
        raise MtopdError(
            f"{folder} is no teacher store (no teacher.json of ours); nothing was removed"
        )
    with _locked(folder) if (folder / _LOCK).exists() else contextlib.nullcontext():
        # Renamed first: a kill leaves no half of it under a store's name.
        doomed = folder.with_name(f".{folder.name.lstrip('.')}.{uuid.uuid4().hex[:8]}.removed")
        os.replace(folder, doomed)
    # The marks go last: what a kill leaves here can be removed by the same rule.
    for path in sorted(doomed.iterdir(), key=lambda p: p.name in (MANIFEST, _RECORDS)):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    doomed.rmdir()
