"""The one place on the device for a teacher's output layer.

What is promised: at most one head is resident, measured from live storages and not from our own
bookkeeping; asking for another teacher's head while one is leased, or while anybody still
references it, is an error; ``drop`` ends a train step.  The next expected head waits in host memory
(this rank's vocabulary rows only), so a swap is one copy; rows of at most 1 MiB stay there, because
to read them again would cost more than they are worth.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from mtopd.dtypes import item_size, torch_dtype
from mtopd.teacher_offload.store import TeacherStore, read_blocks
from mtopd.types import HeadTransform


@dataclass(frozen=True)
class TeacherHead:
    """A teacher's output layer on this rank: rows of the student's vocabulary shard, and what
    follows the product.
    """

    weight_vE: torch.Tensor
    transform: HeadTransform


@dataclass
class HeadCounters:
    """What happened since the last ``take_counters``; peaks are of the slot's whole life."""

    loads: dict[int, int] = field(default_factory=dict)  # by teacher index
    bytes_read: dict[int, int] = field(default_factory=dict)
    stall_s: float = 0.0  # waiting for storage, and the copy to the device
    peak_resident: int = 0
    peak_device_bytes: int = 0


_KEPT_BYTES = 1 << 20


@dataclass
class _Staged:
    """The rows of one head in host memory, being read or there."""

    teacher: int
    rows_vE: torch.Tensor  # valid when ``read`` is done
    read: Future[int]
    is_counted: bool = False  # the bytes that were read


class HeadSlot:
    """Rows [first_row, first_row + num_rows) of the teachers' heads, one at a time; missing rows
    are zero.
    """

    def __init__(
        self, stores: Sequence[TeacherStore], *, first_row: int, num_rows: int, device: torch.device
    ) -> None:
        self._stores = stores
        self._first_row = first_row
        self._num_rows = num_rows
        self._device = device
        self._index: int | None = None
        self._head: TeacherHead | None = None
        self._leased = False
        self._live = 0  # storages of heads that somebody still references
        self._expected: deque[int] = deque()
        self._staged: _Staged | None = None
        self._kept: dict[int, _Staged] = {}  # small ones, by teacher index
        self._host = self._new_buffer(0)  # for the others
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="head-read")
        self.counters = HeadCounters()

    def expect(self, teachers: Iterable[int]) -> None:
        """The loads to come, in order: each one is read into host memory when the one before is on
        the device.
        """
        self._expected = deque(teachers)
        self._stage_next()

    @contextlib.contextmanager
    def lease(self, teacher_index: int) -> Iterator[TeacherHead]:
        """The head of this teacher, loaded unless it is the resident one.  Do not keep it beyond
        the block.
        """
        assert not self._leased, f"a head is leased while teacher {teacher_index}'s is asked for"
        if self._index != teacher_index or self._head is None:
            self.drop()
            assert self._live == 0, (
                f"a head is still referenced while teacher {teacher_index}'s is asked for"
            )
            started = time.perf_counter()
            self._head = self._load(teacher_index)
            self._index = teacher_index
            self.counters.stall_s += time.perf_counter() - started
            self._stage_next()
        self._leased = True
        try:
            yield self._head
        finally:
            self._leased = False

    def drop(self) -> None:
        """Forget the resident head: the end of a train step."""
        self._head = None
        self._index = None

    def close(self) -> None:
        self.drop()
        self._expected.clear()
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._staged = None

    def take_counters(self) -> HeadCounters:
        taken = self.counters
        self.counters = HeadCounters(
            peak_resident=taken.peak_resident, peak_device_bytes=taken.peak_device_bytes
        )
        return taken

    def _load(self, teacher_index: int) -> TeacherHead:
        """From host memory to the device, read now if another one was expected."""
        if self._staged is None or self._staged.teacher != teacher_index:
            # the order was not what was announced: nothing can be read ahead
            self._expected.clear()
            self._stage(teacher_index)
        staged = self._staged
        counters = self.counters
        store = self._stores[teacher_index]
        assert staged is not None
        count = staged.read.result()
        self._staged = None
        weight_vE = torch.empty(
            self._num_rows, store.hidden_size, dtype=staged.rows_vE.dtype, device=self._device
        )
        weight_vE[: len(staged.rows_vE)].copy_(staged.rows_vE)
        weight_vE[len(staged.rows_vE) :].zero_()
        # The storage tells when the last reference is gone, a view's or an autograd graph's too.
        self._live += 1
        weakref.finalize(weight_vE.untyped_storage(), self._released)
        counters.loads[teacher_index] = counters.loads.get(teacher_index, 0) + 1
        if not staged.is_counted:
            counters.bytes_read[teacher_index] = counters.bytes_read.get(teacher_index, 0) + count
        staged.is_counted = True
        counters.peak_resident = max(counters.peak_resident, self._live)
        counters.peak_device_bytes = max(counters.peak_device_bytes, weight_vE.nbytes)
        return TeacherHead(weight_vE, store.head_transform)

    def _stage_next(self) -> None:
        if self._expected and self._staged is None:
            self._stage(self._expected.popleft())

    def _stage(self, teacher_index: int) -> None:
        """Begin to read a head's rows, after what is being read into the buffer that all large ones
        use.
        """
        if self._staged is not None:
            self._staged.read.exception()
        self._staged = self._kept.get(teacher_index) or self._read(teacher_index)

    def _read(self, teacher_index: int) -> _Staged:
        store = self._stores[teacher_index]
        row_bytes = store.hidden_size * item_size(store.dtype)
        entries = store.head.slices(0, store.slices)
        stored_rows = sum(e.shape[0] for e in entries)
        first, last = (
            min(r, stored_rows) for r in (self._first_row, self._first_row + self._num_rows)
        )
        start = entries[0].start + first * row_bytes
        blocks = (
            store.head.blocks_of(start, start + (last - first) * row_bytes) if first < last else ()
        )
        # Whole blocks, whose checksums can be verified: the rows are a view inside of them.
        needed = blocks[-1].stop - blocks[0].start if blocks else 0
        is_small = needed <= _KEPT_BYTES
        if is_small or self._host.nbytes < needed:
            buffer = self._new_buffer(needed)
            self._host = self._host if is_small else buffer
        else:
            buffer = self._host[:needed]
        skip = start - blocks[0].start if blocks else 0
        rows_vE = buffer[skip : skip + (last - first) * row_bytes].view(torch_dtype(store.dtype))
        read = self._reader.submit(read_blocks, store.head, blocks, buffer.numpy())
        staged = _Staged(teacher_index, rows_vE.view(-1, store.hidden_size), read)
        if is_small:
            self._kept[teacher_index] = staged
        return staged

    def _new_buffer(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")

    def _released(self) -> None:
        self._live -= 1
