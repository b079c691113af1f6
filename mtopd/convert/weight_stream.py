"""Weights leave the trainer in buckets: HF tensors, gathered over tp, pp and ep a bucket at a time.

No rank ever has more than a bucket beside its own shards.  Every rank of a model group (tp x pp; for
experts ep x expert tp x pp) reports once what it has; from then on all know, without a word, which
rank sends which part of a bucket, and nothing but weights is sent.  Parts of one sender go together,
up to ``_MESSAGE`` bytes; a rank that has them itself is asked for nothing.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mtopd.convert.bridge import Bridge, Tie
from mtopd.hf_weights import Bucket, TensorSpec, cut
from mtopd.megatron.parallel import Ranks

_MESSAGE = 16 << 20
_ALIGN = 64  # bytes: any dtype's, and what a GPU copies fastest
_LARGE = 32 << 20  # bytes that the C library's allocator takes from the system, and gives it back

Tensors = Iterable[tuple[str, torch.Tensor]]


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
    def buckets(self, bucket_bytes: int, *, to: int | None = None) -> Iterator[Bucket]:
        """All tensors on every rank, or on rank ``to`` alone: the others get as many empty buckets.
        A tensor above ``bucket_bytes`` is a bucket of its own.  Collective.
        """
        for found in cut(self.tensors.values(), bucket_bytes, lambda tensor: tensor.nbytes):
            yield self.gather([tensor.name for tensor in found], to=to)

    @torch.no_grad()
    def gather(self, names: Sequence[str], *, to: int | None = None) -> Bucket:
        """These tensors on every rank, or on rank ``to`` alone, in memory of their own.  Collective:
        all ranks ask for the same buckets in the same order.
        """
        receives = to is None or to == self._ranks.rank
        bucket = self._allocate(names) if receives else {}
        for group in self._groups.values():
            if to is not None and to not in group.ranks:
                continue
            pieces = [
                piece
                for name in names
                for piece in self._pieces[name]
                if piece.tie.is_expert == group.is_expert
            ]
            senders: dict[int, list[_Rows]] = {}
            for piece in pieces:
                if to in piece.holders or len(piece.holders) == len(group.ranks):
                    if receives:
                        piece.target(bucket).copy_(piece.source(self._shards[piece.tie.megatron]))
                    continue
                senders.setdefault(piece.holders[0], []).extend(_rows(piece))
            for sender in sorted(senders):
                for message in cut(senders[sender], _MESSAGE, _padded):
                    self._move(message, bucket, sender, to, group.group)
        return bucket

    def _allocate(self, names: Sequence[str]) -> Bucket:
        """Empty tensors in one block: blocks of a size are what an allocator can use again."""
        tensors = [self.tensors[name] for name in names]
        block = self._block(sum(_padded(tensor) for tensor in tensors))
        bucket, start = {}, 0
        for tensor in tensors:
            place = block[start : start + tensor.nbytes]
            bucket[tensor.name] = place.view(tensor.dtype).view(tensor.shape)
            start += _padded(tensor)
        return bucket

    def _move(
        self,
        message: Sequence[_Rows],
        bucket: Bucket,
        sender: int,
        to: int | None,
        group: dist.ProcessGroup,
    ) -> None:
        """Rows of pieces that ``sender`` has, into the buckets of the group's ranks, or of ``to``."""
        me = self._ranks.rank
        if to is not None and me not in (sender, to):
            return
        targets = [rows.piece.target(bucket)[rows.start : rows.stop] for rows in message if bucket]
        sources = []
        if me == sender:
            shards = [self._shards[rows.piece.tie.megatron] for rows in message]
            sources = [
                rows.piece.source(shard)[rows.start : rows.stop]
                for rows, shard in zip(message, shards, strict=True)
            ]
            for target, source in zip(targets, sources, strict=bool(targets)):
                target.copy_(source)
        own = sources or targets
        if len(own) == 1 and own[0].is_contiguous():
            buffer, is_copied = own[0].view(-1).view(torch.uint8), False
        else:
            places, total = _places(message)
            buffer, is_copied = self._bytes(total), True
            packed = [
                buffer[place].view(rows.piece.dtype)
                for place, rows in zip(places, message, strict=True)
            ]
            for room, source in zip(packed, sources, strict=bool(sources)):
                room.view(source.shape).copy_(source)
        if to is None:
            dist.broadcast(buffer, sender, group=group)
        elif me == sender:
            dist.send(buffer, to, group=group)
        else:
            dist.recv(buffer, sender, group=group)
        if is_copied and me != sender:
            for room, target in zip(packed, targets, strict=True):
                target.copy_(room.view(target.shape))

    def _block(self, size: int) -> torch.Tensor:
        """Memory of a bucket.  The C library gives the system back what is larger than 32 MiB, so
        that a host's bucket has new pages every time: by large ones they come in a fifth of the time.
        """
        if size < _LARGE or self._ranks.device.type != "cpu":
            return self._bytes(size)
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # of a kernel without large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=torch.uint8)  # which keeps ``memory``

    def _bytes(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._ranks.device)


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


def _padded(item: TensorSpec | _Rows) -> int:
    return -(-item.nbytes // _ALIGN) * _ALIGN


def _places(message: Sequence[_Rows]) -> tuple[list[slice], int]:
    """Where each stands in the message's bytes, and how many these are; one alone has no padding."""
    places, start = [], 0
    for rows in message:
        places.append(slice(start, start + rows.nbytes))
        start += _padded(rows)
    return places, places[-1].stop
