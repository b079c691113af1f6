"""Requests to servers and back: one dispatcher, one loop that tries again, one bound.

What an attempt delivered before it failed is logged and stays; the next one goes on behind it with the
rest of the budget and the same seed, whose draws depend on the position alone: the tokens are those of
the undisturbed response.  A server that dies is no reason to draw anything anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from mtopd.rollout.sglang_servers import Server, Servers
from mtopd.rollout.sglang_wire import (
    Asking,
    AttemptFailed,
    Chunk,
    Events,
    Ids,
    Part,
    RequestRefused,
    Stream,
    error_text,
    generate_body,
)
from mtopd.types import MtopdError

if TYPE_CHECKING:
    import aiohttp

MOST_ATTEMPTS = 4  # in a row that bring no token
_DEATHS = 2  # of servers with the same response in flight: then it is tried alone, once
_FIRST_WAIT_S = 0.1  # doubled with every attempt
_LAST_BYTES_S = 1.0  # behind the last token
_DRAIN_S = 3.0  # for the last words of streams that paused servers have ended


@dataclass(slots=True, eq=False)
class Work:
    """One response on its way."""

    sample_id: int  # its name in the log
    prompt_id: str
    prompt_ids: Ids
    budget: int  # tokens that the whole response may have
    seed: int  # of this response's draws, 63 bits
    min_response: int = 0  # before so many tokens nothing ends it
    ids: array[int] = field(default_factory=lambda: array("i"))  # the logged prefix
    attempts: int = 0
    fruitless: int = 0  # failed attempts since the last token
    deaths: int = 0


@dataclass(slots=True)
class DispatchCounts:
    """What a phase cost; sums over its attempts."""

    attempts: int = 0
    continued: int = 0  # attempts behind a prefix
    refilled_tokens: int = 0  # prompt and prefix tokens of those
    cached_tokens: int = 0
    moved: int = 0  # attempts on another server than the one before
    failed: Counter[str] = field(default_factory=Counter)  # attempts, by why they ended


class _Attempt:
    """One open stream, as the watch over silence sees it."""

    __slots__ = ("last_s", "timeout")

    def __init__(self, timeout: asyncio.Timeout, now_s: float) -> None:
        self.timeout = timeout
        self.last_s = now_s


class Dispatcher:
    """Answers works with the servers in use."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        servers: Servers,
        *,
        rid_prefix: str,
        most_open: int,
        silence_s: float,
        append: Callable[[Work, Chunk], None],
        is_over: Callable[[Sequence[int]], bool] | None = None,
    ) -> None:
        """``append`` takes the tokens that were checked, in order, the last ones with their finish.
        ``is_over``: whether a response ends with its last token by what only the client knows.
        """
        self._session = session
        self._servers = servers
        self._rid_prefix = rid_prefix
        self._most_open = most_open
        self._silence_s = silence_s
        self._append = append
        self._is_over = is_over
        self._todo: deque[Work] = deque()
        self._suspects: deque[Work] = deque()
        self._last_server: dict[str, Server] = {}
        self._open: set[_Attempt] = set()
        self._running = 0  # works that a worker has in hand
        self._goes = True
        self._idle = asyncio.Event()
        self.counts = DispatchCounts()

    # -- pause -------------------------------------------------------------------------------------
    def stop(self) -> None:
        """Begin no attempt any more: `run` returns once every open stream has ended."""
        self._goes = False
        self._servers.wake(self._most_open * len(self._servers.all))

    async def drained(self) -> None:
        """Return once no stream is open.  One that has not ended soon is left: it reached its server
        behind the pause, and waits there until the server goes on.
        """
        try:
            async with asyncio.timeout(_DRAIN_S):
                await self._closed()
        except TimeoutError:
            for attempt in self._open:
                attempt.timeout.reschedule(-math.inf)
            await self._closed()

    async def _closed(self) -> None:
        while self._open:
            self._idle.clear()
            await self._idle.wait()

    # -- all works ---------------------------------------------------------------------------------
    async def run(self, works: Iterable[Work], asking: Asking) -> None:
        """Answer all; returns when each is finished.  Raises MtopdError for the first that cannot
        be.
        """
        self._todo.extend(works)
        num_workers = min(len(self._todo), self._most_open * len(self._servers.all))
        try:
            async with asyncio.TaskGroup() as group:
                watch = group.create_task(self._watch_silence())
                workers = [group.create_task(self._work(asking)) for _ in range(num_workers)]
                await asyncio.gather(*workers)
                watch.cancel()
        except ExceptionGroup as group_error:
            raise group_error.exceptions[0] from None
        finally:
            self._todo.clear()
            self._suspects.clear()

    async def _work(self, asking: Asking) -> None:
        while (work := await self._next()) is not None:
            self._running += 1
            try:
                await self._answer(work, asking)
            finally:
                self._running -= 1

    async def _next(self) -> Work | None:
        """The next response.  One that may have killed servers waits until it is alone."""
        while self._goes:
            if self._todo:
                return self._todo.popleft()
            if not self._suspects:
                return None
            if not self._running:
                return self._suspects.popleft()
            await asyncio.sleep(0.05)
        return None

    # -- one work ----------------------------------------------------------------------------------
    async def _answer(self, work: Work, asking: Asking) -> None:
        """The one loop that tries again."""
        while self._goes:
            if finish := _end_of(work, asking):  # a log may have all tokens, and not the end
                self._append(work, Chunk(array("i"), array("f"), finish))
                return
            before = len(work.ids)
            last = self._last_server.get(work.prompt_id)
            server = await self._servers.choose(lambda: self._goes, last, self._most_open)
            if server is None:
                return
            self._last_server[work.prompt_id] = server
            self._count_attempt(work, moved=last is not None and last is not server and before > 0)
            server.num_open += 1
            try:
                finish = await self._attempt(server, work, asking)
            except RequestRefused as error:
                raise MtopdError(
                    f"SGLang server {server.url} refuses prompt {work.prompt_id} "
                    f"({len(work.prompt_ids)} tokens, {before} of its response): {error}; remove "
                    "the prompt, or mend what is said"
                ) from None
            except AttemptFailed as error:
                if (
                    not self._goes
                ):  # a paused server is not looked at, its health waits until it goes on
                    return
                self.counts.failed[error.kind] += 1
                await self._failed(server, work, before, str(error))
                if work.deaths == _DEATHS and work not in self._suspects:
                    self._suspects.append(work)
                    return
                continue
            finally:
                server.num_open -= 1
                self._servers.wake()
            if finish in ("stop", "length"):
                return
            if finish == "abort" and self._goes:  # nobody here asked for it
                self.counts.failed["aborted"] += 1
                await self._failed(server, work, before, "the server aborted it unasked")

    async def _failed(self, server: Server, work: Work, before: int, why: str) -> None:
        """Wait before the next attempt; raise MtopdError when it was the last."""
        died = await self._servers.failed(server, why)
        if died:
            work.deaths += 1
        if work.deaths > _DEATHS:
            raise MtopdError(
                f"prompt {work.prompt_id}: {work.deaths} SGLang servers died while they answered it, "
                f"the last one with nothing else in flight; remove the prompt ({why})"
            )
        work.fruitless = 0 if len(work.ids) > before else work.fruitless + 1
        if work.fruitless >= MOST_ATTEMPTS:
            raise MtopdError(
                f"prompt {work.prompt_id}: {work.fruitless} attempts in a row brought no token, the "
                f"last on SGLang server {server.url}: {why}; look at its log, and start the same "
                "command again: what was answered is kept"
            )
        await asyncio.sleep(_FIRST_WAIT_S * 2**work.fruitless)

    async def _attempt(self, server: Server, work: Work, asking: Asking) -> str:
        """Stream one attempt into the log; returns its finish."""
        import aiohttp

        # The width is fixed: SGLang aborts by prefix, and "-1" is one of "-10".
        rid = f"{self._rid_prefix}-{work.sample_id:020d}-{work.attempts:05d}"
        rest, endless = work.budget - len(work.ids), work.min_response - 1 - len(work.ids)
        part = Part(endless, endless=True) if endless > 0 else Part(rest)
        input_ids = work.prompt_ids
        if work.ids:
            input_ids = np.concatenate([input_ids, np.array(work.ids)])
        body = generate_body(asking, rid, input_ids, part, work.seed)
        stream, events, clock = Stream(asking, part), Events(), time.monotonic
        try:
            async with asyncio.timeout(None) as timeout:
                attempt = _Attempt(timeout, clock())
                self._open.add(attempt)
                try:
                    async with self._session.post(server.url + "/generate", data=body) as response:
                        if response.status != 200:
                            said = error_text(await response.text())
                            if response.status == 400:
                                raise RequestRefused(said)
                            raise AttemptFailed(f"status {response.status}, {said}", "status")
                        while data := await response.content.readany():
                            attempt.last_s = clock()
                            for event in events.feed(data):
                                if finish := self._take(work, part, stream.read(event)):
                                    if stream.is_over:
                                        await _read_on(response)
                                    return finish
                finally:
                    self._open.discard(attempt)
                    self.counts.cached_tokens += stream.cached_tokens
                    self._idle.set()
        except TimeoutError:
            raise AttemptFailed(f"silent for {self._silence_s:.0f} s", "silence") from None
        except (aiohttp.ClientError, OSError) as error:
            raise AttemptFailed(f"{type(error).__name__} {error}", "connection") from None
        raise AttemptFailed("the stream ended without a finish reason", "unfinished")

    def _take(self, work: Work, part: Part, chunk: Chunk) -> str | None:
        """Log a chunk; returns the finish of the attempt, if it is one."""
        if self._is_over is not None:
            chunk = self._cut(work, chunk)
        work.ids.extend(chunk.ids)
        finish = chunk.finish
        if finish == "length" and part.endless:
            finish = "part"
        if finish in ("abort", "part"):
            chunk.finish = None  # the response goes on
        if chunk.ids or chunk.finish:
            self._append(work, chunk)
        return finish

    def _cut(self, work: Work, chunk: Chunk) -> Chunk:
        """End the chunk where a stop string is whole: leaving the stream aborts the request."""
        assert self._is_over is not None
        so_far = [*work.ids, *chunk.ids]
        for count in range(max(len(work.ids) + 1, work.min_response), len(so_far) + 1):
            if self._is_over(so_far[:count]):
                kept = count - len(work.ids)
                return Chunk(chunk.ids[:kept], chunk.log_probs[:kept], "stop")
        return chunk

    def _count_attempt(self, work: Work, *, moved: bool) -> None:
        counts = self.counts
        work.attempts += 1
        counts.attempts += 1
        counts.moved += moved
        if work.ids:
            counts.continued += 1
            counts.refilled_tokens += len(work.prompt_ids) + len(work.ids)

    async def _watch_silence(self) -> None:
        """One clock for all streams: a timer for each would cost more than a chunk."""
        while True:
            await asyncio.sleep(min(self._silence_s / 4, 1))
            now_s, limit = time.monotonic(), self._silence_s
            for attempt in self._open:
                if now_s - attempt.last_s > limit:
                    attempt.timeout.reschedule(-math.inf)


async def _read_on(response: aiohttp.ClientResponse) -> None:
    """To the end of a stream that has brought its last token, so that its connection serves the next
    one.
    """
    import aiohttp

    if response.content.at_eof():
        return
    with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError):
        async with asyncio.timeout(_LAST_BYTES_S):
            await response.content.read()


def _end_of(work: Work, asking: Asking) -> str | None:
    """What ended the tokens that there are."""
    length = len(work.ids)
    if length and length >= work.min_response and work.ids[-1] in asking.end_ids:
        return "stop"
    return "length" if length >= work.budget else None
