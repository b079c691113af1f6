"""The journal of an open segment: one line per sample, so that a crash before the commit costs as
little as possible.

It is never a commit record.  Only ``recover`` reads it, and only for segments that no index file
names.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import google_crc32c

from mtopd.hidden_cache.index import IndexRow

NAME = "journal"


class Journal:
    """Appends lines ``<crc32c, 8 hex> <JSON of the index row>``; a line says that the sample was
    appended.
    """

    def __init__(self, segment: Path) -> None:
        self._path = segment / NAME
        self._fd = os.open(
            self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644
        )

    def add(self, row: IndexRow) -> None:
        text = json.dumps([row.sample_key.hex(), *row[1:]]).encode()
        # a short write is a torn last line
        os.write(self._fd, b"%08x %s\n" % (google_crc32c.value(text), text))

    def close(self) -> None:
        os.close(self._fd)

    def remove(self) -> None:
        """After the commit; a crash in between leaves a file that nobody reads."""
        self.close()
        self._path.unlink()


def load_journal(segment: Path) -> list[IndexRow]:
    """The samples named by the sound lines up to the first torn one, each where the one before it
    ends.
    """
    rows: list[IndexRow] = []
    with suppress(FileNotFoundError), (segment / NAME).open("rb") as file:
        for line in file:
            crc, _, text = line.rstrip(b"\n").partition(b" ")
            if not line.endswith(b"\n") or crc != b"%08x" % google_crc32c.value(text):
                break
            key, *rest = json.loads(text)
            row = IndexRow(bytes.fromhex(key), *rest)
            if row.row != (rows[-1].row + rows[-1].n_tokens if rows else 0):
                break
            rows.append(row)
    return rows
