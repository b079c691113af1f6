"""Whatever servers do, a response is the undisturbed one or an error: never another one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import aiohttp
import numpy as np
import pytest
from aiohttp import web

from mtopd.rollout import sglang_dispatch
from mtopd.rollout.sglang_dispatch import Dispatcher, Work
from mtopd.rollout.sglang_servers import Servers, open_session
from mtopd.rollout.sglang_wire import Asking, Chunk
from mtopd.types import MtopdError
from tests.rollout.fake_sglang import END, VOCABULARY, FakeServer, whole

BUDGET = 60
Tokens = dict[int, list[int]]
Finishes = dict[int, str]


def works(count: int, **changes: Any) -> list[Work]:
    return [
        Work(
            i,
            f"a/{i}",
            np.array([1 + i % 40, 2, 3], np.int32),
            BUDGET,
            seed=1000 + i,
            **changes,
        )
        for i in range(count)
    ]


class Run:
    """Servers, a dispatcher, and what it logged."""

    def __init__(self, servers: Sequence[FakeServer], **changes: Any) -> None:
        self.fakes = servers
        self.tokens: Tokens = {}
        self.finishes: Finishes = {}
        self.changes = {"most_open": 16, "silence_s": 20.0, **changes}
        self.patience_s = self.changes.pop("patience_s", 20.0)
        self.asking = Asking(VOCABULARY, frozenset({END}), "run/1/0", True, 8)

    def append(self, work: Work, chunk: Chunk) -> None:
        assert work.sample_id not in self.finishes, "tokens behind the end"
        self.tokens.setdefault(work.sample_id, []).extend(chunk.ids)
        if chunk.finish:
            self.finishes[work.sample_id] = chunk.finish

    async def __call__(
        self,
        todo: list[Work],
        meanwhile: Callable[[Run], Awaitable[None]] | None = None,
    ) -> None:
        for fake in self.fakes:
            await fake.start()
        try:
            async with open_session() as session:
                self.servers = Servers(
                    session, [f.url for f in self.fakes], patience_s=self.patience_s
                )
                await self.servers.connect(context_length=100, seeded=True)
                self.servers.version = "run/1/0"
                for server in self.servers.all:
                    self.servers.take_back(server)
                self.dispatcher = Dispatcher(
                    session, self.servers, rid_prefix="x", append=self.append, **self.changes
                )
                running = asyncio.create_task(self.dispatcher.run(todo, self.asking))
                if meanwhile is not None:
                    await meanwhile(self)
                try:
                    await asyncio.wait_for(running, 60)
                finally:
                    await self.servers.close()
        finally:
            for fake in self.fakes:
                await fake.die()

    def check(self, todo: list[Work]) -> None:
        """Every response is the undisturbed one, ended for its reason."""
        for work in todo:
            expected = whole(work.prompt_ids.tolist(), work.seed, BUDGET)
            assert self.tokens[work.sample_id] == expected, work.sample_id
            end = "stop" if expected[-1] == END else "length"
            assert self.finishes[work.sample_id] == end


def once(fault: Callable[..., Awaitable[web.StreamResponse | None]]) -> Any:
    """The fault at each response's first attempt only."""
    seen = set()

    async def wrapped(
        server: FakeServer, request: web.Request, body: dict[str, Any]
    ) -> web.StreamResponse | None:
        sample = body["rid"].split("-")[1]
        if sample in seen:
            return None
        seen.add(sample)
        return await fault(server, request, body)

    return wrapped


def test_undisturbed_and_dealt_evenly() -> None:
    fakes = [FakeServer(), FakeServer()]
    run, todo = Run(fakes, most_open=4), works(40)
    asyncio.run(run(todo))
    run.check(todo)
    assert all(fake.most_open <= 4 for fake in fakes)
    assert min(len(fake.requests) for fake in fakes) >= 12
    assert {len(body["rid"]) for fake in fakes for body in fake.requests} == {28}


def test_a_connection_serves_one_response_after_the_other() -> None:
    """Connecting costs as much as a dozen chunks."""
    connections = set()

    async def note(_: FakeServer, request: web.Request, _body: Any) -> None:
        assert request.transport is not None
        connections.add(request.transport.get_extra_info("peername"))

    run, todo = Run([FakeServer(fault=note)], most_open=1), works(6)
    asyncio.run(run(todo))
    run.check(todo)
    assert len(connections) == 1


