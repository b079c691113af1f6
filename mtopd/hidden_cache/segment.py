"""One segment: a standard zarr v3 sharded array [rows, hidden], written and read without the zarr library.

The array opens with ``zarr.open``.  We do not go through the library because it returns zeros, without an error, for
a shard that is missing or empty, and because it copies every row several times.

Invariants
* One writer; rows are only appended; a sealed segment never changes.  ``zarr.json`` is written last.
* The bytes of a segment follow from (rows, layout) alone: chunks stand in order, each with its crc32c, then the shard
  index.  The reader computes what has to be there and refuses anything else, so no offset is ever taken from disk.
* Damage of any kind (missing, short, empty, flipped bit, other layout) raises SegmentDamaged.  Nothing reads as zeros.

Shape letters: N rows of one call, C rows of one zarr chunk, E hidden size.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from mtopd.hidden_cache.durable import PARTIAL, lost_file_raises, make_dirs, publish
from mtopd.hidden_cache.layout import CHUNKS_PER_SHARD, CRC_BYTES, SegmentLayout, stored_crc
from mtopd.run_dir import fsync_dir
from mtopd.types import MtopdError

_MAX_METADATA_BYTES = 1 << 16


class SegmentDamaged(MtopdError):
    """A segment's files are not what its writer sealed; its rows must be computed again."""


