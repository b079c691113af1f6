"""Weights to servers by broadcast: a bracket of buckets over a group of rank 0 and their workers.

SGLang joins a group of its own with torch's private layout of keys in a store; this is the other end,
without SGLang.  A group name is never free again on a server, so every group has a fresh one.  A bucket
in which a server died is sent again to those that are left.

A server that was told to join a group whose store died with its trainer looks for it for 30 minutes,
and answers nobody.  So a note in the run directory says where the store is while servers join, and the
next start hosts one there until they have noticed (``let_go``).
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import itertools
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from mtopd.files import read_json, write_json
from mtopd.progress import say
from mtopd.rollout.sglang_servers import Server, ServerError, Servers
from mtopd.rollout.sglang_weights import WeightUpdate
from mtopd.types import MtopdError

JOIN_S = 60.0
BROADCAST_S = 60.0  # one bucket
_BUCKET_S = 600.0  # one bucket, and a server's answer
_LEAVE_S = 10.0
_LOOK_S = 0.5
_SMALL = 1 << 20  # bytes
_FEW = 4  # pieces that a bucket is sent in rather than copied into one
Piece = tuple[list[str], list[torch.Tensor], torch.Tensor]  # names, tensors, their bytes


class BroadcastGroup:
    """A store that this process hosts, and the group once all have joined."""

    def __init__(self, name: str, num_receivers: int, address: str, device: torch.device) -> None:
        self.name = name
        self.address = address
        self.size = num_receivers + 1
        self.device = device
        self.backend = "nccl" if device.type == "cuda" else "gloo"
        self._group: Any = None  # a ProcessGroup of the backend
        self._store = _host_store(address, 0, self.size)
        self.port = int(self._store.port)

    def join(self) -> None:
        """Wait for the servers' workers.  Raises RuntimeError when one does not come."""
        store: dist.Store = self._store
        # As torch nests them for a group with this name; gloo speaks only to these keys.
        for prefix in (self.name, f"{self.name}/", f"{self.device.type}/"):
            store = dist.PrefixStore(prefix, store)
        if self.backend == "nccl":
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = datetime.timedelta(seconds=BROADCAST_S)
            self._group = dist.ProcessGroupNCCL(store, 0, self.size, nccl)
            return
        gloo = getattr(dist.ProcessGroupGloo, "_Options")()  # noqa: B009 - the stubs lack it
        gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=self.address)]
        gloo._timeout = datetime.timedelta(seconds=BROADCAST_S)
        self._group = dist.ProcessGroupGloo(store, 0, self.size, gloo)

    def broadcast(self, flat: torch.Tensor) -> None:
        """Send bytes to all.  Raises RuntimeError when one is gone, and after `abort`."""
        assert self._group is not None, "nobody joined"
        self._group.broadcast(flat, 0).wait()

    def broadcast_from(self, handed: list[torch.Tensor]) -> None:
        """``broadcast`` of what is taken out of the list: a pool's thread keeps its arguments for a
        while after it has told of its end, and the next bucket would find no free memory.
        """
        self.broadcast(handed.pop())

    def abort(self) -> None:
        """Close the connections: whoever waits in a broadcast is let go with an error."""
        if self._group is not None:
            self._group.abort()
        self._group = None


def _host_store(address: str, port: int, size: int) -> dist.TCPStore:
    """A store on this address alone, which servers are told: whoever reaches it can take part.
    ``port`` 0 takes a free one.
    """
    listening = socket.create_server((address, port))
    return dist.TCPStore(
        address,
        int(listening.getsockname()[1]),
        size,
        is_master=True,
        timeout=datetime.timedelta(seconds=JOIN_S),
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )


