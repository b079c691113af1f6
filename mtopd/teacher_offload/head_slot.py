"""The one place on the device for a teacher's output layer.

What is promised: at most one head is resident, measured from live storages and not from our own bookkeeping; asking
for another teacher's head while the former is still referenced by anybody is an error; ``drop`` ends a train step.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from mtopd.safetensors_file import ITEM_SIZE
from mtopd.teacher_offload.layer_stream import TORCH_DTYPE
from mtopd.teacher_offload.store import TeacherStore, read_range


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
    stall_s: float = 0.0
    peak_resident: int = 0
    peak_device_bytes: int = 0


class HeadSlot:
    """Loads heads one at a time.  Rows [first_row, first_row + num_rows) of every teacher; missing rows are zero."""

    def __init__(self, stores: Sequence[TeacherStore], *, first_row: int, num_rows: int, device: torch.device) -> None:
        self._stores, self._first_row, self._num_rows, self._device = stores, first_row, num_rows, device
        self._index: int | None = None
        self._head: TeacherHead | None = None
        self._live = 0  # storages of heads that somebody still references
        self.counters = HeadCounters()

    def head(self, teacher_index: int) -> TeacherHead:
        """The head of this teacher, loaded unless it is the resident one.  Do not keep it beyond the call's use."""
        if self._index != teacher_index or self._head is None:
            self.drop()
            assert self._live == 0, f"a head is still referenced while teacher {teacher_index}'s is asked for"
            started = time.perf_counter()
            self._head, self._index = self._load(teacher_index), teacher_index
            self.counters.stall_s += time.perf_counter() - started
        return self._head

    def drop(self) -> None:
        """Forget the resident head: the end of a train step."""
        self._head, self._index = None, None

    def take_counters(self) -> HeadCounters:
        taken = self.counters
        self.counters = HeadCounters(peak_resident=taken.peak_resident, peak_device_bytes=taken.peak_device_bytes)
        return taken

    def _load(self, teacher_index: int) -> TeacherHead:
        store, counters = self._stores[teacher_index], self.counters
        entries = store.head.slices(0, store.slices)
        row_bytes = store.hidden_size * ITEM_SIZE[store.dtype]
        stored_rows = sum(e.shape[0] for e in entries)
        first, last = (min(r, stored_rows) for r in (self._first_row, self._first_row + self._num_rows))
        weight_vE = torch.zeros(self._num_rows, store.hidden_size, dtype=TORCH_DTYPE[store.dtype], device=self._device)
        count = 0
        if first < last:
            start = entries[0].start
            data, count = read_range(store.head, start + first * row_bytes, start + last * row_bytes)
            rows = torch.from_numpy(np.ascontiguousarray(data)).view(weight_vE.dtype).view(-1, store.hidden_size)
            weight_vE[: last - first].copy_(rows)
        self._live += 1
        weakref.finalize(weight_vE.untyped_storage(), self._released)
        counters.loads[teacher_index] = counters.loads.get(teacher_index, 0) + 1
        counters.bytes_read[teacher_index] = counters.bytes_read.get(teacher_index, 0) + count
        counters.peak_resident = max(counters.peak_resident, self._live)
        counters.peak_device_bytes = max(counters.peak_device_bytes, weight_vE.nbytes)
        head = store.manifest["head"]
        return TeacherHead(weight_vE, float(head["scale"]), head["softcap"])

    def _released(self) -> None:
        self._live -= 1