class SegmentWriter:
    """Appends rows to a new segment folder.  ``seal`` makes it readable, ``abort`` removes it.

    After an exception from ``append`` only ``abort`` is allowed: the open shard may hold half a chunk.
    """

    def __init__(self, path: Path, layout: SegmentLayout) -> None:
        make_dirs(path.parent)
        path.mkdir()  # an existing folder is another writer's
        fsync_dir(path.parent)
        self.path, self.layout = path, layout
        self.rows = 0
        self._num_chunks = 0
        self._fd: int | None = None
        self._unwritten_CE = np.zeros((layout.chunk_rows, layout.hidden_size), layout.dtype)

    def append(self, rows_NE: np.ndarray) -> int:
        """Add C-contiguous rows; returns the index of the first.  The caller may reuse ``rows_NE`` afterwards."""
        assert rows_NE.dtype == self.layout.dtype and rows_NE.shape[1:] == (self.layout.hidden_size,), rows_NE.shape
        first_row, chunk_rows = self.rows, self.layout.chunk_rows
        rest_NE = rows_NE
        while len(rest_NE):
            filled = self.rows % chunk_rows
            taken = min(chunk_rows - filled, len(rest_NE))
            if taken == chunk_rows:  # a whole chunk goes out without a copy
                self._write_chunk(rest_NE[:taken])
            else:
                self._unwritten_CE[filled : filled + taken] = rest_NE[:taken]
                if filled + taken == chunk_rows:
                    self._write_chunk(self._unwritten_CE)
            self.rows += taken
            rest_NE = rest_NE[taken:]
        return first_row

    def seal(self) -> None:
        """Write out the last, zero-padded chunk and its shard, then zarr.json: all durable on return."""
        filled = self.rows % self.layout.chunk_rows
        if filled:
            self._unwritten_CE[filled:] = 0
            self._write_chunk(self._unwritten_CE)
        if self._fd is not None:
            self._finish_shard()
        publish(self.path / "zarr.json", json.dumps(self.layout.metadata(self.rows)).encode())

    def abort(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        shutil.rmtree(self.path)

    def _shard_path(self) -> Path:
        return self.path / "c" / str((self._num_chunks - 1) // CHUNKS_PER_SHARD) / "0"

    def _partial_path(self) -> Path:
        return self._shard_path().with_name(".0" + PARTIAL)

    def _write_chunk(self, chunk_CE: np.ndarray) -> None:
        self._num_chunks += 1
        if self._fd is None:
            make_dirs(self._shard_path().parent)
            self._fd = os.open(self._partial_path(), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._write([chunk_CE.data.cast("B"), memoryview(stored_crc(chunk_CE))])
        if self._num_chunks % CHUNKS_PER_SHARD == 0:
            self._finish_shard()

    def _finish_shard(self) -> None:
        assert self._fd is not None
        in_shard = (self._num_chunks - 1) % CHUNKS_PER_SHARD + 1
        self._write([memoryview(self.layout.shard_index(in_shard))])
        os.fsync(self._fd)
        os.close(self._fd)
        self._fd = None
        os.replace(self._partial_path(), self._shard_path())
        fsync_dir(self._shard_path().parent)

    def _write(self, buffers: list[memoryview]) -> None:
        fd = self._fd
        assert fd is not None
        _transfer(lambda rest, _: os.writev(fd, rest), buffers)


class SegmentReader:
    """Reads rows of a sealed segment.  Holds no open file between calls, so it may be shared by threads."""

    def __init__(self, path: Path, layout: SegmentLayout) -> None:
        self.path, self.layout = path, layout
        self.rows = self._load_rows()

    def read(self, start: int, stop: int, out_NE: np.ndarray) -> int:
        """Rows [start, stop) into ``out_NE``; returns the bytes read from storage.

        Every chunk touched is checked.  After SegmentDamaged the content of ``out_NE`` is undefined.
        """
        assert out_NE.dtype == self.layout.dtype and out_NE.flags.c_contiguous, (out_NE.dtype, out_NE.flags)
        assert out_NE.shape == (stop - start, self.layout.hidden_size), (out_NE.shape, start, stop)
        if not 0 <= start <= stop <= self.rows:
            raise self._damaged(f"holds rows 0 to {self.rows}, rows {start} to {stop} were asked for")
        shard_rows, bytes_read, row = self.layout.shard_rows, 0, start
        while row < stop:
            shard, end = row // shard_rows, min(stop, (row // shard_rows + 1) * shard_rows)
            bytes_read += self._read_shard(shard, row - shard * shard_rows, out_NE[row - start : end - start])
            row = end
        return bytes_read

    def _read_shard(self, shard: int, start: int, out_NE: np.ndarray) -> int:
        """Rows of one shard from its row ``start`` on: whole chunks straight into the caller's memory."""
        chunk_rows, num_rows = self.layout.chunk_rows, len(out_NE)
        first, end = start // chunk_rows, -(-(start + num_rows) // chunk_rows)
        offsets = [chunk * chunk_rows - start for chunk in range(first, end)]  # of each chunk in out_NE; may be < 0
        whole = [offset >= 0 and offset + chunk_rows <= num_rows for offset in offsets]
        chunks_CE = [
            out_NE[offset : offset + chunk_rows] if fits else np.empty((chunk_rows, *out_NE.shape[1:]), out_NE.dtype)
            for offset, fits in zip(offsets, whole, strict=True)
        ]
        crcs = [bytearray(CRC_BYTES) for _ in chunks_CE]
        buffers = [
            view
            for chunk_CE, crc in zip(chunks_CE, crcs, strict=True)
            for view in (chunk_CE.data.cast("B"), memoryview(crc))
        ]
        position, needed = first * self.layout.stored_chunk_bytes, len(crcs) * self.layout.stored_chunk_bytes
        with self._open_shard(shard) as fd:
            found = _transfer(lambda rest, done: os.preadv(fd, rest, position + done), buffers)
        if found != needed:
            raise self._damaged(f"shard {shard} gave {found} of {needed} bytes")
        for index, (chunk_CE, crc) in enumerate(zip(chunks_CE, crcs, strict=True)):
            if stored_crc(chunk_CE) != crc:
                raise self._damaged(f"chunk {first + index} of shard {shard} does not match its crc32c")
            if not whole[index]:
                lo, hi = max(offsets[index], 0), min(offsets[index] + chunk_rows, num_rows)
                out_NE[lo:hi] = chunk_CE[lo - offsets[index] : hi - offsets[index]]
        return found

    @contextmanager
    def _open_shard(self, shard: int) -> Iterator[int]:
        """A shard's file, its size and its shard index checked."""
        in_shard = min(self.layout.num_chunks(self.rows) - shard * CHUNKS_PER_SHARD, CHUNKS_PER_SHARD)
        footer = self.layout.shard_index(in_shard)
        body_bytes = in_shard * self.layout.stored_chunk_bytes
        with lost_file_raises(self._damaged), (self.path / "c" / str(shard) / "0").open("rb", buffering=0) as file:
            found = os.fstat(file.fileno()).st_size
            if found != body_bytes + len(footer):
                raise self._damaged(f"shard {shard} has {found} bytes, needed {body_bytes + len(footer)}")
            if os.pread(file.fileno(), len(footer), body_bytes) != footer:
                raise self._damaged(f"the index of shard {shard} is not the one its writer sealed")
            yield file.fileno()

    def _load_rows(self) -> int:
        with lost_file_raises(self._damaged), (self.path / "zarr.json").open("rb") as file:
            text = file.read(_MAX_METADATA_BYTES)
        try:
            found = json.loads(text)
            rows = found["shape"][0]
            matches = type(rows) is int and rows >= 0 and found == self.layout.metadata(rows)
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            raise self._damaged(f"zarr.json is not the metadata of an array ({error!r})") from error
        if not matches:
            raise self._damaged(f"zarr.json does not describe a segment of {self.layout}")
        return rows

    def _damaged(self, found: str) -> SegmentDamaged:
        return segment_damaged(self.path, found)


def segment_damaged(path: Path, found: str) -> SegmentDamaged:
    return SegmentDamaged(f"hidden cache segment {path}: {found}; its samples have to be computed again")


def _transfer(call: Callable[[list[memoryview], int], int], buffers: list[memoryview]) -> int:
    """Repeat a vectored read or write, which may be short, until all buffers are done or the file has ended."""
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
