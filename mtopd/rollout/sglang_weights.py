"""New weights on running servers: pause, weights, proof, go on.

How weights come to servers is ``sglang_broadcast``'s and ``sglang_disk``'s.  A server in whose answers
anything is amiss between the first weights and the proof is out: what it holds is unknown.  The others
go on.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mtopd.metrics_lines import WeightUpdateLine
from mtopd.progress import say
from mtopd.rollout.sglang_proof import (
    ProbeBound,
    SentChecksums,
    largest_difference,
    probe_body,
    read_probe,
)
from mtopd.rollout.sglang_servers import CONTROL_S, Server, ServerError, Servers
from mtopd.types import MtopdError


class WeightUpdate(ABC):
    """One update of all servers that answer, step by step: `begin`, `send` for each bucket, `end`,
    `prove`; `close` in any case.
    """

    def __init__(self, servers: Servers, version: str) -> None:
        self._servers = servers
        self._version = version
        self._sent = SentChecksums()
        self._members: list[Server] = []
        self._began = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self._num_bytes = 0

    @property
    def members(self) -> list[Server]:
        """Servers that have taken everything so far."""
        return self._members

    # -- the steps ---------------------------------------------------------------------------------
    async def begin(self) -> None:
        """Pause all servers that answer."""
        await self._find_members()
        await self._accept("/pause_generation", {"mode": "abort"})

    @abstractmethod
    async def send(self, number: int, bucket: Mapping[str, torch.Tensor]) -> None:
        """Bucket ``number``, counted from 0: under way when this returns.  Raises MtopdError or
        OSError, also for the one before.
        """

    @abstractmethod
    async def end(self, count: int) -> None:
        """All ``count`` buckets are on every member, under the version, no state of the old weights
        in its prefix cache.
        """

    async def prove(
        self,
        sequences: Sequence[Sequence[int]],
        expected: Sequence[np.ndarray] | None,
        bound: ProbeBound,
    ) -> float:
        """Compare checksums, let the servers go on, and compare log-probs of ``sequences`` with the
        trainer's ``expected``; returns the largest difference.  Servers that fail are out, paused.
        """
        await self._compare_checksums()
        self._lap("checksums")
        await self._accept("/continue_generation")
        worst = 0.0
        for server in self._members[:]:
            try:
                model = await self._servers.get(server, "/model_info")
                if (found := str(model.get("weight_version"))) != self._version:
                    raise ServerError(f"its weights are called {found!r} after the update")
                if expected is not None:
                    difference = await self._probe(server, sequences, expected)
                    worst = max(worst, difference)
                    if not difference <= bound.limit:
                        raise ServerError(
                            f"its log-probs differ by {difference:.2e} from the trainer's own on the "
                            f"same tokens, {bound.limit:.2g} is allowed{bound.origin}: it does not "
                            "compute with the weights it was sent"
                        )
            except ServerError as error:
                await self._drop(server, str(error), pause=True)
        self._require_members()
        self._lap("probe")
        return worst

    def cost(self, difference: float) -> WeightUpdateLine:
        """What it took.  ``difference``: the probe's."""
        return WeightUpdateLine(
            seconds=dict(self.seconds),
            bytes_sent=self._num_bytes,
            servers=len(self._members),
            servers_out=len(self._servers.all) - len(self._members),
            probe_difference=difference,
        )

    @abstractmethod
    async def close(self) -> None:
        """Leave nothing behind."""

    def _lap(self, step: str) -> None:
        """Seconds since the step before."""
        now = time.perf_counter()
        self.seconds[step], self._began = now - self._began, now

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

    async def _accept(
        self, path: str, body: Mapping[str, Any] | None = None, timeout_s: float = CONTROL_S
    ) -> None:
        """POST to all members; who does not accept is none any more."""
        answers = await self._servers.everywhere(path, body, timeout_s, self._members)
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

    def _tells_bytes(self, server: Server) -> bool:
        """Its checksums are those of what it was sent: of whole tensors, in a hash that is known."""
        assert server.facts is not None
        return server.tp_size == 1 and server.facts.device == "cpu"

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
            if self._tells_bytes(server):
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
