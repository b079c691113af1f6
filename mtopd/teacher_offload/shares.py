"""Which bytes of a teacher each rank reads, and where they stand on the device.  Pure planning: no
tensor, no file.

A *part* is what is on the device at one time: the embedding, a layer, the final norm.  A part is
made of *ranges*: consecutive blocks of one file that a group of ranks needs whole.  Every block of
a range is read by exactly one rank of its group:

    common     what tp replicates: needed by all ranks
    slices     this tp rank's part: needed by its peers, one in each replica
    experts    this ep rank's experts: needed by the ranks with the same ep rank

Shares are cut at block borders, so that what is read can be verified.  Where equal shares fit (all
blocks of a range but the last have one size), one all-gather joins them; where they would waste
more than an eighth of the memory, each owner broadcasts its blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist

from mtopd.safetensors_file import TensorEntry
from mtopd.teacher_offload.store import Block, StoreFile, TeacherStore

_ALIGNMENT = 256  # bytes; every dtype can be viewed at a range's start
# bytes; of each tensor in the joined layout: MKL rounds otherwise where memory is not aligned
JOIN_ALIGNMENT = 64


class Mesh(Protocol):
    """Where this rank stands among the ranks a teacher is streamed to; rank = replica * tp_size +
    tp_rank.
    """

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
    @property
    def ep_rank(self) -> int: ...
    @property
    def ep_size(self) -> int: ...
    @property
    def expert_replica(self) -> int: ...
    @property
    def num_expert_replicas(self) -> int: ...
    @property
    def expert_peer_group(self) -> dist.ProcessGroup: ...  # ranks with this ep rank


@dataclass(frozen=True)
class Range:
    """Consecutive blocks that all ranks of ``group`` need; the first byte stands at ``offset`` on
    the device.
    """

    file: StoreFile
    blocks: tuple[Block, ...]
    offset: int
    group: dist.ProcessGroup
    owners: tuple[tuple[int, int], ...]  # first and last block of each rank of the group
    position: int  # of this rank in the group
    share_bytes: int | None  # of an all-gather with equal shares; None: the owners broadcast

    @property
    def own(self) -> tuple[Block, ...]:
        """The blocks this rank reads."""
        first, last = self.owners[self.position]
        return self.blocks[first:last]

    @property
    def own_bytes(self) -> int:
        return num_bytes(self.own)

    @property
    def device_bytes(self) -> int:
        """Bytes from ``offset`` on; the padding of the last equal shares included."""
        return (
            num_bytes(self.blocks)
            if self.share_bytes is None
            else self.share_bytes * len(self.owners)
        )


@dataclass(frozen=True)
class Part:
    """What is on the device at one time, on this rank."""

    ranges: tuple[Range, ...]
    tensors: tuple[tuple[TensorEntry, int], ...]  # and its offset on the device
    device_bytes: int  # holds the ranges, and the joined layout, too

    @property
    def host_bytes(self) -> int:
        """What this rank reads."""
        return sum(r.own_bytes for r in self.ranges)


def num_bytes(blocks: Sequence[Block]) -> int:
    return blocks[-1].stop - blocks[0].start if blocks else 0


def teacher_parts(store: TeacherStore, mesh: Mesh, everyone: dist.ProcessGroup) -> list[Part]:
    """Embedding, layers in order, final norm, as this rank reads and holds them.

    ``everyone``: a group of all ranks.  The mesh divides the store: that was checked before the
    ranks started.
    """
    assert store.slices % mesh.tp_size == 0 and store.num_experts % mesh.ep_size == 0, (
        store.name,
        mesh,
    )
    layers = [
        _part(store, mesh, everyone, store.layer(i), store.experts(i), turn=i + 1)
        for i in range(store.num_layers)
    ]
    embedding, norm = (
        _part(store, mesh, everyone, file, None, turn=i)
        for i, file in enumerate((store.embedding, store.final_norm))
    )
    return [embedding, *layers, norm]


def _part(
    store: TeacherStore,
    mesh: Mesh,
    everyone: dist.ProcessGroup,
    file: StoreFile,
    experts: StoreFile | None,
    turn: int,
) -> Part:
    ranges: list[Range] = []
    tensors: list[tuple[TensorEntry, int]] = []
    used = 0

    def add(
        source: StoreFile,
        entries: Sequence[TensorEntry],
        group: dist.ProcessGroup,
        position: int,
        size: int,
    ) -> None:
        nonlocal used
        if not entries:
            return
        blocks = source.blocks_of(entries[0].start, entries[-1].stop)
        owners, share_bytes = _owners(blocks, size, turn)
        ranges.append(Range(source, blocks, used, group, owners, position, share_bytes))
        tensors.extend((entry, used + entry.start - blocks[0].start) for entry in entries)
        used += -(-ranges[-1].device_bytes // _ALIGNMENT) * _ALIGNMENT

    count = store.slices // mesh.tp_size
    add(
        file,
        file.common(),
        everyone,
        dist.get_rank(everyone),
        dist.get_world_size(everyone),
    )
    add(
        file,
        file.slices(mesh.tp_rank * count, count),
        mesh.peer_group,
        mesh.replica,
        mesh.num_replicas,
    )
    if experts is not None:
        held = store.num_experts // mesh.ep_size
        mine = experts.experts(mesh.ep_rank * held, held)
        add(experts, mine, mesh.expert_peer_group, mesh.expert_replica, mesh.num_expert_replicas)
    joined_bytes = sum(
        -(-(e.stop - e.start) // JOIN_ALIGNMENT) * JOIN_ALIGNMENT for e, _ in tensors
    )
    return Part(tuple(ranges), tuple(tensors), max(used, joined_bytes))


def _owners(
    blocks: Sequence[Block], num_ranks: int, turn: int
) -> tuple[tuple[tuple[int, int], ...], int | None]:
    """Blocks of each rank, and the bytes of an equal share if one all-gather joins them."""
    sizes = [b.stop - b.start for b in blocks]
    per_rank = -(-len(blocks) // num_ranks)
    is_regular = len(set(sizes[:-1])) <= 1 and sizes[-1] <= sizes[0]
    if num_ranks > 1 and is_regular and per_rank * num_ranks * sizes[0] <= sum(sizes) * 9 // 8:
        bounds = [
            (min(r * per_rank, len(blocks)), min((r + 1) * per_rank, len(blocks)))
            for r in range(num_ranks)
        ]
        return tuple(bounds), per_rank * sizes[0]
    borders = [len(blocks) * r // num_ranks for r in range(num_ranks + 1)]
    # Small ranges have fewer blocks than ranks: another rank takes its turn in each layer.
    return tuple(
        (borders[(r + turn) % num_ranks], borders[(r + turn) % num_ranks + 1])
        for r in range(num_ranks)
    ), None
