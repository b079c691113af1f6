"""One segment: a standard zarr v3 sharded array [rows, hidden], written and read without the zarr
library.

The array opens with ``zarr.open``.  We do not go through the library because it returns zeros,
without an error, for a shard that is missing or empty, and because it copies every row several
times.

Invariants
* One writer; rows are only appended; a sealed segment never changes.  ``zarr.json`` is written
  last.
* The bytes of a segment follow from (rows, layout) alone: chunks stand in order, each with its
  crc32c, then the shard index.  The reader computes what has to be there and refuses anything else,
  so no offset is ever taken from disk.
* Damage of any kind (missing, short, empty, flipped bit, other layout) raises SegmentDamaged.
  Nothing reads as zeros.

Shape letters: N rows of one call, C rows of one zarr chunk, E hidden size.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from mtopd.files import fsync_dir
from mtopd.hidden_cache.durable import PARTIAL, lost_file_raises, make_dirs, publish
from mtopd.hidden_cache.layout import (
    CHUNKS_PER_SHARD,
    CRC_BYTES,
    SegmentLayout,
    crc32c,
    joined_crc32c,
)
from mtopd.types import MtopdError

_MAX_METADATA_BYTES = 1 << 24  # 12 for each chunk
_MAX_FINISHING = 2  # shards whose fsync may be under way while the next is written


class SegmentDamaged(MtopdError):
    """A segment's files are not what its writer sealed; its rows must be computed again."""


def partial_shard(shard: Path) -> Path:
    """The name of a shard file while it is written."""
    return shard.with_name(f".{shard.name}{PARTIAL}")


