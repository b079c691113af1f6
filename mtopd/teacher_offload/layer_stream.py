"""Stream teachers' weights through the ranks, layer by layer.

What is promised:
* Every byte of a part is read from storage by exactly one rank of the job and verified there
  (`planning.shares`), ahead of its use and bounded by ``host_budget`` (`read_ahead`).
* At most two layers are on the device: two flat buffers, allocated once for the largest layer of a
  teacher.
* The caller never reads, copies or joins shares: a thread does, with process groups and a CUDA
  stream of its own, one layer ahead of the compute.  The seconds the caller waited for it are
  counted.

When the teacher's tp equals the slice count, parameters are views of the buffer; with a smaller tp
the second buffer takes the joined layout: one copy of each layer, counted in ``relayouts``.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from mtopd.dtypes import torch_dtype
from mtopd.megatron.parallel import TeacherMesh
from mtopd.planning import JOIN_ALIGNMENT, Group, Part, Range, plan_parts
from mtopd.safetensors_file import TensorEntry
from mtopd.teacher_offload.names import GATE, TRANSPOSED, UP, local_name
from mtopd.teacher_offload.read_ahead import Key, ReadAhead, ReadCounters
from mtopd.teacher_offload.store import TeacherStore
from mtopd.types import MtopdError


@dataclass
class StreamCounters:
    """What one rank did in one wave of a teacher pass."""

    stall_s: float = 0.0  # the caller waited for a layer
    relayouts: int = 0
    peak_device_bytes: int = 0


class TeacherStream:
    """All teachers of a job, as this rank reads and receives them.  Every rank makes the same calls
    in one order.
    """

    def __init__(
        self,
        stores: Sequence[TeacherStore],
        meshes: Sequence[TeacherMesh],
        device: torch.device,
        *,
        host_budget: int,
        reader_threads: int,
    ) -> None:
        self.stores = stores
        self.meshes = meshes
        self.device = device
        # All ranks once more, for the loading thread alone: two threads' collectives in one group
        # could pair up differently on another rank.
        self.thread_group = dist.new_group()
        self.parts = [plan_parts(s, m) for s, m in zip(stores, meshes, strict=True)]
        self.reads = ReadAhead(
            self.parts,
            stores=stores,
            budget=host_budget,
            threads=reader_threads,
            pinned=device.type == "cuda",
        )

    def expect(self, visits: Sequence[int]) -> None:
        """The teachers that will be visited, in order (one with two waves twice).  Reading begins
        at once.
        """
        self.reads.expect(
            (teacher, part) for teacher in visits for part in range(len(self.parts[teacher]))
        )

    def visit(self, teacher: int) -> LayerStream:
        """The next expected teacher; use it as a context manager."""
        return LayerStream(self, teacher)

    def take_counters(self) -> ReadCounters:
        """What was read since the last call."""
        taken = self.reads.counters
        self.reads.counters = ReadCounters(peak_host_bytes=taken.peak_host_bytes)
        return taken

    def close(self) -> None:
        self.reads.close()


@dataclass
class _Loaded:
    """A part on the device, and the event after which its bytes stand there."""

    part: Part
    buffer: torch.Tensor
    event: torch.cuda.Event


@dataclass
class LayerStream:
    """One wave of one teacher: ``embedding()``, ``layers()``, ``final_norm()``, called in this
    order on every rank.
    """

    stream: TeacherStream
    teacher: int
    counters: StreamCounters = field(default_factory=StreamCounters)

    def __enter__(self) -> LayerStream:
        store = self.stream.stores[self.teacher]
        mesh = self.stream.meshes[self.teacher]
        self.device = self.stream.device
        self._parts = self.stream.parts[self.teacher]
        self._first_expert = mesh.ep_rank * store.num_experts // mesh.ep_size
        self._joins = store.slices != mesh.tp_size
        layer_bytes = max(part.device_bytes for part in self._parts[1:-1])
        self._buffers = [
            torch.empty(layer_bytes, dtype=torch.uint8, device=self.device) for _ in range(2)
        ]
        # Where the thread may load the next layer: both buffers in turn, or one while the other
        # holds joined slices.
        self._free: queue.SimpleQueue[tuple[torch.Tensor, torch.cuda.Event] | None] = (
            queue.SimpleQueue()
        )
        for buffer in self._buffers[: 1 if self._joins else 2]:
            self._give_back(buffer)
        self._ready: queue.SimpleQueue[_Loaded | BaseException] = queue.SimpleQueue()
        self._load_stream = torch.cuda.Stream(self.device)
        self._resident(0)
        self._loader = threading.Thread(target=self._load_all, name="teacher-load", daemon=True)
        self._loader.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self._loader.join()
        else:
            # The job ends.  The thread may be inside a collective that other ranks will never join:
            # it is not waited for, and dies with the process.
            self._free.put(None)
        self._buffers.clear()

    # -- the three calls of a wave -----------------------------------------------------------------
    def embedding(self) -> tuple[torch.Tensor, int]:
        """This tp rank's rows of the embedding [rows, E] and the token id of the first.  Drop it
        after use.
        """
        loaded = self._next()
        rows_VE = self._joined(loaded)["weight"]
        self._resident(loaded.buffer.nbytes)
        return rows_VE, self.stream.meshes[self.teacher].tp_rank * rows_VE.shape[0]

    def layers(self) -> Iterator[Mapping[str, torch.Tensor]]:
        """Weights of each layer by Megatron's local-spec name; valid until the next layer is asked
        for.
        """
        for _ in self._parts[1:-1]:
            loaded = self._next()
            if self._joins:
                weights = self._joined(loaded, out=self._buffers[1])
                self._give_back(loaded.buffer)
                self.counters.relayouts += 1
            else:
                weights = self._joined(loaded)
            yield weights
            del weights
            if not self._joins:
                self._give_back(loaded.buffer)

    def final_norm(self) -> torch.Tensor:
        """[E] weight of the final norm."""
        return self._joined(self._next())["weight"]

    def _next(self) -> _Loaded:
        started = time.perf_counter()
        loaded = self._ready.get()
        self.counters.stall_s += time.perf_counter() - started
        if isinstance(loaded, BaseException):
            raise loaded
        torch.cuda.current_stream().wait_event(loaded.event)
        if loaded.buffer.is_cuda:
            # Allocated on the loading thread's stream, used on this one: without this the allocator
            # would reuse its memory too early.
            loaded.buffer.record_stream(torch.cuda.current_stream())
        return loaded

    def _give_back(self, buffer: torch.Tensor) -> None:
        """The caller's kernels on ``buffer`` are launched; the thread may load into it once they
        are done.
        """
        used = torch.cuda.Event()
        used.record()
        self._free.put((buffer, used))

    # -- the loading thread ------------------------------------------------------------------------
    def _load_all(self) -> None:
        try:
            with torch.cuda.stream(self._load_stream), torch.no_grad():
                for index, part in enumerate(self._parts):
                    if 0 < index < len(self._parts) - 1:
                        free = self._free.get()
                        if free is None:
                            return
                        buffer, used = free
                        self._load_stream.wait_event(used)
                    else:
                        buffer = torch.empty(
                            part.device_bytes, dtype=torch.uint8, device=self.device
                        )
                    self._load((self.teacher, index), part, buffer)
                    event = torch.cuda.Event()
                    event.record()
                    # The copies from the share's host memory are done: it may be read into again.
                    event.synchronize()
                    self.stream.reads.release()
                    self._ready.put(_Loaded(part, buffer, event))
                    del buffer
        except BaseException as error:
            self._ready.put(error)

    def _load(self, key: Key, part: Part, buffer: torch.Tensor) -> None:
        """Fill ``buffer`` with a part on every rank: its share from the host, the others' from
        their ranks.
        """
        shares: list[torch.Tensor] = []
        # A failed read is raised on all ranks before any exchange, which would wait forever.
        error = None
        try:
            found, shares = self.stream.reads.take()
            assert found == key, (found, key)
        except MtopdError as failure:
            error = failure
        _raise_together(error, self.stream.thread_group, self.device)
        mesh = self.stream.meshes[self.teacher]
        groups: dict[Group, dist.ProcessGroup] = {
            "everyone": self.stream.thread_group,
            "tp_peers": mesh.peer_group,
            "expert_peers": mesh.expert_peer_group,
        }
        pending: list[dist.Work] = []
        for r, share in zip(part.ranges, shares, strict=True):
            view = buffer[r.offset : r.offset + r.device_bytes]
            pending += _exchange(r, groups[r.group], share, view)
        for work in pending:
            work.wait()

    # -- binding -----------------------------------------------------------------------------------
    def _joined(self, loaded: _Loaded, out: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Weights from stored tensors: slices joined, gate over up, transposed ones turned back as
        views.
        """
        by_name: dict[str, list[torch.Tensor]] = {}
        for entry, offset in loaded.part.tensors:
            name = local_name(entry.name, self._first_expert)
            by_name.setdefault(name, []).append(_view(loaded.buffer, entry, offset))
        arena = _Arena(out)
        joined: dict[str, torch.Tensor] = {}
        for name, parts in by_name.items():
            if name.endswith(UP):
                continue
            if name.endswith(GATE):
                name = name.removesuffix(GATE)
                parts = parts + by_name[name + UP]
            tensor = arena.join(parts)
            joined[name.removesuffix(TRANSPOSED)] = (
                tensor.T if name.endswith(TRANSPOSED) else tensor
            )
        return joined

    def _resident(self, extra: int) -> None:
        held = sum(b.nbytes for b in self._buffers) + extra
        self.counters.peak_device_bytes = max(self.counters.peak_device_bytes, held)


