"""Read this rank's shares of teachers ahead of their use, into host memory bounded by
``host_budget``.

Invariants
* At most ``budget`` bytes are held, whatever is asked for; below that nothing limits how far
  reading runs ahead, over layers and over teachers.
* Shares that fit beside a window for the others are *kept*: read once in a run, then served from
  memory.  Passes visit the teachers in a cycle, where keeping a fixed set is best: the least
  recently used share is the next one needed.
* The others go through one ring of reused memory, in the order of use.
* A share is handed out whole and verified (block checksums, in the reading threads), or an error is
  raised.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
import torch

from mtopd.planning import Part
from mtopd.teacher_offload.store import Block, StoreFile, TeacherStore, read_blocks
from mtopd.types import MtopdError

_WINDOW_SHARES = 8  # of the largest share: what the ring gets when not everything can be kept

Key = tuple[int, int]  # teacher index, part


@dataclass
class ReadCounters:
    bytes_read: int = 0  # from storage
    bytes_kept: int = 0  # served from memory
    peak_host_bytes: int = 0


@dataclass
class _PartShare:
    key: Key
    memory: torch.Tensor  # uint8, this rank's bytes of the part, range after range
    reads: list[Future[int]]
    in_ring: bool


class ReadAhead:
    """``expect`` the parts in the order of their use, then ``take`` and ``release`` them one by
    one.
    """

    def __init__(
        self,
        parts: Sequence[Sequence[Part]],
        *,
        stores: Sequence[TeacherStore],
        budget: int,
        threads: int,
        pinned: bool,
    ) -> None:
        self._parts = parts
        self._stores = stores
        self._pinned = pinned
        sizes = {
            (t, p): part.host_bytes
            for t, teacher in enumerate(parts)
            for p, part in enumerate(teacher)
        }
        largest = max(sizes, key=lambda key: sizes[key])
        if sizes[largest] > budget:
            raise MtopdError(
                f"teacher_offload.host_budget is {budget} bytes, but one share of teacher "
                f"{stores[largest[0]].name!r} takes {sizes[largest]}; raise it to at least that"
            )
        self._keeps = _choose_kept(sizes, budget, sizes[largest])
        streamed = [size for key, size in sizes.items() if key not in self._keeps]
        kept = sum(sizes[key] for key in self._keeps)
        self._ring = _Ring(min(budget - kept, sum(streamed)))
        self._ring_memory: torch.Tensor | None = None
        self._kept: dict[Key, _PartShare] = {}
        self._kept_bytes = 0
        self._expected: deque[Key] = deque()
        self._shares: deque[_PartShare] = deque()  # being read or read, in the order of use
        self._lock = threading.Lock()
        self._readers = ThreadPoolExecutor(threads, thread_name_prefix="teacher-read")
        self.counters = ReadCounters()

    def expect(self, keys: Iterable[Key]) -> None:
        """The parts that will be taken, in order; forgets what was expected before.  Reading
        begins.
        """
        self._forget()
        self._expected.extend(keys)
        self._advance()

    def take(self) -> tuple[Key, list[torch.Tensor]]:
        """The next expected part: its bytes, one tensor for each range, when they are read.  Then
        ``release`` it.

        Raises MtopdError when a block could not be read or does not match its checksum.
        """
        if not self._shares:
            self._advance()
        share = self._shares[0]
        self.counters.bytes_read += sum(read.result() for read in share.reads)
        if not share.in_ring:
            # Kept only from here on, when its reads are known to have succeeded.
            if not share.reads:
                self.counters.bytes_kept += share.memory.nbytes
            share.reads = []
            self._kept[share.key] = share
        ranges = self._parts[share.key[0]][share.key[1]].ranges
        return share.key, list(torch.split(share.memory, [r.local_bytes for r in ranges]))

    def release(self) -> None:
        """The part last taken is no longer used; its memory may be read into again."""
        share = self._shares.popleft()
        if share.in_ring:
            self._ring.free()
        self._advance()

    def close(self) -> None:
        self._forget()
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._kept.clear()
        self._ring_memory = None

    def _advance(self) -> None:
        """Start reading expected parts as far as memory allows."""
        with self._lock:
            while self._expected:
                key = self._expected[0]
                part = self._parts[key[0]][key[1]]
                if key in self._kept:
                    share = self._kept[key]
                elif any(share.key == key and not share.in_ring for share in self._shares):
                    break  # a kept part expected twice: the second use waits until the first has it
                else:
                    memory = self._memory(key, part.host_bytes)
                    if memory is None:
                        break
                    reads = [
                        self._readers.submit(read_blocks, *request)
                        for request in _requests(self._stores[key[0]], part, memory)
                    ]
                    share = _PartShare(key, memory, reads, in_ring=key not in self._keeps)
                self._expected.popleft()
                self._shares.append(share)

    def _memory(self, key: Key, size: int) -> torch.Tensor | None:
        """Room for a share, or None while the ring is full."""
        if key in self._keeps:
            self._kept_bytes += size
            memory: torch.Tensor | None = torch.empty(
                size, dtype=torch.uint8, pin_memory=self._pinned
            )
        else:
            if self._ring_memory is None:
                self._ring_memory = torch.empty(
                    self._ring.size, dtype=torch.uint8, pin_memory=self._pinned
                )
            start = self._ring.allocate(size)
            memory = None if start is None else self._ring_memory[start : start + size]
        held = self._kept_bytes + self._ring.used
        self.counters.peak_host_bytes = max(self.counters.peak_host_bytes, held)
        return memory

    def _forget(self) -> None:
        """Drop what is expected and what was read ahead; nothing writes into the ring afterwards."""
        self._expected.clear()
        reads = [read for share in self._shares for read in share.reads]
        for read in reads:
            read.cancel()
        wait(reads)
        for share in self._shares:
            if share.in_ring:
                self._ring.free()
            elif share.reads:
                self._kept_bytes -= share.memory.nbytes  # never taken: not known to be whole
        self._shares.clear()


def _choose_kept(sizes: dict[Key, int], budget: int, largest: int) -> set[Key]:
    """The parts that stay in memory: all, or as many as fit beside the ring's window."""
    if sum(sizes.values()) <= budget:
        return set(sizes)
    room = budget - min(budget, _WINDOW_SHARES * largest)
    kept = set()
    for key, size in sizes.items():
        if size <= room:
            kept.add(key)
            room -= size
    return kept