def test_a_stream_that_does_not_end_behind_its_last_token_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def stay(server: FakeServer, request: web.Request, body: Any) -> web.StreamResponse:
        stream = await server.open(request)
        for event in server.events(body):
            await server.send(stream, event)
        await asyncio.sleep(50)
        return stream

    monkeypatch.setattr("mtopd.rollout.sglang_dispatch._LAST_BYTES_S", 0.1)
    run, todo = Run([FakeServer(fault=stay)]), works(4)
    asyncio.run(run(todo))
    run.check(todo)
    assert run.dispatcher.counts.attempts == 4


def test_a_stream_may_take_as_long_as_it_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    """aiohttp ends whatever takes 5 minutes, unless it is told otherwise."""
    short = aiohttp.ClientTimeout(total=0.3)
    monkeypatch.setattr("aiohttp.client.DEFAULT_TIMEOUT", short)
    fake = FakeServer()
    fake.delay_s = 0.1
    run, todo = Run([fake]), works(4)
    asyncio.run(run(todo))
    run.check(todo)
    assert not run.dispatcher.counts.failed


def test_samples_of_a_prompt_go_to_one_server() -> None:
    """Its prefix cache knows the prompt, unless it is the fuller one."""
    fakes = [FakeServer(), FakeServer()]
    run, todo = Run(fakes, most_open=1), works(12)
    for work in todo:
        work.prompt_id = f"a/{work.sample_id // 6}"
    asyncio.run(run(todo))
    run.check(todo)


async def _status(code: int, _s: FakeServer, _r: web.Request, _b: Any) -> web.StreamResponse:
    return web.json_response({"error": {"message": "out of sorts"}}, status=code)


async def _cut(server: FakeServer, request: web.Request, body: Any) -> web.StreamResponse:
    """The connection breaks after two chunks."""
    stream = await server.open(request)
    for event in server.events(body)[:2]:
        await server.send(stream, event)
    assert request.transport is not None
    request.transport.abort()
    return stream


async def _unfinished(server: FakeServer, request: web.Request, body: Any) -> web.StreamResponse:
    stream = await server.open(request)
    for event in server.events(body)[:2]:
        await server.send(stream, event)
    return stream


async def _garbled(server: FakeServer, request: web.Request, body: Any) -> web.StreamResponse:
    stream = await server.open(request)
    await server.send(stream, server.events(body)[0])
    await stream.write(b'data: {"output_ids": [1, 2\n\n')
    return stream


async def _error_event(server: FakeServer, request: web.Request, body: Any) -> web.StreamResponse:
    stream = await server.open(request)
    await server.send(stream, server.events(body)[0])
    await server.send(stream, {"error": {"code": 503, "message": "worker gone"}})
    return stream


async def _twice(server: FakeServer, request: web.Request, body: Any) -> web.StreamResponse:
    stream = await server.open(request)
    for event in server.events(body):
        await server.send(stream, event)
        await server.send(stream, event)
    return stream


async def _merged(server: FakeServer, request: web.Request, body: Any) -> web.StreamResponse:
    """Two chunks arrive as one: nothing is wrong with that."""
    stream, events = await server.open(request), server.events(body)
    for one, two in zip(events[::2], [*events[1::2], None], strict=False):
        ids = one["output_ids"] + (two["output_ids"] if two else [])
        meta = (two or one)["meta_info"]
        await server.send(
            stream, server.event(ids, meta["completion_tokens"], meta["finish_reason"])
        )
    return stream


async def _null(server: FakeServer, request: web.Request, body: Any) -> web.StreamResponse:
    stream, event = await server.open(request), server.events(body)[0]
    event["meta_info"]["output_token_logprobs"][0][0] = None
    await server.send(stream, event)
    return stream


async def _short(server: FakeServer, request: web.Request, body: Any) -> web.StreamResponse:
    """What a full KV pool does: cut, and called "length"."""
    stream = await server.open(request)
    ids = server.events(body)[0]["output_ids"]
    await server.send(stream, server.event(ids, 1, {"type": "length"}))
    return stream


