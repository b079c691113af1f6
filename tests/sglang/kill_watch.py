"""Whom `kill_rollouts` kills, and when: what passes between client and servers is watched by a proxy
each, and a kill is aimed at one of the next requests or answers of a kind.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from tests.sglang.kill_samples import Sample
from tests.sglang.proxy import Proxy
from tests.support.forked_ranks import Ranks
from tests.support.sglang_servers import RunningServer

GENERATE, BUCKET = "/generate", "/update_weights_from_distributed"
JOIN, CHECKSUMS, GO_ON = "/init_weights_update_group", "/weights_checker", "/continue_generation"
CLIENT, OTHER_RANK, SERVER = "client", "rank 1", "server"


@dataclass(frozen=True)
class Target:
    """Whom to kill, and when: at one of the next ``within`` times that this passes a proxy."""

    doomed: tuple[str, ...]
    path: str | None  # None: at any instant
    is_answer: bool = False  # a piece of an answer, which the client has not seen; else a request
    within: int = 1

    @property
    def name(self) -> str:
        when = {
            GENERATE: "mid-response",
            BUCKET: "between begin and end of an update",
            JOIN: "while the group of an update forms",
            CHECKSUMS: "after the end of an update, before its proof",
            GO_ON: "before servers go on after an update",
            None: "at any instant",
        }
        return f"{' and '.join(self.doomed)} {when[self.path]}"


TARGETS = (
    Target((SERVER,), GENERATE, is_answer=True, within=60),
    Target((CLIENT,), GENERATE, is_answer=True, within=60),
    Target((CLIENT,), BUCKET, within=12),
    Target((SERVER, CLIENT), GENERATE, is_answer=True, within=60),
    Target((CLIENT,), CHECKSUMS, within=2),
    Target((SERVER,), BUCKET, within=12),
    Target((CLIENT,), GENERATE, is_answer=True, within=20),
    Target((OTHER_RANK,), BUCKET, within=12),
    Target((CLIENT,), CHECKSUMS, is_answer=True, within=2),
    Target((CLIENT,), GENERATE, within=60),
    Target((CLIENT,), JOIN, within=2),
    Target((SERVER,), GENERATE, is_answer=True, within=20),
    Target((CLIENT,), GO_ON, is_answer=True, within=2),
    Target((CLIENT,), None),
)


class Watch:
    """Sees what passes the proxies, in their threads: kills when it is time, and remembers what must not
    be.
    """

    def __init__(self, servers: Sequence[RunningServer]) -> None:
        self.servers = servers
        self.on_update: Callable[[], None] = lambda: None
        self.ranks: Ranks | None = None
        self.known: dict[int, Sample] = {}  # by the seed of its draws
        self.held: dict[int, int] = {}  # tokens of it that no start may ask for again
        self.wrong: list[str] = []
        self.num_continued = 0  # requests behind tokens that were kept
        self.hit: tuple[Target, RunningServer | None] | None = None
        self._lock = threading.Lock()
        self._target: Target | None = None
        self._left = 0
        self._members: set[int] = set()  # servers that take part in updates since their last start

    def aim(self, target: Target | None, count: int) -> None:
        """Strike at the ``count``-th of what the target names; None: at nothing any more."""
        with self._lock:
            self.hit, self._target, self._left = None, target, count

    def begin_start(self) -> None:
        """A start waits for all servers."""
        self._members = set(range(len(self.servers)))

    def passes(self, number: int, path: str, asked: dict[str, Any], *, is_answer: bool) -> None:
        if path == GENERATE and not asked.get("stream"):
            return  # a probe
        with self._lock:
            if not is_answer:
                if path == "/begin_weight_update":
                    self._members.add(number)
                    self.on_update()
                elif path == GENERATE and self.known:
                    self._check_asked(asked)
            target = self._target
            if target is None or (target.path, target.is_answer) != (path, is_answer):
                return
            if SERVER in target.doomed and len(self._members) < 2:
                return  # nobody would be left
            self._left -= 1
            if self._left <= 0:
                self._strike(target, number)

    def strike(self) -> None:
        """At once, whatever passes."""
        with self._lock:
            if self._target is not None:
                self._strike(self._target, 0)

    def _strike(self, target: Target, number: int) -> None:
        assert self.ranks is not None
        server = self.servers[number] if SERVER in target.doomed else None
        if server is not None:
            self._members.discard(number)
            os.killpg(server.pid, signal.SIGKILL)
        for rank, name in enumerate((CLIENT, OTHER_RANK)):
            if name in target.doomed:
                self.ranks.kill(rank)
        self._target, self.hit = None, (target, server)

    def _check_asked(self, asked: dict[str, Any]) -> None:
        seed = asked["sampling_params"]["sampling_seed"]
        sample, ids = self.known[seed], asked["input_ids"]
        count = len(ids) - len(sample.prompt_ids)
        self.num_continued += count > 0
        if ids != sample.prompt_ids + sample.response_ids[:count]:
            self.wrong.append(f"{asked['rid']} goes on behind other tokens")
        if not self.held.get(seed, 0) <= count < len(sample.response_ids):
            self.wrong.append(
                f"{asked['rid']} is asked for behind {count} tokens; "
                f"{self.held.get(seed, 0)} of {len(sample.response_ids)} were kept"
            )


class WatchedProxy(Proxy):
    def __init__(self, target: str, passes: Callable[..., None]) -> None:
        self._watch = passes
        super().__init__(target)

    async def _hand_on(
        self, request: web.Request, body: bytes, asked: dict[str, Any]
    ) -> web.StreamResponse:
        self._watch(request.path, asked, is_answer=False)
        return await super()._hand_on(request, body, asked)

    def _passes(self, path: str, asked: dict[str, Any], data: bytes) -> None:
        self._watch(path, asked, is_answer=True)