class SegmentWriter:
    """Appends rows to a new segment folder.  ``seal`` makes it readable, ``abort`` removes it.

    After an exception from ``append`` only ``abort`` is allowed: the open shard may hold half a
    chunk.
    """

    def __init__(self, path: Path, layout: SegmentLayout) -> None:
        make_dirs(path.parent)
        path.mkdir()  # an existing folder is another writer's
        fsync_dir(path.parent)
        self.path = path
        self.layout = layout
        self.rows = 0
        self._chunk_crcs: list[int] = []
        self._fd: int | None = None
        # a shard becomes durable while the next is written
        self._disk = ThreadPoolExecutor(1, "hidden-cache-fsync")
        self._finishing: deque[Future[None]] = deque()
        self._unwritten_CE = np.zeros((layout.chunk_rows, layout.hidden_size), layout.dtype)

    def append(self, rows_NE: np.ndarray) -> tuple[int, int]:
        """Add C-contiguous rows; returns the index of the first, and the crc32c of all.

        The caller may reuse ``rows_NE`` afterwards.
        """
        assert rows_NE.dtype == self.layout.dtype and rows_NE.shape[1:] == (
            self.layout.hidden_size,
        ), rows_NE.shape
        first_row = self.rows
        chunk_rows = self.layout.chunk_rows
        crc = 0  # crc32c is linear: whole chunks are joined, so that every byte is summed once
        rest_NE = rows_NE
        while len(rest_NE):
            filled = self.rows % chunk_rows
            taken = min(chunk_rows - filled, len(rest_NE))
            if taken == chunk_rows:  # a whole chunk goes out without a copy
                crc = joined_crc32c(
                    crc, self._write_chunk(rest_NE[:taken]), self.layout.chunk_bytes
                )
            else:
                crc = google_crc32c.extend(crc, rest_NE[:taken].reshape(-1).view(np.uint8))
                self._unwritten_CE[filled : filled + taken] = rest_NE[:taken]
                if filled + taken == chunk_rows:
                    self._write_chunk(self._unwritten_CE)
            self.rows += taken
            rest_NE = rest_NE[taken:]
        return first_row, crc

    def seal(self) -> None:
        """Write out the last, zero-padded chunk and its shard, then zarr.json: all durable on
        return.
        """
        filled = self.rows % self.layout.chunk_rows
        if filled:
            self._unwritten_CE[filled:] = 0
            self._write_chunk(self._unwritten_CE)
        if self._fd is not None:
            self._finish_shard()
        while self._finishing:
            self._finishing.popleft().result()
        self._disk.shutdown()
        # Last: zarr reads a missing shard as zeros, so no array may open before its shards stand.
        metadata = self.layout.metadata(self.rows, self.path.name, self._chunk_crcs)
        publish(self.path / "zarr.json", json.dumps(metadata).encode())

    def abort(self) -> None:
        self._disk.shutdown()
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        shutil.rmtree(self.path)

    def _shard_path(self) -> Path:
        return self.path / "c" / str((len(self._chunk_crcs) - 1) // CHUNKS_PER_SHARD) / "0"

    def _partial_path(self) -> Path:
        return partial_shard(self._shard_path())

    def _write_chunk(self, chunk_CE: np.ndarray) -> int:
        """Returns the chunk's crc32c."""
        crc = crc32c(chunk_CE)
        self._chunk_crcs.append(crc)
        if self._fd is None:
            make_dirs(self._shard_path().parent)
            self._fd = os.open(self._partial_path(), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._write([chunk_CE.data.cast("B"), memoryview(crc.to_bytes(CRC_BYTES, "little"))])
        if len(self._chunk_crcs) % CHUNKS_PER_SHARD == 0:
            self._finish_shard()
        return crc

    def _finish_shard(self) -> None:
        assert self._fd is not None
        num_chunks = (len(self._chunk_crcs) - 1) % CHUNKS_PER_SHARD + 1
        self._write([memoryview(self.layout.shard_index(num_chunks))])
        # A disk slower than the teacher must not let unsynced shards pile up.
        while len(self._finishing) >= _MAX_FINISHING:
            self._finishing.popleft().result()
        self._finishing.append(
            self._disk.submit(_finish, self._fd, self._partial_path(), self._shard_path())
        )
        self._fd = None

    def _write(self, buffers: list[memoryview]) -> None:
        fd = self._fd
        assert fd is not None
        _transfer(lambda rest, _: os.writev(fd, rest), buffers)


def _finish(fd: int, partial: Path, shard: Path) -> None:
    # Synced before it is renamed: else a power loss may leave an empty shard under its final name,
    # which zarr reads as zeros.
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    os.replace(partial, shard)
    fsync_dir(shard.parent)


class OpenShard:
    """A shard file whose size and shard index were checked; it closes when the last reference is
    dropped.
    """

    def __init__(self, path: Path, layout: SegmentLayout, num_chunks: int) -> None:
        footer = layout.shard_index(num_chunks)
        body_bytes = num_chunks * layout.stored_chunk_bytes
        self.fd = -1  # for __del__, when open fails
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        found = os.fstat(self.fd).st_size
        if found != body_bytes + len(footer):
            raise _ShardDamaged(f"has {found} bytes, needed {body_bytes + len(footer)}")
        if os.pread(self.fd, len(footer), body_bytes) != footer:
            raise _ShardDamaged("has not the shard index its writer sealed")

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class _ShardDamaged(Exception):
    pass


class SegmentReader:
    """Reads rows of a sealed segment; may be shared by threads.

    ``open_shard`` opens shard files: pass one that remembers them (a bounded lru_cache) to keep
    files open between calls; by default none is.
    """

    def __init__(
        self,
        path: Path,
        layout: SegmentLayout,
        open_shard: Callable[[Path, SegmentLayout, int], OpenShard] = OpenShard,
    ) -> None:
        self.path = path
        self.layout = layout
        self._open_shard = open_shard
        self.rows, self._chunk_crcs = self._load_metadata()

    def read(self, start: int, stop: int, out_NE: np.ndarray, rows_crc: int | None = None) -> int:
        """Rows [start, stop) into ``out_NE``; returns the bytes read from storage.

        Every chunk touched is checked, and the rows together if ``rows_crc``, their crc32c, is
        given.  After SegmentDamaged the content of ``out_NE`` is undefined.
        """
        assert out_NE.dtype == self.layout.dtype and out_NE.flags.c_contiguous, (
            out_NE.dtype,
            out_NE.flags,
        )
        assert out_NE.shape == (stop - start, self.layout.hidden_size), (out_NE.shape, start, stop)
        if not 0 <= start <= stop <= self.rows:
            raise self._damaged(
                f"holds rows 0 to {self.rows}, rows {start} to {stop} were asked for"
            )
        shard_rows = self.layout.shard_rows
        row_bytes = self.layout.row_bytes
        bytes_read = 0
        row = start
        crc = 0
        out = out_NE.reshape(-1).view(np.uint8)
        while row < stop:
            shard = row // shard_rows
            end = min(stop, (shard + 1) * shard_rows)
            piece = out[(row - start) * row_bytes : (end - start) * row_bytes]
            found, crc = self._read_shard(
                shard, (row - shard * shard_rows) * row_bytes, piece, crc, rows_crc is not None
            )
            bytes_read += found
            row = end
        if rows_crc is not None and crc != rows_crc:
            raise self._damaged(f"the index has another crc32c for rows {start} to {stop}")
        return bytes_read

    def check_files(self) -> None:
        """Raises SegmentDamaged unless every shard file has its size and its shard index."""
        for shard in range(self.layout.num_shards(self.rows)):
            with lost_file_raises(self._damaged):
                self._open(shard)

    def _open(self, shard: int) -> OpenShard:
        num_chunks = min(
            self.layout.num_chunks(self.rows) - shard * CHUNKS_PER_SHARD, CHUNKS_PER_SHARD
        )
        try:
            return self._open_shard(self.path / "c" / str(shard) / "0", self.layout, num_chunks)
        except _ShardDamaged as damage:
            raise self._damaged(f"shard {shard} {damage}") from None

    def _read_shard(
        self, shard: int, start: int, out: np.ndarray, crc: int, wants_crc: bool
    ) -> tuple[int, int]:
        """Bytes of one shard's rows from byte ``start`` on, straight into ``out``.

        Returns the bytes read and the crc32c of all rows so far, ``crc`` being that of the rows
        before.
        """
        chunk_bytes = self.layout.chunk_bytes
        first, end = start // chunk_bytes, -(-(start + len(out)) // chunk_bytes)
        # Chunks are read whole, to be verified: the bytes at both ends that nobody asked for.
        head_bytes = start - first * chunk_bytes
        tail_bytes = end * chunk_bytes - start - len(out)
        ends = np.empty(head_bytes + tail_bytes, np.uint8)
        crcs = np.empty(end - first, "<u4")
        crc_bytes = crcs.view(np.uint8)
        chunks = [  # the pieces of each: head of the first, what is asked for, tail of the last
            [out[max(i * chunk_bytes - head_bytes, 0) : (i + 1) * chunk_bytes - head_bytes]]
            for i in range(end - first)
        ]
        if head_bytes:
            chunks[0].insert(0, ends[:head_bytes])
        if tail_bytes:
            chunks[-1].append(ends[head_bytes:])
        buffers = [
            buffer
            for i, pieces in enumerate(chunks)
            for buffer in (*pieces, crc_bytes[i * CRC_BYTES :][:CRC_BYTES])
        ]
        position = first * self.layout.stored_chunk_bytes
        needed = len(crcs) * self.layout.stored_chunk_bytes
        with lost_file_raises(self._damaged):
            file = self._open(shard)
            found = _transfer(lambda rest, done: os.preadv(file.fd, rest, position + done), buffers)
        if found != needed:
            raise self._damaged(f"shard {shard} gave {found} of {needed} bytes")
        for i, pieces in enumerate(chunks):
            chunk_crc = 0
            for piece in pieces:
                chunk_crc = google_crc32c.extend(chunk_crc, piece)
            if chunk_crc != crcs[i]:
                raise self._damaged(f"chunk {first + i} of shard {shard} does not match its crc32c")
            # An exchanged chunk matches the crc32c beside it: only zarr.json can tell.
            if chunk_crc != self._chunk_crcs[shard * CHUNKS_PER_SHARD + first + i]:
                raise self._damaged(
                    f"chunk {first + i} of shard {shard} is sound, but not the one zarr.json names"
                )
            if wants_crc and len(pieces) == 1:
                crc = joined_crc32c(crc, chunk_crc, chunk_bytes)
            elif wants_crc:
                crc = google_crc32c.extend(crc, pieces[1 if i == 0 and head_bytes else 0])
        return found, crc

    def _load_metadata(self) -> tuple[int, list[int]]:
        """Rows of the segment, and the crc32c of each chunk."""
        with lost_file_raises(self._damaged), (self.path / "zarr.json").open("rb") as file:
            text = file.read(_MAX_METADATA_BYTES)
        try:
            found = json.loads(text)
            rows = found["shape"][0]
            crcs = found["attributes"]["chunk_crc32c"]
            matches = (
                type(rows) is int
                and rows >= 0
                and found == self.layout.metadata(rows, self.path.name, crcs)
            )
            matches = (
                matches
                and len(crcs) == self.layout.num_chunks(rows)
                and {*map(type, crcs)} <= {int}
            )
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            raise self._damaged(f"zarr.json is not the metadata of an array ({error!r})") from error
        if not matches:
            raise self._damaged(f"zarr.json does not describe this segment, of {self.layout}")
        return rows, crcs

    def _damaged(self, found: str) -> SegmentDamaged:
        return segment_damaged(self.path, found)


def segment_damaged(path: Path, found: str) -> SegmentDamaged:
    return SegmentDamaged(
        f"hidden cache segment {path}: {found}; its samples have to be computed again"
    )


def _transfer(call: Callable[[list[Any], int], int], buffers: list[Any]) -> int:
    """Repeat a vectored read or write, which may be short, until all buffers are done or the file
    has ended.
    """
    done = 0
    while buffers:
        moved = call(buffers, done)
        if not moved:
            break
        done += moved
        while buffers and moved >= len(buffers[0]):
            moved -= len(buffers.pop(0))
        if moved:
            buffers[0] = buffers[0][moved:]
    return done