def _exchange(
    r: Range, group: dist.ProcessGroup, share: torch.Tensor, view: torch.Tensor
) -> list[dist.Work]:
    """Start the collectives that fill ``view`` on every rank of ``group``.  Returns what to wait
    for.
    """
    if r.share_bytes is not None:
        local = view[r.group_rank * r.share_bytes : (r.group_rank + 1) * r.share_bytes]
        local[: share.nbytes].copy_(share, non_blocking=True)
        return [dist.all_gather_single(view, local, group=group, async_op=True)]
    # Shares that end at block borders may be uneven, and gloo has no uneven all-gather.
    works: list[dist.Work] = []
    for owner in range(len(r.owners)):
        start, stop = r.bytes_of(owner)
        if start < stop:
            piece = view[start - r.borders[0] : stop - r.borders[0]]
            if owner == r.group_rank:
                piece.copy_(share, non_blocking=True)
            if len(r.owners) > 1:
                works.append(dist.broadcast(piece, group=group, group_src=owner, async_op=True))
    return works


class _Arena:
    """Joins tensors along dim 0: as one view where they already stand side by side, else copied
    into ``buffer``.
    """

    def __init__(self, buffer: torch.Tensor | None) -> None:
        self._buffer = buffer
        self._used = 0

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        first = parts[0]
        shape = (sum(p.shape[0] for p in parts), *first.shape[1:])
        if self._buffer is None:
            offset = first.storage_offset()
            for part in parts:
                assert part.storage_offset() == offset, (
                    "tensors of a slice stand side by side in the store"
                )
                offset += part.numel()
            return first.as_strided(shape, first.stride())
        nbytes = sum(p.nbytes for p in parts)
        joined = self._buffer[self._used : self._used + nbytes].view(first.dtype).view(shape)
        # The next weight may have a wider dtype; and products of unaligned memory round otherwise.
        self._used += -(-nbytes // JOIN_ALIGNMENT) * JOIN_ALIGNMENT
        torch.cat(parts, out=joined)
        return joined


def _view(buffer: torch.Tensor, entry: TensorEntry, offset: int) -> torch.Tensor:
    nbytes = entry.stop - entry.start
    return buffer[offset : offset + nbytes].view(torch_dtype(entry.dtype)).view(entry.shape)


def _raise_together(
    error: MtopdError | None, group: dist.ProcessGroup, device: torch.device
) -> None:
    """Raise on every rank when any rank failed: nobody waits for a share that will never come.
    Collective.
    """
    failed = torch.tensor([error is not None], dtype=torch.int32, device=device)
    dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=group)
    if failed.item():
        messages: list[str | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(messages, None if error is None else str(error), group=group)
        raise MtopdError(next(message for message in messages if message is not None))
