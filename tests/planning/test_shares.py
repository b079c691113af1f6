"""The promises of `plan_parts` on made-up stores: nothing is read, no process group is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtopd.planning import JOIN_ALIGNMENT, Mesh, Part, Range, plan_parts
from mtopd.planning.shares import _share_out
from mtopd.safetensors_file import TensorEntry

HEADER = 40  # bytes
Interval = tuple[str, int, int]  # path, start, stop


@dataclass(frozen=True)
class Block:
    start: int
    stop: int


@dataclass(frozen=True)
class File:
    """A weight file of which only the layout exists: sections without gaps, each cut in blocks."""

    path: str
    entries: list[TensorEntry]
    blocks: list[Block]

    def common(self) -> list[TensorEntry]:
        return self.section("common")

    def section(self, prefix: str) -> list[TensorEntry]:
        return [e for e in self.entries if e.name.startswith(prefix + "/")]

    def slices(self, first: int, count: int) -> list[TensorEntry]:
        return [e for i in range(first, first + count) for e in self.section(f"slice.{i}")]

    def experts(self, first: int, count: int) -> list[TensorEntry]:
        return [e for i in range(first, first + count) for e in self.section(f"expert.{i}")]

    def blocks_of(self, start: int, stop: int) -> list[Block]:
        return [b for b in self.blocks if b.start < stop and b.stop > start]


@dataclass(frozen=True)
class Store:
    slices: int
    num_experts: int
    files: dict[str, File] = field(repr=False)

    @property
    def num_layers(self) -> int:
        return sum(path.startswith("layer") for path in self.files)

    @property
    def embedding(self) -> File:
        return self.files["embedding"]

    @property
    def final_norm(self) -> File:
        return self.files["final_norm"]

    def layer(self, index: int) -> File:
        return self.files[f"layer.{index}"]

    def experts(self, layer: int) -> File | None:
        return self.files.get(f"experts.{layer}")


def mesh_of(rank: int, world_size: int, tp_size: int, ep_size: int) -> Mesh:
    tp = (rank % tp_size, tp_size, rank // tp_size, world_size // tp_size)
    return Mesh(*tp, rank % ep_size, ep_size, rank // ep_size, world_size // ep_size)


def group_key(mesh: Mesh, group: str) -> tuple[str, int]:
    """What the ranks of one group have in common, and no other rank has."""
    return group, {"everyone": 0, "tp_peers": mesh.tp_rank, "expert_peers": mesh.ep_rank}[group]


def build_file(path: str, sections: dict[str, list[int]], block_bytes: int) -> File:
    """``sections``: the bytes of each tensor."""
    entries, blocks, position = [], [], HEADER
    for prefix, sizes in sections.items():
        first = position
        for k, size in enumerate(sizes):
            entries.append(TensorEntry(f"{prefix}/{k}", "U8", (size,), position, position + size))
            position += size
        blocks += [
            Block(start, min(start + block_bytes, position))
            for start in range(first, position, block_bytes)
        ]
    return File(path, entries, [Block(0, HEADER), *blocks])


@st.composite
def problems(draw: st.DrawFn) -> tuple[Store, list[Mesh]]:
    tp_size, ep_size = draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 4), (4, 2), (3, 1)]))
    world_size = draw(st.integers(1, 3)) * (4 if tp_size != 3 else 3)
    slices = tp_size * draw(st.integers(1, 2))
    num_experts = ep_size * draw(st.integers(0, 2))
    block_bytes = draw(st.integers(1, 64))
    tensors = st.lists(st.integers(1, 120), min_size=1, max_size=3)

    def sliced(path: str, with_common: bool) -> File:
        common = {"common": draw(tensors)} if with_common else {}
        sizes = draw(tensors)
        parts = {f"slice.{i}": sizes for i in range(slices)}
        return build_file(path, common | parts, block_bytes)

    files = {"embedding": sliced("embedding", False)}
    for i in range(draw(st.integers(1, 3))):
        files[f"layer.{i}"] = sliced(f"layer.{i}", True)
        if num_experts and draw(st.booleans()):
            sizes = draw(tensors)
            experts = {f"expert.{k}": sizes for k in range(num_experts)}
            files[f"experts.{i}"] = build_file(f"experts.{i}", experts, block_bytes)
    norm = build_file("final_norm", {"common": draw(tensors)}, block_bytes)
    files[norm.path] = norm
    meshes = [mesh_of(rank, world_size, tp_size, ep_size) for rank in range(world_size)]
    return Store(slices, num_experts, files), meshes


@given(problems())
@settings(max_examples=150, deadline=None)
def test_every_promise_holds(problem: tuple[Store, list[Mesh]]) -> None:
    store, meshes = problem
    plans = [plan_parts(store, mesh) for mesh in meshes]
    assert {len(parts) for parts in plans} == {store.num_layers + 2}
    for index in range(store.num_layers + 2):
        groups: dict[tuple, dict[int, Range]] = {}
        for mesh, parts in zip(meshes, plans, strict=True):
            check_part(store, mesh, index, parts[index])
            for r in parts[index].ranges:
                members = groups.setdefault((r.path, *group_key(mesh, r.group)), {})
                assert r.group_rank not in members, "a rank of a group is one rank of the job"
                members[r.group_rank] = r
        read = [interval for members in groups.values() for interval in check_group(store, members)]
        whole = [store.files[path] for path in {r.path for r in plans[0][index].ranges}]
        blocks = [(file.path, b.start, b.stop) for file in whole for b in file.blocks[1:]]
        assert sorted(read) == sorted(blocks), "every block but the header, once in the job"


def check_group(store: Store, members: dict[int, Range]) -> list[Interval]:
    """Every block of the range has one reader; what the members read, block by block."""
    first = members[0]
    assert sorted(members) == list(range(len(first.owners))), "every rank of the group plans it"
    for r in members.values():
        assert (r.borders, r.owners, r.share_bytes) == (
            first.borders,
            first.owners,
            first.share_bytes,
        )
    blocks = {(b.start, b.stop) for b in store.files[first.path].blocks}
    assert set(pairwise(first.borders)) <= blocks, "cut at block borders"
    read: list[tuple[int, int]] = []
    for rank, r in members.items():
        start, stop = r.bytes_of(rank)
        assert r.local_bytes == stop - start
        read += [(a, b) for a, b in pairwise(r.borders) if start <= a and b <= stop]
        if r.share_bytes is not None:
            assert stop - start <= r.share_bytes
            if start < stop:
                assert start == r.borders[0] + rank * r.share_bytes, "where the all-gather puts it"
    assert sorted(read) == list(pairwise(first.borders))
    whole = first.borders[-1] - first.borders[0]
    assert whole <= first.device_bytes <= whole * 9 / 8
    return [(first.path, *block) for block in read]


def check_part(store: Store, mesh: Mesh, index: int, part: Part) -> None:
    entries = [entry for entry, _ in part.tensors]
    assert entries == needed(store, mesh, index), "each tensor that this rank holds, in file order"
    spans = [(r.offset, r.offset + r.device_bytes) for r in part.ranges]
    assert all(stop <= start for (_, stop), (start, _) in pairwise(spans))
    assert all(start % 256 == 0 for start, _ in spans)
    assert all(stop <= part.device_bytes for _, stop in spans)
    for entry, offset in part.tensors:
        (r,) = (
            r
            for r, (start, stop) in zip(part.ranges, spans, strict=True)
            if start <= offset and offset + entry.stop - entry.start <= stop
        )
        assert entry in store.files[r.path].entries
        assert offset - r.offset == entry.start - r.borders[0], "as it stands in the file"
    joined = sum(-(-(e.stop - e.start) // JOIN_ALIGNMENT) * JOIN_ALIGNMENT for e in entries)
    assert joined <= part.device_bytes
    assert part.host_bytes == sum(r.local_bytes for r in part.ranges)


def needed(store: Store, mesh: Mesh, index: int) -> list[TensorEntry]:
    files = ["embedding", *map("layer.{}".format, range(store.num_layers))]
    file = store.files[[*files, "final_norm"][index]]
    count = store.slices // mesh.tp_size
    held = [*file.common(), *file.slices(mesh.tp_rank * count, count)]
    if experts := store.experts(index - 1):
        count = store.num_experts // mesh.ep_size
        held += experts.experts(mesh.ep_rank * count, count)
    return held


@pytest.mark.parametrize(
    ("sizes", "num_ranks", "turn", "owners", "share_bytes"),
    [
        ([8, 8, 8, 8], 2, 0, ((0, 2), (2, 4)), 16),
        ([8, 8, 8, 5], 2, 1, ((0, 2), (2, 4)), 16),  # an eighth of padding, and no turns
        ([8, 8, 8, 4], 2, 1, ((2, 4), (0, 2)), None),  # more than that
        ([8, 8, 8], 2, 0, ((0, 1), (1, 3)), None),  # a third of it would be too much
        ([8, 8, 8], 2, 1, ((1, 3), (0, 1)), None),
        ([8, 8, 9], 3, 0, ((0, 1), (1, 2), (2, 3)), None),  # the last is larger than the others
        ([5], 4, 0, ((0, 0), (0, 0), (0, 0), (0, 1)), None),
        ([5], 4, 1, ((0, 0), (0, 0), (0, 1), (0, 0)), None),  # another rank in the next layer
        ([8, 8], 1, 3, ((0, 2),), None),  # alone: nothing travels
    ],
)
def test_shares_by_hand(
    sizes: list[int], num_ranks: int, turn: int, owners: tuple, share_bytes: int | None
) -> None:
    borders = [sum(sizes[:k]) for k in range(len(sizes) + 1)]
    assert _share_out(borders, num_ranks, turn) == (owners, share_bytes)
