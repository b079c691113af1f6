"""Stream one teacher's weights through the ranks, layer by layer.

What is promised:
* Every byte of a section is read from storage by exactly one rank of the job and verified there.  ``common`` (what tp
  replicates) is read by one rank and broadcast to all; a slice range is cut at block borders among the replicas that
  need it, and each piece is broadcast among them.
* At most two layers are on the device: two flat buffers, allocated once for the largest layer.
* Reading is a layer or more ahead, in one background thread, bounded by ``host_budget`` bytes; the seconds the
  caller waited for it are counted.

When the teacher's tp equals the slice count, parameters are views of the buffer; with a smaller tp each layer is
copied once into the second buffer in the joined layout (counted in ``relayouts``).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from mtopd.safetensors_file import ITEM_SIZE, TensorEntry
from mtopd.teacher_offload.store import Block, StoreFile, TeacherStore, layer_path, read_blocks
from mtopd.types import MtopdError

TORCH_DTYPE = {"F32": torch.float32, "BF16": torch.bfloat16}


@dataclass
class StreamCounters:
    """What one rank did for one teacher pass."""

    bytes_read: int = 0
    stall_s: float = 0.0
    relayouts: int = 0
    peak_device_bytes: int = 0
    peak_host_bytes: int = 0


class Mesh(Protocol):
    """Where this rank stands among the ranks a teacher is streamed to; rank = replica * tp_size + tp_rank."""

    @property
    def tp_rank(self) -> int: ...
    @property
    def tp_size(self) -> int: ...
    @property
    def replica(self) -> int: ...
    @property
    def num_replicas(self) -> int: ...
    @property
    def peer_group(self) -> dist.ProcessGroup: ...  # ranks with this tp rank, one in each replica


@dataclass(frozen=True)
class _Piece:
    """Consecutive blocks of one section that one rank reads; offset of their first byte in the device buffer."""

    blocks: tuple[Block, ...]
    offset: int
    source: int  # global rank that reads and broadcasts
    group: dist.ProcessGroup | None  # None: the whole job

    @property
    def nbytes(self) -> int:
        return self.blocks[-1].stop - self.blocks[0].start


@dataclass
class _Part:
    """This rank's part of one file: what it holds on the device after the broadcasts."""

    file: StoreFile
    entries: list[tuple[TensorEntry, int]]  # entry, offset in the device buffer
    pieces: list[_Piece]
    nbytes: int