# -- a start that was killed while servers joined --------------------------------------------------
@contextlib.contextmanager
def let_go(note: Path) -> Iterator[None]:
    """Until the block ends, servers that look for the store of a killed start find one, which closes once
    they have come: that ends their wait.  Only where that start's address is this host's.
    """
    if not note.is_file():
        yield
        return
    is_over = threading.Event()
    thread = threading.Thread(target=_host_and_close, args=(read_json(note), is_over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
    note.unlink(missing_ok=True)


def _host_and_close(where: Mapping[str, Any], is_over: threading.Event) -> None:
    told = False
    while not is_over.wait(_LOOK_S):
        try:
            store = _host_store(where["address"], where["port"], where["size"])
        except OSError as error:  # another host's address; or its port is somebody's again
            if not told:
                say(
                    "a start that was killed may have left SGLang servers looking for it at "
                    f"{where['address']}:{where['port']}, which cannot be had here ({error.strerror}); "
                    "where one does not answer, start it again"
                )
            told = True
            continue
        before = store.num_keys()
        while store.num_keys() == before and not is_over.wait(_LOOK_S):
            pass  # they look again after up to some seconds
        is_over.wait(_LOOK_S)  # for those who come together
        del store


class BroadcastUpdate(WeightUpdate):
    """An update by broadcast: while one bucket is on its way, the next one is made."""

    _numbers = itertools.count()

    def __init__(
        self, servers: Servers, group_prefix: str, version: str, note: Path | None = None
    ) -> None:
        super().__init__(servers, version)
        self._prefix = group_prefix
        self._note = note  # where it is written for ``let_go``
        self._group: BroadcastGroup | None = None  # from the first bucket on
        self._under_way: asyncio.Task[None] | None = None
        self._closing: tuple[str, torch.Tensor] | None = None  # comes again, at the end

    async def begin(self) -> None:
        """Open the bracket on all servers that answer, paused."""
        await super().begin()
        # A bracket that a former trainer left open would refuse this one's.
        await self._servers.everywhere("/end_weight_update", servers=self._members)
        await self._accept("/begin_weight_update")
        self._lap("begin")

    async def send(self, number: int, bucket: Mapping[str, torch.Tensor]) -> None:
        await self._arrival()
        self._num_bytes += sum(tensor.nbytes for tensor in bucket.values())
        name, least = min(bucket.items(), key=lambda pair: pair[1].nbytes)
        if self._closing is None and least.nbytes <= _SMALL:
            self._closing = name, least.clone()
        self._under_way = asyncio.create_task(self._send_parts(pieces(bucket)))

    async def end(self, count: int) -> None:
        """A small tensor comes again, with the version and the flush: while a bucket is sent, nobody
        knows whether it is the last.
        """
        await self._arrival()
        assert self._closing is not None, "an update without a small tensor: what has no norm?"
        name, tensor = self._closing
        await self._send([name], [tensor], tensor.view(-1).view(torch.uint8), is_last=True)
        await self._accept("/end_weight_update")
        self._lap("buckets")

    async def close(self) -> None:
        """Leave the group, on both sides."""
        if self._under_way is not None:  # what went wrong with it changes nothing any more
            await asyncio.gather(self._under_way, return_exceptions=True)
        group, self._group = self._group, None
        if group is not None:
            await self._leave(group, self._members)

    # -- buckets -----------------------------------------------------------------------------------
    async def _arrival(self) -> None:
        """Of the bucket that is under way.  Raises what went wrong with it."""
        task, self._under_way = self._under_way, None
        if task is not None:
            await task

    async def _send_parts(self, parts: list[Piece]) -> None:
        while parts:
            names, tensors, flat = parts.pop(0)
            sending = self._send(names, tensors, flat, is_last=False)
            if any(map(self._tells_bytes, self._members)):
                await asyncio.gather(sending, asyncio.to_thread(self._add_sums, names, [*tensors]))
            else:
                await sending

    def _add_sums(self, names: Sequence[str], handed: list[torch.Tensor]) -> None:
        """Of the tensors, which leave the list: ``broadcast_from`` says why."""
        handed.reverse()
        for name in names:
            self._sent.add(name, handed.pop())

    async def _send(
        self,
        names: Sequence[str],
        tensors: Sequence[torch.Tensor],
        flat: torch.Tensor,
        *,
        is_last: bool,
    ) -> None:
        body: dict[str, Any] = {
            "names": names,
            "dtypes": [str(t.dtype).removeprefix("torch.") for t in tensors],
            "shapes": [list(t.shape) for t in tensors],
            "load_format": "flattened_bucket",
            "flush_cache": is_last,
        }
        if is_last:
            body["weight_version"] = self._version
        while self._group is None or not await self._broadcast(self._group, flat, body):
            await self._form_group(flat.device)

    async def _form_group(self, device: torch.device) -> None:
        """A new group of the members: they are told, and this process waits for them."""
        name = f"{self._prefix}-{next(self._numbers):06d}"
        size = sum(server.tp_size for server in self._members)
        address = address_for(self._members[0].url)
        group = BroadcastGroup(name, size, address, device)
        if self._note is not None:
            where = {"address": address, "port": group.port, "size": group.size}
            write_json(self._note, where)
        joining = asyncio.create_task(asyncio.to_thread(group.join))
        first = 1
        posts = []
        for server in self._members:
            body = {
                "master_address": address,
                "master_port": group.port,
                "rank_offset": first,
                "world_size": group.size,
                "group_name": name,
                "backend": group.backend,
            }
            first += server.tp_size
            posts.append(
                self._servers.post(server, "/init_weights_update_group", body, JOIN_S + 10)
            )
        answers = await asyncio.gather(*posts, return_exceptions=True)
        if self._note is not None:
            self._note.unlink(missing_ok=True)
        try:
            await joining
        except RuntimeError as error:
            said = str(error).partition("\n")[0]
            answers = [
                a if isinstance(a, ServerError) else ServerError(f"did not join: {said}")
                for a in answers
            ]
        failed = [
            (server, answer)
            for server, answer in zip(self._members[:], answers, strict=True)
            if isinstance(answer, BaseException)
        ]
        for server, answer in failed:
            await self._drop(server, str(answer))
        self._require_members()
        if failed:  # those that are left wait in a group that will never be whole
            await asyncio.to_thread(group.abort)
            await self._form_group(device)
            return
        self._group = group

    async def _broadcast(
        self, group: BroadcastGroup, flat: torch.Tensor, body: dict[str, Any]
    ) -> bool:
        """Whether all members have the bucket; False: it has to be sent again, to those left."""
        body = {**body, "group_name": group.name}
        sending = asyncio.create_task(asyncio.to_thread(group.broadcast_from, [flat]))
        posts = {
            asyncio.create_task(
                self._servers.post(server, "/update_weights_from_distributed", body, _BUCKET_S)
            ): server
            for server in self._members
        }
        # Accepted, a post is answered after the broadcast; one answered before it was refused,
        # and the broadcast would wait for that server until its time is up.
        waiting: set[asyncio.Task[Any]] = {sending, *posts}
        while not sending.done():
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            refused = [posts[task] for task in done if task in posts and task.exception()]
            if refused:
                await self._leave(group, refused)
                break
        broken = (await asyncio.gather(sending, return_exceptions=True))[0]
        answers = await asyncio.gather(*posts, return_exceptions=True)
        wrong = {
            server: answer
            for server, answer in zip(posts.values(), answers, strict=True)
            if isinstance(answer, BaseException)
        }
        # In a broken broadcast also those fail that are well: they are sent it again.
        gone = {
            server: answer
            for server, answer in wrong.items()
            if broken is None or not _was_let_down(answer)
        }
        for server, answer in gone.items():
            await self._drop(server, str(answer))
        self._require_members()
        if broken is None and not wrong:
            return True
        if not gone:
            raise MtopdError(
                f"the broadcast of weights to {len(self._members)} SGLang servers broke ({broken}), "
                "and all still answer; look at the network between trainer and servers"
            )
        self._group = None
        await self._leave(group, self._members)
        # Whoever has this bucket takes it twice; the group of a broadcast that broke is of no use.
        return False

    async def _leave(self, group: BroadcastGroup, servers: Sequence[Server]) -> None:
        """End the group on these servers and here.  What a server closes on its side ends a broadcast
        that waits for it, at once; what is closed here waits for that broadcast.
        """
        body = {"group_name": group.name}
        await self._servers.everywhere(
            "/destroy_weights_update_group", body, _LEAVE_S, servers=servers
        )
        await asyncio.to_thread(group.abort)


def _was_let_down(answer: BaseException) -> bool:
    """The server waited for a bucket whose broadcast broke elsewhere: it has loaded nothing of it.
    One that could not read what it was asked fails to receive as well, of no network's doing.
    """
    return (
        isinstance(answer, ServerError)
        and answer.status == 400
        and "Failed to receive" in str(answer)
        and any(word in str(answer) for word in ("onnection", "imed out", "NCCL"))
    )


def pieces(bucket: Mapping[str, torch.Tensor]) -> list[Piece]:
    """A bucket as SGLang reads one: bytes of tensors without a gap, each at a multiple of its item
    size.  Tensors that lie so in memory are not copied; if they lie in many places, all are.
    """
    whole = {name: tensor.contiguous() for name, tensor in bucket.items()}
    runs: list[list[str]] = []
    memory, start, end = 0, 0, 0  # of the last run: its storage, first byte, byte behind it
    for name, tensor in whole.items():
        storage, place = tensor.untyped_storage().data_ptr(), tensor.data_ptr()
        if (storage, place) == (memory, end) and (place - start) % tensor.itemsize == 0:
            runs[-1].append(name)
        else:
            runs.append([name])
            memory, start = storage, place
        end = place + tensor.nbytes
    if len(runs) > _FEW:
        names = sorted(whole, key=lambda name: -whole[name].itemsize)
        tensors = [whole[name] for name in names]
        return [(names, tensors, torch.cat([t.view(-1).view(torch.uint8) for t in tensors]))]
    found = []
    for names in runs:
        tensors = [whole[name] for name in names]
        first, size = tensors[0], sum(tensor.nbytes for tensor in tensors)
        offset = int(first.storage_offset()) * first.itemsize
        flat = torch.empty(0, dtype=torch.uint8, device=first.device)
        flat.set_(first.untyped_storage(), offset, (size,), (1,))
        found.append((names, tensors, flat))
    return found


def address_for(url: str) -> str:
    """This machine's address on the way to a server."""
    host, port = urlsplit(url).hostname, urlsplit(url).port
    family, _, _, _, where = socket.getaddrinfo(host, port or 80, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(where)  # sends nothing
        return str(probe.getsockname()[0])
