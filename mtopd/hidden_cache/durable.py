"""Publishing files so that a crash or a power loss leaves the whole file or none.

A file is written under a hidden ``.partial`` name, fsynced, given its final name, and its folder is
fsynced. Readers look at final names only, so a leftover ``.partial`` is garbage and never data.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mtopd.files import UNSUPPORTED, fsync_dir
from mtopd.types import MtopdError

PARTIAL = ".partial"
# What a lost or failing file looks like.  Any other OSError (too many open files, permission) is
# not damage.
_DAMAGE_ERRNOS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO, errno.ESTALE}


def make_dirs(folder: Path) -> None:
    """``mkdir -p`` whose new names are durable."""
    if not folder.is_dir():
        make_dirs(folder.parent)
        folder.mkdir(exist_ok=True)
        fsync_dir(folder.parent)


def publish(path: Path, data: bytes) -> None:
    """Write ``path``, replacing what is there."""
    os.replace(_write_partial(path, data), path)
    fsync_dir(path.parent)


def publish_if_absent(path: Path, data: bytes) -> None:
    """Write ``path`` unless it is there; of several writers at once exactly one wins, and it wins
    whole.
    """
    if path.exists():
        return
    partial = _write_partial(path, data)
    # A link, unlike a rename, fails where the name exists: no writer replaces another's content.
    try:
        os.link(partial, path)
    except FileExistsError:
        pass  # another writer was first; the caller compares what it wrote
    except OSError as error:
        if error.errno not in (*UNSUPPORTED, errno.EPERM):
            raise
        # CIFS, exFAT and many FUSE systems have no links: the last of several writers wins there.
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    fsync_dir(path.parent)


@contextmanager
def full_disk_raises(root: Path) -> Iterator[None]:
    """Turn a full disk or quota met while writing into one line; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise MtopdError(
            f"cannot write the hidden cache {root}: {error.strerror}; what was committed is kept: "
            "make room and start "
            "the same command again"
        ) from error


@contextmanager
def lost_file_raises(damaged: Callable[[str], Exception]) -> Iterator[None]:
    """Turn the loss of a file read inside into ``damaged(what happened)``; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno in _DAMAGE_ERRNOS:
            raise damaged(str(error)) from error
        raise


def _write_partial(path: Path, data: bytes) -> Path:
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    # Renamed before its bytes are on disk, a file may be empty after a power loss.
    with partial.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return partial