@pytest.mark.parametrize(
    ("fault", "counted"),
    [
        (lambda *a: _status(500, *a), "status"),
        (lambda *a: _status(503, *a), "status"),
        (_cut, "connection"),
        (_unfinished, "unfinished"),
        (_garbled, "malformed"),
        (_error_event, "error_event"),
        (_twice, "malformed"),
        (_null, "malformed"),
        (_short, "cut_short"),
        (_merged, None),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)).strip("_"),
)
def test_a_fault_is_met_once_and_the_response_goes_on(fault: Any, counted: str | None) -> None:
    run, todo = Run([FakeServer(fault=once(fault)), FakeServer()]), works(6)
    asyncio.run(run(todo))
    run.check(todo)
    assert set(run.dispatcher.counts.failed) == ({counted} if counted else set())


def test_a_refusal_is_not_tried_again() -> None:
    fake = FakeServer(fault=lambda *a: _status(400, *a))
    with pytest.raises(MtopdError, match=r"refuses prompt a/0 \(3 tokens.*out of sorts"):
        asyncio.run(Run([fake])(works(1)))
    assert len(fake.requests) == 1


def test_attempts_have_one_bound() -> None:
    fake = FakeServer(fault=lambda *a: _status(500, *a))
    with pytest.raises(MtopdError, match="prompt a/0: 4 attempts in a row brought no token"):
        asyncio.run(Run([fake])(works(1)))
    assert len(fake.requests) == 4


def test_a_silent_stream_is_given_up() -> None:
    async def silent(server: FakeServer, request: web.Request, body: Any) -> web.StreamResponse:
        stream = await server.open(request)
        await server.send(stream, server.events(body)[0])
        await asyncio.sleep(30)
        return stream

    run, todo = Run([FakeServer(fault=once(silent))], silence_s=0.3), works(2)
    asyncio.run(run(todo))
    run.check(todo)
    assert run.dispatcher.counts.failed["silence"] == 2


def test_a_server_dies_in_the_middle() -> None:
    """Its responses go on elsewhere, from their prefix: no token is drawn a second time."""
    fakes = [FakeServer(), FakeServer()]
    for fake in fakes:
        fake.delay_s = 0.03

    async def kill(run: Run) -> None:
        while sum(map(len, run.tokens.values())) < 100:
            await asyncio.sleep(0.01)
        await fakes[1].die()

    run, todo = Run(fakes), works(16)
    asyncio.run(run(todo, kill))
    run.check(todo)
    counts = run.dispatcher.counts
    assert counts.continued >= 1 and counts.moved >= 1
    continued = [b for b in fakes[0].requests if len(b["input_ids"]) > 3]
    assert sum(len(b["input_ids"]) for b in continued) == counts.refilled_tokens


def test_who_learns_late_that_a_server_died_does_not_wait_for_its_return() -> None:
    """A busy client sees a stream break when the server was looked at long ago."""
    fakes = [FakeServer(), FakeServer()]
    died: list[bool] = []

    async def kill(run: Run) -> None:
        await fakes[1].die()
        for _ in range(2):
            failed = run.servers.failed(run.servers.all[1], "a stream broke")
            died.append(await asyncio.wait_for(failed, 20))

    asyncio.run(Run(fakes)(works(1), kill))
    assert died == [True, True]


def test_a_restarted_server_gets_no_request_before_weights() -> None:
    """It answers with the version that its start gave it."""
    fakes = [FakeServer(), FakeServer()]
    for fake in fakes:
        fake.delay_s = 0.03

    async def restart(run: Run) -> None:
        while sum(map(len, run.tokens.values())) < 50:
            await asyncio.sleep(0.01)
        await fakes[1].die()
        fakes[1].version = "default"
        fakes[1].requests.clear()
        await fakes[1].start()

    run, todo = Run(fakes), works(16)
    asyncio.run(run(todo, restart))
    run.check(todo)
    assert fakes[1].requests == []
    why = run.servers.all[1].why_out
    assert why is not None and "default" in why


def test_all_servers_out_ends_after_the_patience_with_their_words() -> None:
    fake = FakeServer()
    fake.delay_s = 0.03

    async def kill(run: Run) -> None:
        while not run.tokens:
            await asyncio.sleep(0.01)
        await fake.die()

    with pytest.raises(MtopdError, match=r"all SGLang servers are out for 1 s.*/model_info"):
        asyncio.run(Run([fake], patience_s=1.0)(works(4), kill))


