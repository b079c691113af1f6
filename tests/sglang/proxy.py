"""A proxy in front of a real server, and one that damages the first answer to each response, as
networks and full servers do.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import aiohttp
from aiohttp import web

Event = dict[str, Any]
FAULTS = (
    "status 500",
    "hang",
    "cut stream",
    "malformed JSON",
    "error event",
    "duplicate chunk",
    "merged chunks",
    "null log-prob",
    "short length",
    "lost chunk",
    "other version",
    "foreign token",
)


class Proxy:
    """Hands on all that is asked and answered, byte by byte, in a thread of its own."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(30)

    def _run(self) -> None:
        self._loop.run_until_complete(self._start())
        self._ready.set()
        self._loop.run_forever()

    async def _start(self) -> None:
        self._session = aiohttp.ClientSession()
        app = web.Application(client_max_size=1 << 26)
        app.router.add_route("*", "/{path:.*}", self._forward)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    def close(self) -> None:
        async def end() -> None:
            await self._runner.cleanup()
            await self._session.close()

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        return await self._hand_on(request, body, json.loads(body or b"{}"))

    async def _hand_on(
        self, request: web.Request, body: bytes, asked: dict[str, Any]
    ) -> web.StreamResponse:
        stream = web.StreamResponse()
        try:
            async with self._asked_there(request, body) as answer:
                stream.set_status(answer.status)
                await stream.prepare(request)
                async for data in answer.content.iter_any():
                    self._passes(request.path, asked, data)
                    await stream.write(data)
        except aiohttp.ClientError:  # the server is gone: so is this connection
            if request.transport is not None:
                request.transport.abort()
        return stream

    def _asked_there(self, request: web.Request, body: bytes) -> Any:
        """The server's answer, as a context."""
        headers = {"Content-Type": "application/json"}
        url = self._target + request.path
        return self._session.request(request.method, url, data=body, headers=headers)

    def _passes(self, path: str, asked: dict[str, Any], data: bytes) -> None:
        """A piece of an answer arrives here and is not handed on yet."""


class FaultProxy(Proxy):
    """``fault_of`` names the fault of a sample's first attempt."""

    def __init__(self, target: str, fault_of: Callable[[int], str | None]) -> None:
        self._fault_of = fault_of
        self._seen: set[int] = set()
        self.done: list[str] = []
        super().__init__(target)

    async def _hand_on(
        self, request: web.Request, body: bytes, asked: dict[str, Any]
    ) -> web.StreamResponse:
        fault = None
        if request.path == "/generate" and asked.get("stream"):
            sample = int(asked["rid"].split("-")[1])
            if sample not in self._seen:
                self._seen.add(sample)
                fault = self._fault_of(sample)
        if fault is None:
            return await super()._hand_on(request, body, asked)
        self.done.append(fault)
        if fault.startswith("status "):
            return web.json_response({"error": {"message": "a fault"}}, status=int(fault[7:]))
        async with self._asked_there(request, body) as answer:
            events = [
                json.loads(line[6:]) async for line in answer.content if line.startswith(b"data: {")
            ]
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(request)
        await self._damage(fault, events, stream, request)
        return stream

    async def _damage(
        self, fault: str, events: list[Event], stream: web.StreamResponse, request: web.Request
    ) -> None:
        async def send(event: Event) -> None:
            await stream.write(b"data: " + json.dumps(event).encode() + b"\n\n")

        assert len(events) > 3, "a response of more chunks is needed"
        if fault == "merged chunks":
            first, second = events[:2]
            merged = json.loads(json.dumps(second))
            merged["output_ids"] = first["output_ids"] + second["output_ids"]
            merged["meta_info"]["output_token_logprobs"] = (
                first["meta_info"]["output_token_logprobs"]
                + second["meta_info"]["output_token_logprobs"]
            )
            for event in [merged, *events[2:]]:
                await send(event)
            return
        await send(events[0])
        second = events[1]
        meta = second["meta_info"]
        if fault == "hang":
            await asyncio.sleep(60)
        elif fault == "cut stream":
            assert request.transport is not None
            request.transport.abort()
        elif fault == "malformed JSON":
            await stream.write(b"data: " + json.dumps(second).encode()[:-7] + b"\n\n")
        elif fault == "error event":
            await send({"error": {"code": 503, "message": "a fault", "retryable": True}})
        elif fault == "duplicate chunk":
            for event in [second, *events[1:]]:
                await send(event)
        elif fault == "lost chunk":
            for event in events[2:]:
                await send(event)
        else:
            if fault == "null log-prob":
                meta["output_token_logprobs"][0][0] = None
            elif fault == "short length":
                meta["finish_reason"] = {"type": "length", "length": 9}
            elif fault == "other version":
                meta["weight_version"] = "default"
            elif fault == "foreign token":
                second["output_ids"][0] = meta["output_token_logprobs"][0][1] = 100_000
            for event in [second, *events[2:]]:
                await send(event)
