"""The one place on the device for a teacher's output layer.

What is promised: at most one head is resident, measured from live storages and not from our own bookkeeping; asking
for another teacher's head while one is leased, or while anybody still references it, is an error; ``drop`` ends a train
step.  The next expected head waits in host memory (this rank's vocabulary rows only), so a swap is one copy.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from mtopd.safetensors_file import ITEM_SIZE
from mtopd.teacher_offload.layer_stream import TORCH_DTYPE
from mtopd.teacher_offload.store import Block, TeacherStore, read_blocks


@dataclass(frozen=True)
class TeacherHead:
    """A teacher's output layer on this rank: rows of the student's vocabulary shard, and what follows the product."""

    weight_vE: torch.Tensor
    scale: float
    softcap: float | None


@dataclass
class HeadCounters:
    """What happened since the last ``take_counters``; peaks are of the slot's whole life."""

    loads: dict[int, int] = field(default_factory=dict)  # by teacher index
    bytes_read: dict[int, int] = field(default_factory=dict)
    stall_s: float = 0.0  # waiting for storage, and the copy to the device
    peak_resident: int = 0
    peak_device_bytes: int = 0


@dataclass
class _Staged:
    """The rows of one head in host memory, being read or there."""

    teacher: int
    rows_vE: torch.Tensor  # in the reused host buffer; valid when ``read`` is done
    read: Future[int]


class _Place(NamedTuple):
    """Where this rank's rows of a head are in its file."""

    blocks: Sequence[Block]
    num_bytes: int  # of the blocks
    rows: slice  # the bytes of them that hold the rows


class HeadSlot:
    """Rows [first_row, first_row + num_rows) of the teachers' heads, one at a time; missing rows are zero."""

    def __init__(self, stores: Sequence[TeacherStore], *, first_row: int, num_rows: int, device: torch.device) -> None:
        self._stores, self._first_row, self._num_rows, self._device = stores, first_row, num_rows, device
        self._index: int | None = None
        self._head: TeacherHead | None = None
        self._leased = False
        self._live = 0  # storages of heads that somebody still references
        self._expected: deque[int] = deque()
        self._staged: _Staged | None = None
        self._places: dict[int, _Place] = {}  # by teacher index
        self._host = torch.empty(0, dtype=torch.uint8)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="head-read")
        self.counters = HeadCounters()

    def expect(self, teachers: Iterable[int]) -> None:
        """The loads to come, in order: each one is read into host memory when the one before is on the device."""
        self._expected = deque(teachers)
        self._stage_next()

    @contextlib.contextmanager
    def lease(self, teacher_index: int) -> Iterator[TeacherHead]:
        """The head of this teacher, loaded unless it is the resident one.  Do not keep it beyond the block."""
        assert not self._leased, f"a head is leased while teacher {teacher_index}'s is asked for"
        if self._index != teacher_index or self._head is None:
            self.drop()
            assert self._live == 0, f"a head is still referenced while teacher {teacher_index}'s is asked for"
            started = time.perf_counter()
            self._head, self._index = self._load(teacher_index), teacher_index
            self.counters.stall_s += time.perf_counter() - started
            self._stage_next()
        self._leased = True
        try:
            yield self._head
        finally:
            self._leased = False

    def drop(self) -> None:
        """Forget the resident head: the end of a train step."""
        self._head, self._index = None, None

    def close(self) -> None:
        self.drop()
        self._expected.clear()
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._staged = None

    def take_counters(self) -> HeadCounters:
        taken = self.counters
        self.counters = HeadCounters(peak_resident=taken.peak_resident, peak_device_bytes=taken.peak_device_bytes)
        return taken

    def _load(self, teacher_index: int) -> TeacherHead:
        """From host memory to the device, read now if another one was expected."""
        if self._staged is None or self._staged.teacher != teacher_index:
            self._expected.clear()  # the order was not what was announced: nothing can be read ahead
            self._stage(teacher_index)
        staged, counters, store = self._staged, self.counters, self._stores[teacher_index]
        assert staged is not None
        count = staged.read.result()
        self._staged = None
        weight_vE = torch.empty(self._num_rows, store.hidden_size, dtype=staged.rows_vE.dtype, device=self._device)
        weight_vE[: len(staged.rows_vE)].copy_(staged.rows_vE)
        weight_vE[len(staged.rows_vE) :].zero_()
        self._live += 1
        weakref.finalize(weight_vE.untyped_storage(), self._released)
        counters.loads[teacher_index] = counters.loads.get(teacher_index, 0) + 1
        counters.bytes_read[teacher_index] = counters.bytes_read.get(teacher_index, 0) + count
        counters.peak_resident = max(counters.peak_resident, self._live)
        counters.peak_device_bytes = max(counters.peak_device_bytes, weight_vE.nbytes)
        head = store.manifest["head"]
        return TeacherHead(weight_vE, float(head["scale"]), head["softcap"])

    def _stage_next(self) -> None:
        if self._expected and self._staged is None:
            self._stage(self._expected.popleft())

    def _stage(self, teacher_index: int) -> None:
        """Begin to read a head's rows into the host buffer, after what is being read there now."""
        if self._staged is not None:
            self._staged.read.exception()
        self._staged = None
        place = self._places.get(teacher_index)
        if place is None:
            place = self._places[teacher_index] = self._find(teacher_index)
        if self._host.nbytes < place.num_bytes:
            self._host = torch.empty(place.num_bytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        store, buffer = self._stores[teacher_index], self._host[: place.num_bytes]
        rows_vE = buffer[place.rows].view(TORCH_DTYPE[store.dtype]).view(-1, store.hidden_size)
        read = self._reader.submit(read_blocks, store.head, place.blocks, buffer.numpy())
        self._staged = _Staged(teacher_index, rows_vE, read)

    def _find(self, teacher_index: int) -> _Place:
        store = self._stores[teacher_index]
        row_bytes = store.hidden_size * ITEM_SIZE[store.dtype]
        entries = store.head.slices(0, store.slices)
        stored_rows = sum(e.shape[0] for e in entries)
        first, last = (min(r, stored_rows) for r in (self._first_row, self._first_row + self._num_rows))
        start = entries[0].start + first * row_bytes
        blocks = store.head.blocks_of(start, start + (last - first) * row_bytes) if first < last else ()
        skip = start - blocks[0].start if blocks else 0
        num_bytes = blocks[-1].stop - blocks[0].start if blocks else 0
        return _Place(blocks, num_bytes, slice(skip, skip + (last - first) * row_bytes))

    def _released(self) -> None:
        self._live -= 1