def test_a_prompt_that_ends_servers_is_named() -> None:
    """Others in flight at the same deaths are not blamed: a suspect is tried alone."""
    fakes = [FakeServer() for _ in range(3)]

    async def deadly(server: FakeServer, request: web.Request, body: Any) -> None:
        if body["input_ids"][0] == 7:
            await asyncio.sleep(0.05)
            asyncio.get_running_loop().create_task(server.die())
            await asyncio.sleep(5)

    for fake in fakes:
        fake.fault = deadly  # type: ignore[assignment]
        fake.delay_s = 0.01
    run, todo = Run(fakes, patience_s=5.0), works(8)
    with pytest.raises(MtopdError, match="prompt a/6: 3 SGLang servers died"):
        asyncio.run(run(todo))
    run.check([work for work in todo if work.sample_id != 6])


def test_paused_it_ends_and_goes_on_later() -> None:
    fakes = [FakeServer(), FakeServer()]
    for fake in fakes:
        fake.delay_s = 0.03
    run, todo = Run(fakes), works(12)

    async def abort(server: FakeServer, request: web.Request, body: Any) -> web.StreamResponse:
        """As a server does that is paused: each stream ends with what it has."""
        stream = await server.open(request)
        for event in server.events(body):
            if not run.dispatcher._goes:
                total = event["meta_info"]["completion_tokens"] - len(event["output_ids"])
                await server.send(stream, server.event([], total, {"type": "abort"}))
                return stream
            await server.send(stream, event)
        return stream

    for fake in fakes:
        fake.fault = abort  # type: ignore[assignment]

    async def pause(run: Run) -> None:
        while sum(map(len, run.tokens.values())) < 60:
            await asyncio.sleep(0.01)
        run.dispatcher.stop()
        await run.dispatcher.drained()

    asyncio.run(run(todo, pause))
    assert len(run.finishes) < len(todo)
    assert not run.dispatcher.counts.failed
    for fake in fakes:
        fake.fault = None
    rest = [work for work in todo if work.sample_id not in run.finishes]
    asyncio.run(run(rest))
    run.check(todo)


def test_a_pause_leaves_what_a_paused_server_keeps_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that arrives behind the pause waits there, and would end no pause."""
    monkeypatch.setattr(sglang_dispatch, "_DRAIN_S", 0.2)
    arrived = asyncio.Event()

    async def paused(server: FakeServer, request: web.Request, body: Any) -> web.StreamResponse:
        arrived.set()
        await asyncio.sleep(60)
        raise AssertionError

    async def pause(run: Run) -> None:
        await arrived.wait()
        run.dispatcher.stop()
        async with asyncio.timeout(10):
            await run.dispatcher.drained()

    fake = FakeServer(fault=paused)
    run, todo = Run([fake]), works(3)
    asyncio.run(run(todo, pause))
    assert not run.tokens and not run.dispatcher.counts.failed, "it is no failure of the server"
    assert run.servers.up == run.servers.all
    fake.fault = None
    asyncio.run(run(todo))
    run.check(todo)


def test_a_log_that_is_whole_asks_nothing() -> None:
    """A start may find all tokens of a response and not its end."""
    todo = works(2)
    for work in todo:
        work.ids.extend(whole(list(work.prompt_ids), work.seed, BUDGET))
    fake, run = FakeServer(), Run([FakeServer()])
    asyncio.run(run(todo))
    assert not fake.requests and run.tokens == {0: [], 1: []}
    assert set(run.finishes) == {0, 1}


def test_before_its_least_length_nothing_ends_a_response() -> None:
    todo, fake = works(3, min_response=58), FakeServer()
    run = Run([fake])
    asyncio.run(run(todo))
    for work in todo:
        found = run.tokens[work.sample_id]
        assert len(found) >= 58
    assert json.dumps(fake.requests[0]["sampling_params"]).count("ignore_eos") == 1


def test_a_stop_string_cuts_the_response() -> None:
    """Only the client knows stop strings; what streams behind one is dropped."""
    fake, todo = FakeServer(), works(4)
    ends_after = 13

    run = Run([fake], is_over=lambda ids: len(ids) == ends_after)
    asyncio.run(run(todo))
    for work in todo:
        assert run.tokens[work.sample_id] == whole(list(work.prompt_ids), work.seed, ends_after)
        assert run.finishes[work.sample_id] == "stop"


def test_a_log_that_cannot_be_written_stops_all() -> None:
    fake = FakeServer()
    fake.delay_s = 0.01
    run = Run([fake])

    def full(work: Work, chunk: Chunk) -> None:
        raise MtopdError("the disk is full")

    run.append = full  # type: ignore[method-assign]
    with pytest.raises(MtopdError, match="the disk is full"):
        asyncio.run(run(works(8)))
