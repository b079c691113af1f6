"""A server that speaks SGLang's wire format and lets tests place its faults: only for what a real one
does not do on demand (deaths, silence, tokens out of order).

A token follows from (seed, position), as SGLang draws under --enable-deterministic-inference.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

VOCABULARY = 50
END = 49
Fault = Callable[["FakeServer", web.Request, dict[str, Any]], Awaitable[web.StreamResponse | None]]


def token(seed: int, position: int) -> int:
    """Never END before position 40."""
    number = int(hashlib.sha256(f"{seed}/{position}".encode()).hexdigest()[:8], 16)
    return number % (VOCABULARY if position >= 40 else END)


def whole(prompt: list[int], seed: int, budget: int) -> list[int]:
    """The undisturbed response."""
    ids: list[int] = []
    while len(ids) < budget and END not in ids:
        ids.append(token(seed, len(prompt) + len(ids)))
    return ids


class FakeServer:
    """``fault`` sees every /generate first and may answer it itself."""

    def __init__(self, version: str = "run/1/0", fault: Fault | None = None) -> None:
        self.version = version
        self.fault = fault
        self.delay_s = 0.0  # between chunks
        self.requests: list[dict[str, Any]] = []
        self.most_open = self._open = 0
        self._runner: web.AppRunner | None = None
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post("/generate", self._generate)
        app.router.add_get("/health", self._ok)
        app.router.add_get("/model_info", self._model_info)
        app.router.add_get("/server_info", self._server_info)
        self._runner = web.AppRunner(app, shutdown_timeout=0.05, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        await site.start()
        self._port = self._runner.addresses[0][1]

    async def die(self) -> None:
        """Nothing answers at its address any more; open streams break."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _ok(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _model_info(self, _: web.Request) -> web.Response:
        return web.json_response(
            {"weight_version": self.version, "preferred_sampling_params": None}
        )

    async def _server_info(self, _: web.Request) -> web.Response:
        return web.json_response(
            {
                "version": "0.5.23",
                "enable_deterministic_inference": True,
                "incremental_streaming_output": True,
                "skip_tokenizer_init": True,
                "max_req_input_len": 2042,
                "tp_size": 1,
                "device": "cpu",
            }
        )

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self._open += 1
        self.most_open = max(self.most_open, self._open)
        try:
            if self.fault is not None:
                answer = await self.fault(self, request, body)
                if answer is not None:
                    return answer
            stream = await self.open(request)
            for event in self.events(body):
                await self.send(stream, event)
            return stream
        finally:
            self._open -= 1

    async def open(self, request: web.Request) -> web.StreamResponse:
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(request)
        return stream

    async def send(self, stream: web.StreamResponse, event: dict[str, Any]) -> None:
        await stream.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        if self.delay_s:
            await asyncio.sleep(self.delay_s)

    def events(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The chunks of an undisturbed answer: the first token alone, then ``stream_interval``."""
        params, prompt = body["sampling_params"], body["input_ids"]
        budget, interval = params["max_new_tokens"], params["stream_interval"]
        seed, ends = params["sampling_seed"], set(params.get("stop_token_ids", ()))
        ids: list[int] = []
        while len(ids) < budget and not (ids and ids[-1] in ends):
            ids.append(token(seed, len(prompt) + len(ids)))
        events, done = [], 0
        while done < len(ids):
            count = 1 if done == 0 else interval
            new = ids[done : done + count]
            done += len(new)
            is_last = done == len(ids)
            finish = {"type": "stop" if ids[-1] in ends else "length"} if is_last else None
            events.append(self.event(new, done, finish))
        return events

    def event(self, new: list[int], total: int, finish: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "output_ids": new,
            "meta_info": {
                "output_token_logprobs": [[-0.5 - 0.01 * t, t, None] for t in new],
                "completion_tokens": total,
                "weight_version": self.version,
                "finish_reason": finish,
                "cached_tokens": 3,
            },
        }
