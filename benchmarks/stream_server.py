"""A server that streams responses it has ready, as fast as they are taken: for benchmarks of clients.

It is a process of its own and answers what SGLang 0.5.23 answers, event for event (the fields of
``meta_info`` too), but computes nothing: every response is the same bytes.  Each write is one event, as
SGLang writes one for each request and step.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

VERSION = "benchmark/1/0"
VOCABULARY = 150_000
INTERVAL = 8  # tokens of an event
_CONTEXT = 1 << 16
_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
_FACTS: dict[str, dict[str, Any]] = {
    "/server_info": {
        "version": "0.5.23",
        "enable_deterministic_inference": True,
        "incremental_streaming_output": True,
        "skip_tokenizer_init": True,
        "max_req_input_len": _CONTEXT,
        "tp_size": 1,
        "device": "cpu",
    },
    "/model_info": {"weight_version": VERSION, "preferred_sampling_params": None},
}


def events(tokens: int, interval: int) -> list[bytes]:
    """A response as a server writes it: the first token alone, then ``interval`` at once."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCABULARY, tokens).tolist()
    log_probs = (-rng.exponential(1.0, tokens).astype(np.float32)).tolist()
    texts, done = [], 0
    while done < tokens:
        stop = min(done + (interval if done else 1), tokens)
        triples = zip(log_probs[done:stop], ids[done:stop], strict=True)
        meta = {
            "id": "mtopd-0123456789abcdef0123-00000000000000000000-00001",
            "finish_reason": {"type": "length", "length": tokens} if stop == tokens else None,
            "prompt_tokens": 20,
            "weight_version": VERSION,
            "total_retractions": 0,
            "output_token_logprobs": [[value, token, None] for value, token in triples],
            "output_token_logprobs_length": stop,
            "completion_tokens": stop,
            "cached_tokens": 0,
            "cached_tokens_details": None,
            "dp_rank": None,
        }
        text = json.dumps({"output_ids": ids[done:stop], "meta_info": meta}, separators=(",", ":"))
        texts.append(_chunk(b"data: " + text.encode() + b"\n\n"))
        done = stop
    return [*texts, _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"]


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class _Connection(asyncio.Protocol):
    """One request after the other: a client sends the next when it has read all of the last."""

    def __init__(self, server: _Server) -> None:
        self._server = server
        self._data = b""
        self.is_full = False  # what was written has not been taken yet
        self.next = 0  # of the events

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        # One event more than the kernel holds: a slow client is seen at once.
        transport.set_write_buffer_limits(high=1)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.streams.discard(self)

    def pause_writing(self) -> None:
        self.is_full = True

    def resume_writing(self) -> None:
        self.is_full = False

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, found, body = self._data.partition(b"\r\n\r\n")
        if not found:
            return
        method, path, _ = head.split(b" ", 2)
        length = 0
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                length = int(line[15:])
        if len(body) < length:
            return
        self._data = b""
        if method == b"POST" and path == b"/generate":
            self.transport.write(_HEAD)
            self.next = 0
            self._server.add(self)
            return
        text = json.dumps(_FACTS.get(path.decode(), {})).encode()
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        self.transport.write(head % len(text) + text)


class _Server:
    def __init__(self, tokens: int, step_s: float) -> None:
        self.streams: set[_Connection] = set()
        self._events = events(tokens, INTERVAL)
        self._step_s = step_s
        self._asked = asyncio.Event()

    def add(self, stream: _Connection) -> None:
        self.streams.add(stream)
        self._asked.set()

    async def run(self) -> None:
        """Steps: each writes the next event of every stream."""
        loop = asyncio.get_running_loop()
        next_s = loop.time()
        while True:
            if not self.streams:
                self._asked.clear()
                await self._asked.wait()
                next_s = loop.time()
            for stream in [s for s in self.streams if not s.is_full]:
                stream.transport.write(self._events[stream.next])
                stream.next += 1
                if stream.next == len(self._events):
                    self.streams.discard(stream)
            next_s = max(next_s + self._step_s, loop.time())
            await asyncio.sleep(next_s - loop.time())


@contextmanager
def running(tokens: int, step_s: float) -> Iterator[str]:
    """The URL of a server whose responses have ``tokens``, until the block ends.  ``step_s``: seconds
    between two events of a stream; 0: as fast as they are taken.
    """
    command = [sys.executable, __file__, str(tokens), str(step_s)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()


async def _serve(tokens: int, step_s: float) -> None:
    server = _Server(tokens, step_s)
    loop = asyncio.get_running_loop()
    listening = await loop.create_server(lambda: _Connection(server), "127.0.0.1", 0)
    print(listening.sockets[0].getsockname()[1], flush=True)
    await server.run()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), float(sys.argv[2])))
