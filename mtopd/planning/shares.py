"""Plan a teacher's way through the ranks: which bytes each rank reads, and where all bytes stand on
the device.

Strategy:

1. Cut the teacher into *parts*: the embedding, each layer, the final norm.  A part is what is on the
   device at one time.
2. Cut a part into *ranges*: consecutive blocks of one file that a group of ranks needs whole.

       everyone        what tp replicates (section ``common``): needed by all ranks
       tp_peers        this tp rank's slices: needed by the ranks with its tp rank, one a replica
       expert_peers    this ep rank's experts: needed by the ranks with its ep rank

3. Share the blocks of a range out over its group.  Where equal shares fit (all blocks but the last
   have one size), one all-gather joins them; where they would waste more than an eighth of the
   memory, each owner broadcasts its blocks.
4. Lay the ranges out one behind the other on the device, each tensor at a place of its own.

Promises:

- Every block of a range is read by exactly one rank of its group, and all ranks of the group plan
  the same shares.
- Shares are cut at block borders, so that what is read can be verified.
- Equal shares hold at most an eighth more than the range's bytes.
- A part has every tensor that this rank holds of it once, in file order; ranges do not overlap on
  the device and start where every dtype can be viewed.
- ``device_bytes`` holds the ranges, and the layout with joined slices, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

from mtopd.safetensors_file import TensorEntry

Group = Literal["everyone", "tp_peers", "expert_peers"]
_ALIGNMENT = 256  # bytes; every dtype can be viewed at a range's start
# bytes; of each tensor in the joined layout: MKL rounds otherwise where memory is not aligned
JOIN_ALIGNMENT = 64


@dataclass(frozen=True)
class Mesh:
    """Where this rank stands among the ranks a teacher is streamed to, whatever the student's
    layout is.

    tp: ranks [r*tp, (r+1)*tp) hold one copy of what is not an expert; r is the ``replica``.  ep:
    ranks [k*ep, (k+1)*ep) hold one copy of the experts, each expert whole on its rank (expert tensor
    parallelism is 1); k is the ``expert_replica``.  Both divisions are independent: a replica's
    ranks may lie in several expert replicas.
    """

    tp_rank: int
    tp_size: int
    replica: int
    num_replicas: int
    ep_rank: int
    ep_size: int
    expert_replica: int
    num_expert_replicas: int


class Block(Protocol):
    """The file's bytes [start, stop), which are verified together."""

    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...


class WeightFile(Protocol):
    """Tensors of a weight file in file order, by section, and the blocks that touch a byte range."""

    @property
    def path(self) -> str: ...
    def common(self) -> Sequence[TensorEntry]: ...
    def slices(self, first: int, count: int) -> Sequence[TensorEntry]: ...
    def experts(self, first: int, count: int) -> Sequence[TensorEntry]: ...
    def blocks_of(self, start: int, stop: int) -> Sequence[Block]: ...


