"""The SGLang servers of a run as the client sees them: asked, chosen, out, back again.

A server that failed an attempt is out until it answers /health with the weights that are expected of
it.  One that was restarted has others: it stays out until the next update of weights has been proven
on it.  Nothing here is shared between threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mtopd.progress import say
from mtopd.rollout.sglang_wire import FLAGS, ServerFacts, check_server, error_text
from mtopd.types import MtopdError

if TYPE_CHECKING:
    import aiohttp

_LOOK_AGAIN_S = (0.5, 1.0, 2.0, 5.0)  # between two looks at a server that is out; the last repeats
_HEALTH_S = 30.0  # /health samples a token, and waits for a busy or paused scheduler
CONTROL_S = 60.0  # of a request that samples nothing


class ServerError(Exception):
    """A control request was not answered with 200; ``status`` is None where nothing came."""

    def __init__(self, why: str, status: int | None = None) -> None:
        super().__init__(why)
        self.status = status


@dataclass(slots=True, eq=False)
class Server:
    """One server, from the first connection to the end of the run."""

    url: str
    facts: ServerFacts | None = None
    num_open: int = 0  # attempts that stream from it
    why_out: str | None = "not asked yet"  # None: it takes requests
    watcher: asyncio.Task[None] | None = None
    waiting: list[asyncio.Future[bool]] = field(default_factory=list)  # who asks whether it died

    @property
    def tp_size(self) -> int:
        assert self.facts is not None, "not connected"
        return self.facts.tp_size


def open_session() -> aiohttp.ClientSession:
    """Connections to servers.  The caller closes it, in the same event loop."""
    import aiohttp

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        # Of itself aiohttp ends every stream after 5 minutes.
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=30),
        auto_decompress=False,
        read_bufsize=1 << 20,
        headers={"Content-Type": "application/json"},
    )


def wait_for_servers(
    urls: Sequence[str], *, context_length: int, seeded: bool, patience_s: float
) -> None:
    """Return once all servers answer, and as this client reads.  Raises MtopdError, with the flag
    to change, or the one that has not answered within ``patience_s``.
    """

    async def ask() -> None:
        async with open_session() as session:
            servers = Servers(session, urls, patience_s=patience_s)
            await servers.connect(context_length=context_length, seeded=seeded)

    asyncio.run(ask())


class Servers:
    """All servers of a run."""

    def __init__(
        self, session: aiohttp.ClientSession, urls: Sequence[str], *, patience_s: float
    ) -> None:
        self._session = session
        self.all = [Server(url.rstrip("/")) for url in urls]
        self.version: str | None = None  # of the weights that a server in use must have
        self.patience_s = patience_s
        self._waiting: deque[asyncio.Future[None]] = deque()  # for a server with room
        self._all_out_since: float | None = None

    @property
    def up(self) -> list[Server]:
        return [server for server in self.all if server.why_out is None]

    # -- asking ------------------------------------------------------------------------------------
    async def get(self, server: Server, path: str, timeout_s: float = CONTROL_S) -> Any:
        return await self._ask("GET", server, path, None, timeout_s)

    async def post(
        self,
        server: Server,
        path: str,
        body: Mapping[str, Any] | None = None,
        timeout_s: float = CONTROL_S,
    ) -> Any:
        """The answer, of JSON or text.  Raises ServerError for every other status than 200, and
        when none comes.
        """
        return await self._ask("POST", server, path, body or {}, timeout_s)

    async def _ask(
        self, method: str, server: Server, path: str, body: Mapping[str, Any] | None, limit_s: float
    ) -> Any:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=limit_s, sock_connect=5)
        url = server.url + path
        try:
            async with self._session.request(method, url, json=body, timeout=timeout) as answer:
                text = await answer.text()
                status = answer.status
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            said = f"no answer in {limit_s:.0f} s" if isinstance(error, TimeoutError) else error
            raise ServerError(f"{path}: {said or type(error).__name__}") from None
        if status != 200:
            raise ServerError(f"{path}: status {status}, {error_text(text)}", status)
        try:
            return json.loads(text)
        except ValueError:  # /flush_cache and others answer a sentence
            return text

    async def everywhere(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        timeout_s: float = CONTROL_S,
        servers: Sequence[Server] | None = None,
    ) -> dict[Server, Any]:
        """POST to all of ``servers`` (default: those in use); what they answer, or the ServerError."""
        asked = self.up if servers is None else list(servers)
        posts = (self.post(server, path, body, timeout_s) for server in asked)
        answers = await asyncio.gather(*posts, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, ServerError):
                raise answer
        return dict(zip(asked, answers, strict=True))

    # -- the start ---------------------------------------------------------------------------------
    async def connect(self, *, context_length: int, seeded: bool) -> None:
        """Check every server; all must answer, within the patience.  Raises MtopdError."""

        async def one(server: Server) -> None:
            deadline, is_told = time.monotonic() + self.patience_s, False
            while True:
                try:
                    info = await self.get(server, "/server_info")
                    model = await self.get(server, "/model_info")
                    break
                except ServerError as error:
                    if time.monotonic() > deadline:
                        raise MtopdError(
                            f"SGLang server {server.url} does not answer ({error}); waited "
                            f"{self.patience_s:.0f} s (rollout.patience_s): start it, with "
                            f"{' '.join(FLAGS)}, or take its URL out of rollout.servers"
                        ) from None
                    if not is_told:
                        is_told = True
                        say(
                            f"waiting for SGLang server {server.url}, up to {self.patience_s:.0f} s: "
                            f"{error}"
                        )
                await asyncio.sleep(1)
            server.facts = check_server(
                server.url, info, model, context_length=context_length, seeded=seeded
            )
            server.why_out = "has no weights of this run yet"

        await asyncio.gather(*map(one, self.all))

    # -- out and back ------------------------------------------------------------------------------
    def take_out(self, server: Server, why: str) -> None:
        """No more requests for it until `take_back`."""
        server.why_out = why
        if not self.up and self._all_out_since is None:
            self._all_out_since = time.monotonic()

    def take_back(self, server: Server) -> None:
        """It has the expected weights, proven, and answers."""
        server.why_out = None
        self._all_out_since = None
        self.wake(len(self._waiting))

    def wake(self, count: int = 1) -> None:
        """Let so many look again that wait in `choose`."""
        while count and self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(None)
                count -= 1

    async def failed(self, server: Server, why: str) -> bool:
        """An attempt failed there: it is out until it shows that it is well.  Returns whether it
        died.
        """
        found: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        server.waiting.append(found)
        if server.watcher is None or server.watcher.done():
            self.take_out(server, why)
            server.watcher = asyncio.create_task(self._watch(server))
        return await found

    async def _watch(self, server: Server) -> None:
        """Look at a server until it is well, or has other weights."""
        looks = 0
        while True:
            try:
                model = await self.get(server, "/model_info", 10)
                found, died = str(model.get("weight_version")), False
                is_stale = found != self.version
            except ServerError as error:
                server.why_out, died, is_stale = str(error), True, False
            _tell(server, died or is_stale)  # also who came behind the first look
            if is_stale:
                self.take_out(server, f"was restarted: it has the weights {found!r}")
                return
            if not died:
                try:
                    await self.get(server, "/health", _HEALTH_S)
                    break
                except ServerError as error:
                    server.why_out = str(error)
            await asyncio.sleep(_LOOK_AGAIN_S[min(looks, len(_LOOK_AGAIN_S) - 1)])
            looks += 1
        _tell(server, False)
        self.take_back(server)

    async def choose(
        self, goes: Callable[[], bool], preferred: Server | None, most: int
    ) -> Server | None:
        """The server with the fewest open attempts, or ``preferred`` (its cache knows the prompt)
        while it is not the fuller one.  Waits while all are full or out; None once ``goes`` is
        False.  Raises MtopdError when all were out for too long.
        """
        while goes():
            free = [server for server in self.up if server.num_open < most]
            if free:
                fewest = min(server.num_open for server in free)
                if preferred in free and preferred.num_open <= fewest:
                    return preferred
                return next(server for server in free if server.num_open == fewest)
            self._check_patience()
            waiting = asyncio.get_running_loop().create_future()
            self._waiting.append(waiting)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):  # then the patience is looked at again
                    await waiting
        return None

    def _check_patience(self) -> None:
        since = self._all_out_since
        if since is None or time.monotonic() - since < self.patience_s:
            return
        said = "; ".join(f"{server.url}: {server.why_out}" for server in self.all)
        raise MtopdError(
            f"all SGLang servers are out for {self.patience_s:.0f} s: {said}; "
            "start them again and start the same command again: what was answered is kept"
        )

    async def close(self) -> None:
        for server in self.all:
            if server.watcher is not None:
                server.watcher.cancel()


def _tell(server: Server, died: bool) -> None:
    for waiting in server.waiting:
        if not waiting.done():
            waiting.set_result(died)
    server.waiting.clear()
