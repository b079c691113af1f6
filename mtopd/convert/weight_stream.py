"""Weights leave the trainer in buckets: HF tensors, gathered over tp, pp and ep a bucket at a time.

No rank ever has more than a bucket beside its own shards.  Every rank of a model group (tp x pp; for
experts ep x expert tp x pp) reports once what it has; from then on all know, without a word, which
rank sends which part of a bucket, and nothing but weights is sent.  A rank that has a part itself is asked
for nothing; a large part goes from shard to bucket without a copy in between where both have it in one
piece, small ones of one sender go together.  ``_IN_FLIGHT`` messages are under way at a time, the
senders take turns.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

import torch
import torch.distributed as dist

from mtopd.convert.bridge import Bridge, Tie
from mtopd.hf_weights import Bucket, TensorSpec, cut
from mtopd.megatron.parallel import Ranks

_MESSAGE = 8 << 20  # bytes at most, but for a row that is longer
_IN_FLIGHT = 2  # messages: one is packed or unpacked while another is on its way
_ALONE = 1 << 20  # bytes from which on a part is a message of its own
_ALIGN = 64  # bytes: any dtype's, and what a GPU copies fastest
_LARGE = 32 << 20  # bytes that the C library's allocator takes from the system, and gives it back
_COMES_BACK_S = 0.003  # within which a block that was let go of is free again

Tensors = Iterable[tuple[str, torch.Tensor]]
# The rank that needs the bucket of this number, from 0; None: all ranks do.
Taker = Callable[[int], "int | None"]


def everyone(bucket: int) -> None:
    """Every rank needs every bucket."""


@dataclass(frozen=True)
class _Piece:
    """The part of an HF tensor that one Megatron shard holds."""

    hf: str
    tie: Tie
    part: int  # of the tie's split
    shape: tuple[int, ...]  # of that view, less padding
    dtype: torch.dtype
    start: int  # along the tie's tp axis, in the HF tensor
    stop: int
    holders: tuple[int, ...]  # ranks of this rank's group that have it

    def source(self, shard: torch.Tensor) -> torch.Tensor:
        part = self.tie.split(shard)[self.part]
        return part if self.tie.rows is None else part[: self.shape[0]]

    def target(self, bucket: Bucket) -> torch.Tensor:
        """Its place in the bucket, in the shape of the part."""
        axis = self.tie.tp_axis or 0
        place = bucket[self.hf].narrow(axis, self.start, self.stop - self.start)
        return place if axis else place.view(self.shape)


@dataclass(frozen=True)
class _Rows:
    """Rows of a piece: what fits into a message."""

    piece: _Piece
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        row = math.prod(self.piece.shape[1:]) * self.piece.dtype.itemsize
        return (self.stop - self.start) * row


class WeightStream:
    """The HF tensors of a Megatron model that is spread over ranks.

    Building it and ``gather`` are collective.  ``tensors`` (a chunk's local-spec names, and tensors
    in the parameters' shapes) takes the place of the weights: gradients, say.
    """

    def __init__(
        self,
        bridge: Bridge,
        chunks: Sequence[torch.nn.Module],
        ranks: Ranks,
        tensors: Sequence[Tensors] | None = None,
    ) -> None:
        self._ranks = ranks
        self._shards: dict[str, torch.Tensor] = {}  # this rank's, by name in the whole model
        given = tensors if tensors is not None else [_weights(chunk) for chunk in chunks]
        for chunk, named in zip(chunks, given, strict=True):
            for name, tensor in named:
                whole_name = _whole_name(bridge, chunk, name, ranks)
                assert whole_name not in self._shards, whole_name
                self._shards[whole_name] = tensor
        dense = _Holdings(self._shards, ranks, is_expert=False)
        experts = _Holdings(self._shards, ranks, is_expert=True)
        self._groups = {False: dense, True: experts}
        self._pieces: dict[str, list[_Piece]] = {}  # by HF name, in the order of the stream
        self.tensors: dict[str, TensorSpec] = {}
        known: set[str] = set()
        for layer in (None, *range(bridge.facts.num_layers)):
            for tie in bridge.ties(layer):
                known.add(tie.megatron)
                self._plan(tie, self._groups[tie.is_expert])
        # A stage's copy of the tied embedding leaves with the embedding itself.
        copies = {"output_layer.weight"} if bridge.facts.has_tied_embeddings else set()
        held = {*dense.shapes, *experts.shapes}
        assert held - copies <= known, f"no HF tensor is tied to {min(held - copies - known)}"
        if tensors is None:
            assert known <= held, f"no rank has {min(known - held)}"

    def _plan(self, tie: Tie, group: _Holdings) -> None:
        if tie.megatron not in group.shapes:
            return
        shape, dtype = group.shapes[tie.megatron]
        axis, num_shards = tie.tp_axis or 0, 1 if tie.tp_axis is None else group.tp_size
        parts = tie.split(torch.empty(shape, device="meta"))
        for number, (name, part) in enumerate(zip(tie.hf, parts, strict=True)):
            flat = part.flatten(0, part.dim() - len(shape))  # as the HF tensor has its rows
            width = flat.shape[axis]
            size = width * num_shards if tie.rows is None else tie.rows
            pieces = []
            for shard in range(num_shards):
                start, stop = shard * width, min((shard + 1) * width, size)
                if start >= stop:  # padding alone
                    continue
                view = part.shape if stop - start == width else (stop - start, *flat.shape[1:])
                holders = group.holders[tie.megatron]
                pieces.append(
                    _Piece(
                        name,
                        tie,
                        number,
                        tuple(view),
                        dtype,
                        start,
                        stop,
                        holders=tuple(
                            rank
                            for tp_rank, rank in holders
                            if tie.tp_axis is None or tp_rank == shard
                        ),
                    )
                )
            whole = [*flat.shape]
            whole[axis] = size
            assert name not in self.tensors, f"{name} is tied twice"
            self._pieces[name] = pieces
            self.tensors[name] = TensorSpec(name, tuple(whole), dtype)

    # -- buckets -----------------------------------------------------------------------------------
    def buckets(self, bucket_bytes: int, taker: Taker = everyone) -> Iterator[Bucket]:
        """All tensors, each bucket on its ``taker``: the other ranks get an empty one in its place.
        A tensor above ``bucket_bytes`` is a bucket of its own.  Collective.
        """
        parts = [*cut(self.tensors.values(), bucket_bytes, lambda tensor: tensor.nbytes)]
        plan = [[tensor.name for tensor in part] for part in parts]
        blocks = _Blocks(max(self._layout(names)[1] for names in plan), self._ranks.device)
        for number, names in enumerate(plan):
            yield self.gather(names, to=taker(number), blocks=blocks)

    @torch.no_grad()
    def gather(
        self, names: Sequence[str], *, to: int | None = None, blocks: _Blocks | None = None
    ) -> Bucket:
        """These tensors on every rank, or on rank ``to`` alone, one behind the other in memory of
        their own (of ``blocks``).  Collective: all ranks ask for the same buckets in the same order.
        """
        receives = to is None or to == self._ranks.rank
        bucket = self._allocate(names, blocks) if receives else {}
        copies: list[_Piece] = []
        under_way: deque[Callable[[], None]] = deque()
        for group in self._groups.values():
            if to is not None and to not in group.ranks:
                continue
            senders: dict[int, list[_Rows]] = {}
            for piece in (piece for name in names for piece in self._pieces[name]):
                if piece.tie.is_expert != group.is_expert:
                    continue
                if to in piece.holders or len(piece.holders) == len(group.ranks):
                    copies += [piece] * receives
                else:
                    senders.setdefault(piece.holders[0], []).extend(_rows(piece))
            for sender, message in _in_turns(senders):
                if to is not None and self._ranks.rank not in (sender, to):
                    continue
                if len(under_way) == _IN_FLIGHT:
                    under_way.popleft()()
                under_way.append(self._begin(message, bucket, sender, to, group.group))
        for piece in copies:  # while the first messages are on their way
            piece.target(bucket).copy_(piece.source(self._shards[piece.tie.megatron]))
        for finish in under_way:
            finish()
        return bucket

    def _allocate(self, names: Sequence[str], blocks: _Blocks | None) -> Bucket:
        """Empty tensors in one block."""
        starts, end = self._layout(names)
        block = (blocks or _Blocks(end, self._ranks.device)).take()
        tensors = [self.tensors[name] for name in names]
        return {
            tensor.name: block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for tensor, start in zip(tensors, starts, strict=True)
        }

    def _layout(self, names: Sequence[str]) -> tuple[list[int], int]:
        """Where each begins in a block, in bytes, and the end: without gaps where their dtypes allow
        it, so that what is broadcast is the block itself.
        """
        starts, end = [], 0
        for tensor in (self.tensors[name] for name in names):
            starts.append(_up(end, tensor.dtype.itemsize))
            end = starts[-1] + tensor.nbytes
        return starts, end

    def _begin(
        self,
        message: Sequence[_Rows],
        bucket: Bucket,
        sender: int,
        to: int | None,
        group: dist.ProcessGroup,
    ) -> Callable[[], None]:
        """Send rows of pieces that ``sender`` has to the buckets of the group's ranks, or of ``to``;
        what is returned waits until they are there.
        """
        sends = self._ranks.rank == sender
        targets = [rows.piece.target(bucket)[rows.start : rows.stop] for rows in message if bucket]
        sources = [
            rows.piece.source(self._shards[rows.piece.tie.megatron])[rows.start : rows.stop]
            for rows in message
            if sends
        ]
        own = sources or targets
        packed: list[torch.Tensor] = []
        if len(own) == 1 and own[0].is_contiguous():
            buffer = own[0].view(-1).view(torch.uint8)
        else:
            places, total = _places(message)
            buffer = self._bytes(total)
            packed = [
                buffer[place].view(rows.piece.dtype)
                for place, rows in zip(places, message, strict=True)
            ]
            for room, source in zip(packed, sources, strict=sends):
                room.view(source.shape).copy_(source)
        if to is None:
            work = dist.broadcast(buffer, sender, group=group, async_op=True)
        elif sends:
            work = dist.isend(buffer, to, group=group)
        else:
            work = dist.irecv(buffer, sender, group=group)

        def finish() -> None:
            if work is not None:
                work.wait()
            arrived = sources
            if packed and not sends:
                rooms = zip(packed, targets, strict=True)
                arrived = [room.view(target.shape) for room, target in rooms]
            if arrived and targets:  # else it has come to its place
                for target, found in zip(targets, arrived, strict=True):
                    target.copy_(found)

        return finish

    def _bytes(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._ranks.device)


class _Blocks:
    """Memory of buckets: the next one is made in a block that nobody holds any more, if there is one.

    The C library gives the system back what is larger than 32 MiB, so that a host's bucket would have
    new pages every time: they cost as much as filling them, and by large pages still a fifth of that.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._size = size
        self._device = device
        self._free: list[mmap.mmap] = []
        self._num_made = 0

    def take(self) -> torch.Tensor:
        """Bytes [size], whose holder alone has them until it lets go of all that is made of them."""
        if self._size < _LARGE or self._device.type != "cpu":
            return torch.empty(self._size, dtype=torch.uint8, device=self._device)
        deadline = time.monotonic() + _COMES_BACK_S
        while self._num_made and not self._free and time.monotonic() < deadline:
            time.sleep(0.0005)  # whose thread has sent the last one lets go of it in a moment
        memory = self._free.pop() if self._free else self._new()
        held = memoryview(memory)  # which the tensors keep
        weakref.finalize(held, self._free.append, memory).atexit = False
        return torch.frombuffer(held, dtype=torch.uint8)

    def _new(self) -> mmap.mmap:
        self._num_made += 1
        memory = mmap.mmap(-1, self._size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # of a kernel without large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        return memory


class _Holdings:
    """What each rank of a group has: of experts, or of all else.  Building it is collective."""

    def __init__(self, shards: dict[str, torch.Tensor], ranks: Ranks, *, is_expert: bool) -> None:
        self.is_expert = is_expert
        self.group = ranks.expert_model_group if is_expert else ranks.model_group
        self.tp_size = ranks.expert_tp_size if is_expert else ranks.tp_size
        self.ranks = dist.get_process_group_ranks(self.group)
        tp_rank = ranks.expert_tp_rank if is_expert else ranks.tp_rank
        mine = {
            name: (tuple(tensor.shape), tensor.dtype)
            for name, tensor in shards.items()
            if (".mlp.experts." in name) == is_expert
        }
        reports = [(tp_rank, mine)] * len(self.ranks)
        dist.all_gather_object(reports, (tp_rank, mine), group=self.group)
        self.shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self.holders: dict[str, list[tuple[int, int]]] = {}  # (tp rank, rank)
        for rank, (tp_rank, found) in zip(self.ranks, reports, strict=True):
            for name, shape in found.items():
                assert self.shapes.setdefault(name, shape) == shape, (name, shape, rank)
                self.holders.setdefault(name, []).append((tp_rank, rank))


def _weights(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, and the buffers that carry weights: Megatron keeps the router's bias in one."""
    yield from chunk.named_parameters()
    yield from (pair for pair in chunk.named_buffers() if pair[0].endswith(".expert_bias"))


def _whole_name(bridge: Bridge, chunk: torch.nn.Module, name: str, ranks: Ranks) -> str:
    """A parameter's name in the whole model, from its name in a chunk: which counts layers from the
    chunk's first, and experts from the rank's first.
    """
    parts = name.split(".")
    if parts[:2] != ["decoder", "layers"]:
        return name
    layers: torch.nn.ModuleList = chunk.decoder.layers  # type: ignore[union-attr, assignment]
    layer = int(layers[int(parts[2])].layer_number) - 1  # type: ignore[arg-type]
    parts[2] = str(layer)
    if "local_experts" in parts:
        at = parts.index("local_experts") + 1
        first = ranks.ep_rank * bridge.facts.num_experts_of(layer) // ranks.ep_size
        parts[at] = str(first + int(parts[at]))
    return bridge.te_name(".".join(parts))


def _rows(piece: _Piece) -> Iterator[_Rows]:
    """A piece in rows that fit into messages; a longer row is a message of its own."""
    row = math.prod(piece.shape[1:]) * piece.dtype.itemsize
    step = max(1, _MESSAGE // row)
    for start in range(0, piece.shape[0], step):
        yield _Rows(piece, start, min(start + step, piece.shape[0]))


def _in_turns(senders: dict[int, list[_Rows]]) -> Iterator[tuple[int, list[_Rows]]]:
    """(sender, message) of all that is sent: every sender's first one, every sender's second, ..."""
    plans = [
        [(sender, message) for message in _messages(rows)]
        for sender, rows in sorted(senders.items())
    ]
    return (turn for turn in chain.from_iterable(zip_longest(*plans)) if turn is not None)


def _messages(rows: Sequence[_Rows]) -> Iterator[list[_Rows]]:
    """Large ones alone, small ones together."""
    yield from ([large] for large in rows if large.nbytes >= _ALONE)
    yield from cut((small for small in rows if small.nbytes < _ALONE), _MESSAGE, _padded)


def _padded(rows: _Rows) -> int:
    return _up(rows.nbytes, _ALIGN)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _places(message: Sequence[_Rows]) -> tuple[list[slice], int]:
    """Where each stands in the message's bytes, and how many these are; one alone has no padding."""
    places, start = [], 0
    for rows in message:
        places.append(slice(start, start + rows.nbytes))
        start += _padded(rows)
    return places, places[-1].stop
