"""Where the bytes of a teacher store are: a folder, or an object store behind a URL.  Only this
file imports obstore.

What is promised: reads are by file and byte range, from many threads at once; a failed read is a
MtopdError that names the file and never holds a credential; retries are bounded.  An object store's
credentials and endpoint come from its provider's own environment variables (``AWS_ACCESS_KEY_ID``,
``AWS_ENDPOINT_URL``, ...), never from the URL.
"""

from __future__ import annotations

import errno
import os
import re
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np

from mtopd.types import MtopdError

_RETRIES = 5
_RETRY: Any = {
    "max_retries": _RETRIES,
    "retry_timeout": timedelta(seconds=60),
    "backoff": {
        "init_backoff": timedelta(seconds=0.3),
        "max_backoff": timedelta(seconds=5),
        "base": 2,
    },
}


class Storage(Protocol):
    """Read-only access to the files of one store; paths are relative, with forward slashes."""

    @property
    def location(self) -> str:
        """Where it is, for messages."""
        ...

    @property
    def request_bytes(self) -> int:
        """Size of one read that runs at full speed."""
        ...

    def size(self, path: str) -> int | None:
        """Bytes of a file; None when there is no such file."""
        ...

    def read(self, path: str, limit: int) -> bytes | None:
        """A whole small file; None when there is none.  Raises MtopdError when it has more than
        ``limit`` bytes.
        """
        ...

    def read_into(self, path: str, start: int, out: np.ndarray) -> None:
        """Fill all of ``out`` (uint8) from byte ``start`` on.  Raises MtopdError when the file does
        not have them.
        """
        ...


def open_storage(location: str | Path) -> Storage:
    """The storage at a folder or URL.  Raises MtopdError for a URL that cannot be used; nothing is
    read yet.
    """
    return (
        ObjectStorage(location)
        if isinstance(location, str) and "://" in location
        else FolderStorage(Path(location))
    )


class FolderStorage:
    request_bytes = 8 << 20

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Paths already checked: resolving one costs more than a small read.
        self._files: dict[str, Path] = {}
        self.location = str(folder)

    def _inside(self, path: str) -> Path:
        if path not in self._files:
            file = self._folder / path
            if not file.resolve().is_relative_to(self._folder.resolve()):
                raise MtopdError(
                    f"{file} is a link out of the store; a file of a store lies inside its folder"
                )
            self._files[path] = file
        return self._files[path]

    def size(self, path: str) -> int | None:
        file = self._inside(path)
        return file.stat().st_size if file.is_file() else None

    def read(self, path: str, limit: int) -> bytes | None:
        size = self.size(path)
        if size is None:
            return None
        _check_limit(f"{self.location}/{path}", size, limit)
        data = np.empty(size, np.uint8)
        self.read_into(path, 0, data)
        return data.tobytes()

    def read_into(self, path: str, start: int, out: np.ndarray) -> None:
        file = self._inside(path)
        done = 0  # a read may be short: one call gives 2 GiB at most
        try:
            descriptor = os.open(file, os.O_RDONLY)
            try:
                while done < len(out):
                    got = os.preadv(descriptor, [out[done:].data], start + done)
                    if got == 0:
                        raise _ends_early(str(file), start + done, start + len(out))
                    done += got
            finally:
                os.close(descriptor)
        except OSError as error:
            advice = (
                "the disk may be failing" if error.errno == errno.EIO else "copy the store again"
            )
            raise MtopdError(f"cannot read {file}: {error.strerror}; {advice}") from None


class ObjectStorage:
    request_bytes = 16 << 20

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise MtopdError(
                f"a {parts.scheme}:// URL must be scheme://bucket/path alone; credentials belong "
                "in the provider's own environment variables, e.g. AWS_ACCESS_KEY_ID"
            )
        if parts.scheme == "file":
            raise MtopdError(f"{url}: give the path of a folder without file://")
        try:
            import obstore
        except ImportError:
            raise MtopdError(
                f"reading {url} needs the package obstore; pip install mtopd[s3]"
            ) from None
        self._obstore = obstore
        self.location = url.rstrip("/")
        try:
            # No client options: they would hide those of the environment (AWS_ALLOW_HTTP,
            # AWS_TIMEOUT).
            self._store: Any = obstore.store.from_url(self.location, retry_config=_RETRY)
        except (obstore.exceptions.BaseError, ValueError, TypeError):
            raise MtopdError(
                f"{self.location} is no URL of an object store; s3://bucket/path, gs://... and "
                "az://... are read"
            ) from None

    def _call(self, path: str, function: Any, *arguments: Any, **options: Any) -> Any:
        """Call obstore; None when there is no such object.  The server's text may hold a key and is
        not repeated.
        """
        label = f"{self.location}/{path}"
        try:
            return function(self._store, path, *arguments, **options)
        except (FileNotFoundError, self._obstore.exceptions.NotFoundError) as error:
            if "NoSuchBucket" in str(error):
                raise MtopdError(
                    f"cannot read {label}: the bucket does not exist; check the URL"
                ) from None
            return None
        except (self._obstore.exceptions.BaseError, OSError, ValueError) as error:
            exceptions = self._obstore.exceptions
            if isinstance(
                error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError
            ):
                problem = "access was denied"
                advice = (
                    "check the provider's credentials in the environment, e.g. AWS_ACCESS_KEY_ID"
                )
            else:
                problem = f"the request failed, also after {_RETRIES} retries where one could help"
                advice = "check the endpoint, e.g. AWS_ENDPOINT_URL, the region and the network"
            code = re.search(r"<Code>(\w+)</Code>", str(error))
            answer = f" (the server said {code[1]})" if code else ""
            raise MtopdError(f"cannot read {label}: {problem}{answer}; {advice}") from None

    def size(self, path: str) -> int | None:
        found = self._call(path, self._obstore.head)
        return None if found is None else int(found["size"])

    def read(self, path: str, limit: int) -> bytes | None:
        found = self._call(path, self._obstore.get)
        if found is None:
            return None
        _check_limit(f"{self.location}/{path}", int(found.meta["size"]), limit)
        return bytes(self._call(path, lambda *_: found.bytes()))

    def read_into(self, path: str, start: int, out: np.ndarray) -> None:
        data = self._call(path, self._obstore.get_range, start=start, length=len(out))
        if data is None:
            raise MtopdError(f"there is no {self.location}/{path}; copy the store there again")
        if len(data) != len(out):
            raise _ends_early(f"{self.location}/{path}", start + len(data), start + len(out))
        out[:] = np.frombuffer(data, np.uint8)


def _check_limit(label: str, size: int, limit: int) -> None:
    if size > limit:
        raise MtopdError(
            f"{label} has {size} bytes, at most {limit} were expected; copy the store again"
        )


def _ends_early(label: str, end: int, expected: int) -> MtopdError:
    return MtopdError(
        f"{label} ends at byte {end}, {expected} were expected (truncated?); copy the store again"
    )
