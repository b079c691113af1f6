"""New weights on running servers: pause, a bracket of broadcast buckets, proof, go on.

A server in whose answers anything is amiss between the first bucket and the proof is out: what it
holds is unknown.  The others go on; a bucket in which one died is sent again to those that are left.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mtopd.progress import say
from mtopd.rollout.sglang_broadcast import JOIN_S, BroadcastGroup, address_for
from mtopd.rollout.sglang_proof import (
    SentChecksums,
    largest_difference,
    probe_body,
    read_probe,
)
from mtopd.rollout.sglang_servers import Server, ServerError, Servers
from mtopd.types import MtopdError

_BUCKET_S = 600.0


class WeightUpdate:
    """One update of all servers that answer, step by step: `begin`, `send` for each bucket, `end`,
    `prove`.
    """

    _numbers = itertools.count()

    def __init__(self, servers: Servers, group_prefix: str, version: str) -> None:
        self._servers = servers
        self._prefix = group_prefix
        self._version = version
        self._group: BroadcastGroup | None = None
        self._sent = SentChecksums()
        self._members: list[Server] = []
        self._held: tuple[list[str], list[torch.Tensor]] | None = None
        self.seconds: dict[str, float] = {}

    @property
    def members(self) -> list[Server]:
        """Servers that have taken everything so far."""
        return self._members

    # -- the steps ---------------------------------------------------------------------------------
    async def begin(self) -> None:
        """Pause all servers that answer, and open the bracket on them."""
        started = time.perf_counter()
        await self._find_members()
        await self._accept("/pause_generation", {"mode": "abort"})
        # A bracket that a former trainer left open would refuse this one's.
        await self._servers.everywhere("/end_weight_update", servers=self._members)
        await self._accept("/begin_weight_update")
        await self._form_group()
        self.seconds["begin"] = time.perf_counter() - started

    async def send(self, bucket: Mapping[str, torch.Tensor]) -> None:
        """Broadcast one bucket.  The one before is sent first: the last carries the version."""
        started = time.perf_counter()
        held, self._held = self._held, (list(bucket), [t.contiguous() for t in bucket.values()])
        if held is not None:
            await self._send(held, is_last=False)
        self.seconds["send"] = self.seconds.get("send", 0.0) + time.perf_counter() - started

    async def end(self) -> None:
        """The last bucket, with the version and the flush of the prefix cache; close the bracket."""
        started = time.perf_counter()
        assert self._held is not None, "an update without a tensor"
        held, self._held = self._held, None
        await self._send(held, is_last=True)
        await self._accept("/end_weight_update")
        self.seconds["end"] = time.perf_counter() - started

    async def prove(
        self,
        sequences: Sequence[Sequence[int]],
        expected: Sequence[np.ndarray] | None,
        tolerance: float,
    ) -> float:
        """Compare checksums, let the servers go on, and compare log-probs of ``sequences`` with the
        trainer's ``expected``; returns the largest difference.  Servers that fail are out, paused.
        """
        started = time.perf_counter()
        await self._compare_checksums()
        self.seconds["checksums"] = time.perf_counter() - started
        await self._accept("/continue_generation")
        started, worst = time.perf_counter(), 0.0
        for server in self._members[:]:
            try:
                model = await self._servers.get(server, "/model_info")
                if (found := str(model.get("weight_version"))) != self._version:
                    raise ServerError(f"its weights are called {found!r} after the update")
                if expected is not None:
                    difference = await self._probe(server, sequences, expected)
                    worst = max(worst, difference)
                    if not difference <= tolerance:
                        raise ServerError(
                            f"its log-probs differ by {difference:.2e} from the trainer's own on the "
                            f"same tokens, {tolerance:.0e} is allowed: it does not compute with the "
                            "weights it was sent"
                        )
            except ServerError as error:
                await self._drop(server, str(error), pause=True)
        self._require_members()
        self.seconds["probe"] = time.perf_counter() - started
        return worst

    async def close(self) -> None:
        """Leave the group, on both sides."""
        group, self._group = self._group, None
        self._held = None
        if group is None:
            return
        body = {"group_name": group.name}
        await self._servers.everywhere("/destroy_weights_update_group", body, servers=self._members)
        await asyncio.to_thread(group.abort)

    # -- servers -----------------------------------------------------------------------------------
    async def _find_members(self) -> None:
        """All that answer take part, whatever was wrong with them before."""

        async def answers(server: Server) -> bool:
            try:
                await self._servers.get(server, "/model_info", 10)
            except ServerError as error:
                self._servers.take_out(server, str(error))
                return False
            if server.watcher is not None:
                server.watcher.cancel()
            self._servers.take_out(server, "is given weights")
            return True

        answer = await asyncio.gather(*map(answers, self._servers.all))
        self._members = [s for s, ok in zip(self._servers.all, answer, strict=True) if ok]
        self._require_members()

    async def _accept(self, path: str, body: Mapping[str, Any] | None = None) -> None:
        """POST to all members; who does not accept is none any more."""
        answers = await self._servers.everywhere(path, body, servers=self._members)
        for server, answer in answers.items():
            if isinstance(answer, ServerError):
                await self._drop(server, str(answer))
        self._require_members()

    async def _drop(self, server: Server, why: str, *, pause: bool = False) -> None:
        say(f"SGLang server {server.url} is out until the next update of weights: {why}")
        self._members.remove(server)
        self._servers.take_out(server, why)
        if pause:  # it must not answer anybody with these
            await self._servers.everywhere("/pause_generation", {"mode": "abort"}, servers=[server])

    def _require_members(self) -> None:
        if not self._members:
            said = "; ".join(f"{server.url}: {server.why_out}" for server in self._servers.all)
            raise MtopdError(
                f"no SGLang server took the weights {self._version}: {said}; look at their logs, "
                "start them again, and start the same command again: what was answered is kept"
            )

    # -- buckets -----------------------------------------------------------------------------------
    async def _form_group(self) -> None:
        """A new group of the members: they are told, and this process waits for them."""
        name = f"{self._prefix}-{next(self._numbers):06d}"
        size = sum(server.tp_size for server in self._members)
        address, device = address_for(self._members[0].url), self._device()
        group = BroadcastGroup(name, size, address, device)
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
            await self._form_group()
            return
        self._group = group

    def _device(self) -> torch.device:
        assert self._held is None or self._held[1], "a bucket without a tensor"
        return self._held[1][0].device if self._held else torch.device("cpu")

    async def _send(self, held: tuple[list[str], list[torch.Tensor]], *, is_last: bool) -> None:
        names, tensors = held
        body: dict[str, Any] = {
            "names": names,
            "dtypes": [str(t.dtype).removeprefix("torch.") for t in tensors],
            "shapes": [list(t.shape) for t in tensors],
            "load_format": "flattened_bucket",
            "flush_cache": is_last,
        }
        if is_last:
            body["weight_version"] = self._version
        flat = torch.cat([t.view(-1).view(torch.uint8) for t in tensors])
        while not await self._broadcast(flat, body):
            await self._form_group()
        for name, tensor in zip(names, tensors, strict=True):
            self._sent.add(name, tensor)

    async def _broadcast(self, flat: torch.Tensor, body: dict[str, Any]) -> bool:
        """Whether all members have the bucket; False: it has to be sent again, to those left."""
        group = self._group
        assert group is not None, "no group"
        body = {**body, "group_name": group.name}
        sending = asyncio.create_task(asyncio.to_thread(group.broadcast, flat))
        posts = {
            asyncio.create_task(
                self._servers.post(server, "/update_weights_from_distributed", body, _BUCKET_S)
            ): server
            for server in self._members
        }
        # Accepted, a post is answered after the broadcast; one answered before it was refused,
        # and the broadcast would wait for that server for good.
        waiting: set[asyncio.Task[Any]] = {sending, *posts}
        while not sending.done():
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if any(task is not sending and task.exception() is not None for task in done):
                await asyncio.to_thread(group.abort)
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
        await asyncio.to_thread(group.abort)
        # Whoever has this bucket takes it twice; the group of a broadcast that broke is of no use.
        return False

    # -- proof -------------------------------------------------------------------------------------
    async def _compare_checksums(self) -> None:
        """Servers of one layout hold the same bytes; on a CPU, those that were sent."""
        body = {"action": "checksum"}
        answers = await self._servers.everywhere("/weights_checker", body, servers=self._members)
        first: dict[tuple[int, str], tuple[Server, Any]] = {}
        for server, answer in answers.items():
            if isinstance(answer, ServerError):
                await self._drop(server, str(answer))
                continue
            ranks = [rank["checksums"] for rank in answer["ranks"]]
            assert server.facts is not None
            if server.tp_size == 1 and server.facts.device == "cpu":
                wrong = self._sent.differences(ranks[0])
                if wrong:
                    await self._drop(
                        server,
                        f"after the update {len(wrong)} of its {len(ranks[0])} tensors are not those "
                        f"that were sent: {', '.join(wrong[:3])}",
                    )
                    continue
            layout = (server.tp_size, server.facts.device)
            other, known = first.setdefault(layout, (server, ranks))
            if known != ranks:
                differing = sorted(
                    name
                    for one, two in zip(known, ranks, strict=True)
                    for name in one.keys() | two.keys()
                    if one.get(name) != two.get(name)
                )
                why = f"{other.url} and {server.url} hold other bytes in {', '.join(differing[:3])}"
                for wrong_server in (server, other):  # nobody knows which of them is right
                    if wrong_server in self._members:
                        await self._drop(wrong_server, why)
        self._require_members()

    async def _probe(
        self, server: Server, sequences: Sequence[Sequence[int]], expected: Sequence[np.ndarray]
    ) -> float:
        """The first round computes all; the second reads the beginnings from the prefix cache."""
        worst = 0.0
        for start in (0, len(sequences[0]) - 2):
            answers = await self._servers.post(
                server, "/generate", probe_body(sequences, start), 120
            )
            try:
                found = read_probe(answers, sequences, start)
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise ServerError(f"its answer to the probe cannot be read: {error}") from None
            worst = max(worst, largest_difference(found, expected))
        return worst


def _was_let_down(answer: BaseException) -> bool:
    """The server waited for a bucket whose broadcast broke elsewhere: it has loaded nothing of it."""
    return (
        isinstance(answer, ServerError)
        and answer.status == 400
        and "Failed to receive" in str(answer)
    )