class Store(Protocol):
    """What is planned from of a teacher on storage: its headers."""

    @property
    def slices(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def embedding(self) -> WeightFile: ...
    @property
    def final_norm(self) -> WeightFile: ...
    def layer(self, index: int) -> WeightFile: ...
    def experts(self, layer: int) -> WeightFile | None: ...


@dataclass(frozen=True)
class Range:
    """Consecutive blocks of a file that all ranks of ``group`` need."""

    path: str  # of the file, in the store
    borders: tuple[int, ...]  # bytes of the file: the start of each block, and the last one's stop
    offset: int  # of the first byte, on the device
    group: Group
    group_rank: int  # this rank's
    owners: tuple[tuple[int, int], ...]  # first and last block (exclusive) of each group rank
    share_bytes: int | None  # of an all-gather with equal shares; None: the owners broadcast

    def bytes_of(self, group_rank: int) -> tuple[int, int]:
        """The file's bytes [start, stop) that a rank of the group reads."""
        first, last = self.owners[group_rank]
        return self.borders[first], self.borders[last]

    @property
    def local_bytes(self) -> int:
        """Bytes this rank reads."""
        start, stop = self.bytes_of(self.group_rank)
        return stop - start

    @property
    def device_bytes(self) -> int:
        """Bytes from ``offset`` on; the padding of the last equal shares included."""
        if self.share_bytes is None:
            return self.borders[-1] - self.borders[0]
        return self.share_bytes * len(self.owners)


@dataclass(frozen=True)
class Part:
    """What is on the device at one time, on this rank."""

    ranges: tuple[Range, ...]
    tensors: tuple[tuple[TensorEntry, int], ...]  # and the offset of each on the device
    device_bytes: int

    @property
    def host_bytes(self) -> int:
        """Bytes this rank reads."""
        return sum(r.local_bytes for r in self.ranges)


def plan_parts(store: Store, mesh: Mesh) -> list[Part]:
    """Embedding, layers in order, final norm, as this rank reads and holds them.

    The mesh divides the store: that was checked before the ranks started.
    """
    assert store.slices % mesh.tp_size == 0 and store.num_experts % mesh.ep_size == 0, mesh
    layers = [
        _plan_part(store, mesh, store.layer(i), store.experts(i), turn=i + 1)
        for i in range(store.num_layers)
    ]
    embedding, norm = (
        _plan_part(store, mesh, file, None, turn=turn)
        for turn, file in enumerate((store.embedding, store.final_norm))
    )
    return [embedding, *layers, norm]


def _plan_part(
    store: Store, mesh: Mesh, file: WeightFile, experts: WeightFile | None, turn: int
) -> Part:
    ranges: list[Range] = []
    tensors: list[tuple[TensorEntry, int]] = []
    used = 0

    def add(
        source: WeightFile, entries: Sequence[TensorEntry], group: Group, rank: int, size: int
    ) -> None:
        nonlocal used
        if not entries:
            return
        blocks = source.blocks_of(entries[0].start, entries[-1].stop)
        borders = (*(block.start for block in blocks), blocks[-1].stop)
        owners, share_bytes = _share_out(borders, size, turn)
        ranges.append(Range(source.path, borders, used, group, rank, owners, share_bytes))
        tensors.extend((entry, used + entry.start - borders[0]) for entry in entries)
        used += _round_up(ranges[-1].device_bytes, _ALIGNMENT)

    rank, world_size = mesh.replica * mesh.tp_size + mesh.tp_rank, mesh.num_replicas * mesh.tp_size
    add(file, file.common(), "everyone", rank, world_size)
    count = store.slices // mesh.tp_size
    slices = file.slices(mesh.tp_rank * count, count)
    add(file, slices, "tp_peers", mesh.replica, mesh.num_replicas)
    if experts is not None:
        count = store.num_experts // mesh.ep_size
        held = experts.experts(mesh.ep_rank * count, count)
        add(experts, held, "expert_peers", mesh.expert_replica, mesh.num_expert_replicas)
    joined_bytes = sum(_round_up(entry.stop - entry.start, JOIN_ALIGNMENT) for entry, _ in tensors)
    return Part(tuple(ranges), tuple(tensors), max(used, joined_bytes))


def _share_out(
    borders: Sequence[int], num_ranks: int, turn: int
) -> tuple[tuple[tuple[int, int], ...], int | None]:
    """Blocks of each rank, and the bytes of an equal share if one all-gather joins them."""
    sizes = [stop - start for start, stop in pairwise(borders)]
    per_rank = -(-len(sizes) // num_ranks)
    is_regular = len(set(sizes[:-1])) <= 1 and sizes[-1] <= sizes[0]
    if num_ranks > 1 and is_regular and per_rank * num_ranks * sizes[0] <= sum(sizes) * 9 // 8:
        firsts = [min(rank * per_rank, len(sizes)) for rank in range(num_ranks + 1)]
        return tuple(pairwise(firsts)), per_rank * sizes[0]
    firsts = [len(sizes) * rank // num_ranks for rank in range(num_ranks + 1)]
    # Small ranges have fewer blocks than ranks: another rank takes its turn in each layer.
    owners = list(pairwise(firsts))
    return tuple(owners[(rank + turn) % num_ranks] for rank in range(num_ranks)), None


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
