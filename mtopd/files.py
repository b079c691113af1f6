"""Files and folders that appear whole or not at all: JSON, atomic writes, folders that take a name in
one rename.

A file gets its name last: temporary name, fsync, rename, fsync of the folder.  What a kill leaves
under temporary names, ``sweep`` removes at the next start.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mtopd.progress import say
from mtopd.types import MtopdError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how a git-lfs pointer begins
_ASIDE = ".aside"  # ending of what waits until its successor has its name
# What a file system answers that does not know a call
UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
_MENDED_BY = {  # what the user can do
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some space there",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "change its permissions",
    errno.EPERM: "change its permissions",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit with `ulimit -n`",
    errno.ENFILE: "close other programs",
    errno.ENOMEM: "close other programs",
    errno.EIO: "look at the disk, or at the server it belongs to",
    errno.ESTALE: "look at the disk, or at the server it belongs to",
}


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what the system refuses, a file or memory, into a MtopdError; other errors pass."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.filename is None and error.errno not in _MENDED_BY:
            raise  # of no file, and of nothing that a user could mend
        raise MtopdError(explain(error)) from error
    except MemoryError as error:
        raise MtopdError("this machine's memory does not suffice") from error


def explain(error: OSError) -> str:
    """One line: which file, what the system said of it, what to do."""
    names = [str(n) for n in (error.filename, error.filename2) if isinstance(n, str | os.PathLike)]
    said = f"{' -> '.join(names)}: " if names else "the system refused: "
    advice = _MENDED_BY.get(error.errno or 0)
    return said + (error.strerror or str(error)) + (f"; {advice}" if advice else "")


def fsync_dir(folder: Path) -> None:
    """Make names in ``folder`` durable, where its file system can."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise OSError(error.errno, error.strerror, str(folder)) from error
        _say_cannot_sync(os.fstat(descriptor).st_dev, folder, error.strerror)
    finally:
        os.close(descriptor)


def _say_cannot_sync(device: int, folder: Path, why: str | None) -> None:
    if device not in _TOLD:
        _TOLD.add(device)
        say(
            f"{folder} lies on a file system that syncs no folders ({why}): what was written last "
            "may be lost when the machine loses power"
        )


_TOLD: set[int] = set()  # devices of which that was said


def sync_file(path: Path) -> None:
    """Make the bytes of a file durable, whoever wrote them."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old file or the whole new one, after a
    crash too.
    """
    with open_atomic(path) as file:
        file.write(data)


@contextlib.contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the name ``path`` when the block ends; where the block raises,
    nothing has changed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        of_the_file = isinstance(error, OSError) and error.filename in (None, str(temporary))
        if isinstance(error, OSError) and of_the_file and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    fsync_dir(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_atomic(
        path, (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
    )


def read_json(path: Path) -> Any:
    """Parse a JSON file; raises MtopdError that names the file when it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # numbers of 5,000 digits are ValueErrors too
        raise MtopdError(
            f"{path} is not valid JSON ({error}); it was damaged or edited: put it back as it was, or "
            "start over in another folder"
        ) from None


def remove_tree(folder: Path) -> None:
    """Delete a folder of this run in one visible step: renamed first, so that a crash leaves no
    half of it.
    """
    if not folder.exists():
        return
    doomed = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.removed")
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def publish_tree(partial: Path, target: Path, *, durable: Collection[str] = ()) -> None:
    """Give a complete folder its final name: everything in it durable first, then one rename.
    ``durable`` names files that their writers have synced.
    """
    _make_durable(partial, but=durable)
    os.replace(partial, target)
    fsync_dir(target.parent)


def replace_tree(partial: Path, target: Path, *, durable: Collection[str] = ()) -> None:
    """Publish a folder of this run in place of another, if there is one; that one goes last.
    ``durable`` names files that their writers have synced.

    A crash between the two renames leaves it aside, from where ``sweep`` puts it back.
    """
    aside = target.with_name(f".{target.name}{_ASIDE}")
    _make_durable(partial, but=durable)
    if target.exists():
        os.replace(target, aside)
    os.replace(partial, target)
    fsync_dir(target.parent)
    remove_tree(aside)


def _make_durable(folder: Path, but: Collection[str] = ()) -> None:
    """Sync everything below ``folder`` but the files directly in it that ``but`` names."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            fsync_dir(path)
        elif path.parent != folder or path.name not in but:
            sync_file(path)


def sweep(folder: Path, *, deep: bool = True) -> None:
    """Clean up what a killed start left in ``folder``, and anywhere below it: a folder whose
    successor did not come takes its name again; temporary files and half-removed folders go.
    """
    find = folder.rglob if deep else folder.glob
    for aside in list(find(f".*{_ASIDE}")):
        target = aside.with_name(aside.name.removeprefix(".").removesuffix(_ASIDE))
        if target.exists():
            remove_tree(aside)
        else:
            os.replace(aside, target)
            fsync_dir(target.parent)
    for pattern in (".*.tmp", ".*.removed"):
        for path in list(find(pattern)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