@dataclass
class LayerStream:
    """``embedding()``, ``layers()``, ``final_norm()``: every rank of the job calls all three in this order."""

    store: TeacherStore
    mesh: Mesh
    device: torch.device
    host_budget: int
    counters: StreamCounters = field(default_factory=StreamCounters)

    def __post_init__(self) -> None:
        if self.store.slices % self.mesh.tp_size:
            raise MtopdError(
                f"teacher {self.store.name!r} is stored in {self.store.slices} slices, which tp {self.mesh.tp_size} "
                "does not divide; set teacher_offload.tp to a divisor, or add the teacher again with more slices"
            )
        paths = ["embedding.safetensors", *map(layer_path, range(self.store.num_layers)), "final_norm.safetensors"]
        self._parts = deque(self._part(i, self.store.files[path]) for i, path in enumerate(paths))
        largest = max(self._host_bytes(part) for part in self._parts)
        if largest > self.host_budget:
            raise MtopdError(
                f"teacher_offload.host_budget is {self.host_budget} bytes, but one share of teacher "
                f"{self.store.name!r} takes {largest}; raise it to at least that"
            )
        layer_bytes = max(part.nbytes for part in list(self._parts)[1:-1])
        self._buffers = [torch.empty(layer_bytes, dtype=torch.uint8, device=self.device) for _ in range(2)]
        self._resident(0)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="teacher-read")
        self._pending: deque[tuple[_Part, Future[dict[int, np.ndarray]]]] = deque()
        self._held = 0  # host bytes of shares read or being read
        self._prefetch()

    def close(self) -> None:
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()
        self._buffers.clear()

    # -- the three calls of a pass ----------------------------------------------------------------------------------
    def embedding(self) -> tuple[torch.Tensor, int]:
        """This tp rank's rows of the embedding [rows, E] and the token id of the first.  Drop it after use."""
        tensors = self._load(torch.empty(self._pending[0][0].nbytes, dtype=torch.uint8, device=self.device))
        rows_VE = next(iter(self._joined(tensors).values()))
        self._resident(rows_VE.nbytes)
        return rows_VE, self.mesh.tp_rank * rows_VE.shape[0]

    def layers(self) -> Iterator[Mapping[str, torch.Tensor]]:
        """Parameters of each layer by Megatron's local-spec name; valid until the next layer is asked for."""
        direct = self.store.slices == self.mesh.tp_size
        for i in range(self.store.num_layers):
            tensors = self._load(self._buffers[i % 2 if direct else 0])
            if direct:
                yield self._joined(tensors)
            else:
                self.counters.relayouts += 1
                yield self._joined(tensors, out=self._buffers[1])

    def final_norm(self) -> torch.Tensor:
        """[E] weight of the final norm."""
        tensors = self._load(torch.empty(self._pending[0][0].nbytes, dtype=torch.uint8, device=self.device))
        return tensors["common/weight"]

    # -- planning -----------------------------------------------------------------------------------------------------
    def _part(self, index: int, file: StoreFile) -> _Part:
        mesh, count = self.mesh, self.store.slices // self.mesh.tp_size
        common = file.section("common")
        mine = file.slices(mesh.tp_rank * count, count)
        pieces: list[_Piece] = []
        offset = 0
        if common:
            # Spread these small reads over the job: file i is rank i's.
            source = index % (mesh.tp_size * mesh.num_replicas)
            pieces.append(_Piece(file.blocks_of(common[0].start, common[-1].stop), 0, source, None))
            offset = pieces[0].nbytes
        if mine:
            blocks = file.blocks_of(mine[0].start, mine[-1].stop)
            borders = [len(blocks) * r // mesh.num_replicas for r in range(mesh.num_replicas + 1)]
            for replica, (first, last) in enumerate(pairwise(borders)):
                if first < last:
                    at = offset + blocks[first].start - blocks[0].start
                    source = replica * mesh.tp_size + mesh.tp_rank
                    pieces.append(_Piece(blocks[first:last], at, source, mesh.peer_group))
        entries = [(e, e.start - common[0].start) for e in common] + [
            (e, offset + e.start - mine[0].start) for e in mine
        ]
        return _Part(file, entries, pieces, max(p.offset + p.nbytes for p in pieces))

    def _host_bytes(self, part: _Part) -> int:
        return sum(p.nbytes for p in part.pieces if p.source == dist.get_rank())

    # -- reading ahead ----------------------------------------------------------------------------------------------
    def _prefetch(self) -> None:
        while self._parts and (not self._pending or self._held + self._host_bytes(self._parts[0]) <= self.host_budget):
            part = self._parts.popleft()
            self._held += self._host_bytes(part)
            self.counters.peak_host_bytes = max(self.counters.peak_host_bytes, self._held)
            self._pending.append((part, self._reader.submit(self._read, part)))

    def _read(self, part: _Part) -> dict[int, np.ndarray]:
        """In the reader thread: the pieces of ``part`` this rank reads, by offset, checksums verified."""
        shares: dict[int, np.ndarray] = {}
        for piece in part.pieces:
            if piece.source == dist.get_rank():
                shares[piece.offset] = np.empty(piece.nbytes, np.uint8)
                self.counters.bytes_read += read_blocks(part.file, piece.blocks, shares[piece.offset])
        return shares

    def _load(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Fill ``buffer`` with the next part on every rank and return its tensors as views, by stored name."""
        part, future = self._pending.popleft()
        started = time.perf_counter()
        shares, error = {}, None
        try:
            shares = future.result()
        except MtopdError as failure:
            error = failure
        self.counters.stall_s += time.perf_counter() - started
        _raise_together(error, self.device)
        for piece in part.pieces:
            view = buffer[piece.offset : piece.offset + piece.nbytes]
            if piece.offset in shares:
                view.copy_(torch.from_numpy(shares[piece.offset]))
            dist.broadcast(view, src=piece.source, group=piece.group)
        self._held -= self._host_bytes(part)
        shares.clear()
        self._prefetch()
        return {entry.name: _view(buffer, entry, offset) for entry, offset in part.entries}

    # -- binding ----------------------------------------------------------------------------------------------------
    def _joined(self, tensors: Mapping[str, torch.Tensor], out: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Parameters from stored tensors: slices joined, gate over up, transposed weights turned back as views."""
        by_name: dict[str, list[torch.Tensor]] = {}
        for stored, tensor in tensors.items():
            by_name.setdefault(stored.partition("/")[2], []).append(tensor)
        arena = _Arena(out)
        joined: dict[str, torch.Tensor] = {}
        for name, parts in by_name.items():
            if name.endswith(".up"):
                continue
            if name.endswith(".gate"):
                name = name.removesuffix(".gate")
                parts = parts + by_name[name + ".up"]
            tensor = arena.join(parts)
            joined[name.removesuffix(".T")] = tensor.T if name.endswith(".T") else tensor
        return joined

    def _resident(self, extra: int) -> None:
        held = sum(b.nbytes for b in self._buffers) + extra
        self.counters.peak_device_bytes = max(self.counters.peak_device_bytes, held)


class _Arena:
    """Joins tensors along dim 0: as one view where they already stand side by side, else copied into ``buffer``."""

    def __init__(self, buffer: torch.Tensor | None) -> None:
        self._buffer, self._used = buffer, 0

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        first = parts[0]
        shape = (sum(p.shape[0] for p in parts), *first.shape[1:])
        if self._buffer is None:
            offset = first.storage_offset()
            for part in parts:
                assert part.storage_offset() == offset, "tensors of a slice stand side by side in the store"
                offset += part.numel()
            return first.as_strided(shape, first.stride())
        nbytes = sum(p.nbytes for p in parts)
        joined = self._buffer[self._used : self._used + nbytes].view(first.dtype).view(shape)
        self._used += nbytes
        torch.cat(parts, out=joined)
        return joined


def _view(buffer: torch.Tensor, entry: TensorEntry, offset: int) -> torch.Tensor:
    nbytes = entry.stop - entry.start
    assert nbytes % ITEM_SIZE[entry.dtype] == 0
    return buffer[offset : offset + nbytes].view(TORCH_DTYPE[entry.dtype]).view(entry.shape)


def _raise_together(error: MtopdError | None, device: torch.device) -> None:
    """Raise on every rank when any rank failed: nobody waits for a broadcast that will never come.  Collective."""
    failed = torch.tensor([error is not None], dtype=torch.int32, device=device)
    dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    if failed.item():
        messages: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(messages, None if error is None else str(error))
        raise MtopdError(next(message for message in messages if message is not None))