def _requests(
    store: TeacherStore, part: Part, memory: torch.Tensor
) -> Iterator[tuple[StoreFile, Sequence[Block], np.ndarray]]:
    """Reads of about ``request_bytes`` each, cut at block borders, with the memory they fill."""
    start = 0
    for r in part.ranges:
        file = store.files[r.path]
        for blocks in file.requests(file.blocks_of(*r.bytes_of(r.group_rank))):
            size = blocks[-1].stop - blocks[0].start
            yield file, blocks, memory[start : start + size].numpy()
            start += size


class _Ring:
    """Where the next share goes in ``size`` bytes of reused memory; freed in the order of
    allocation.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._live: deque[tuple[int, int]] = deque()

    @property
    def used(self) -> int:
        return sum(stop - start for start, stop in self._live)

    def allocate(self, size: int) -> int | None:
        start = self._place(size)
        if start is not None:
            self._live.append((start, start + size))
        return start

    def free(self) -> None:
        self._live.popleft()

    def _place(self, size: int) -> int | None:
        if not self._live:
            return 0 if size <= self.size else None
        used_from, used_to = self._live[0][0], self._live[-1][1]
        # Not wrapped: room behind the newest share, else before the oldest.
        if self._live[-1][0] >= used_from:
            if self.size - used_to >= size:
                return used_to
            return 0 if used_from >= size else None
        return used_to if used_from - used_to >= size else None
