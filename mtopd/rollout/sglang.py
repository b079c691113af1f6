"""The rollout engine on SGLang servers: rank 0 is their client, the other ranks wait.

Servers are started by others, with a folder that holds config.json alone (``sglang_serving``);
weights come to them by broadcast from this process and are proven to have arrived before the first
token is asked for.

Tested with real servers on a CPU (``pytest tests/sglang``), which neither ``make test`` nor CI runs yet.
Servers on GPUs, mixtures of experts and several nodes were never tried.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import threading
import time
from array import array
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from mtopd.metrics_lines import WeightUpdateLine
from mtopd.rollout.ending import Ending
from mtopd.rollout.engine import Follow, Request, Sampling, student_version
from mtopd.rollout.memory_log import MemoryLog, Response
from mtopd.rollout.sglang_broadcast import BroadcastUpdate
from mtopd.rollout.sglang_disk import DiskUpdate, write_bucket
from mtopd.rollout.sglang_dispatch import DispatchCounts, Dispatcher, Work
from mtopd.rollout.sglang_proof import ProbeBound, probe_sequences
from mtopd.rollout.sglang_servers import Server, ServerError, Servers, open_session
from mtopd.rollout.sglang_weights import WeightUpdate
from mtopd.rollout.sglang_wire import Asking, Chunk, check_ids
from mtopd.types import MtopdError

T = TypeVar("T")
# Log-probs of token sequences as the trainer computes them, on rank 0; None elsewhere.  Collective.
Score = Callable[[Sequence[Sequence[int]]], "list[np.ndarray] | None"]
# The block is work that takes ranks unlike times; MtopdError of one on all.  Collective.
Apart = Callable[[], AbstractContextManager[object]]
BASELINE = "baseline/"  # versions of weights that the trainer cannot score tokens with
# Tokens of a chunk.  A ninth of the CPU time of every token alone; without seeds a chunk that a dying
# server takes along would be drawn anew, and a response's end never is: lengths would be biased.
_INTERVAL, _INTERVAL_UNSEEDED = 8, 1
_FLOAT32 = ProbeBound()


@dataclass(frozen=True)
class SGLangOptions:
    """What a config says of servers."""

    urls: Sequence[str]
    context_length: int  # tokens of the longest sample
    seeded: bool = True
    most_open: int = 128  # responses at once on a server
    silence_s: float = 60.0
    patience_s: float = 600.0
    weights_folder: Path | None = None  # weights go by files in it; None: by broadcast
    group_note: Path | None = None  # of a broadcast that servers join (``sglang_broadcast.let_go``)


class SGLangEngine:
    """The protocol of ``engine.Engine``."""

    kind = "sglang"
    answers_elsewhere = True
    _folders = itertools.count()  # of all engines of this process: ranks count alike

    def __init__(
        self,
        options: SGLangOptions,
        *,
        run_name: str,
        vocab_size: int,
        dtype: torch.dtype,
        ending: Ending,
        is_client: bool,
        apart: Apart,
        score: Score,
        bound: ProbeBound = _FLOAT32,
        world_size: int = 1,
    ) -> None:
        self.version: str | None = None
        self.update: WeightUpdateLine | None = None
        self._options = options
        self._vocab_size = vocab_size
        self._dtype = dtype
        self._ending = ending
        self._apart = apart
        self._score = score
        self._bound = bound
        self._world_size = world_size
        # Unique among runs and starts: a server refuses a name of a group that it has had.
        self._name = f"{_digest(run_name)[:8]}{time.time_ns():x}"
        self._numbers = itertools.count()  # of pieces of work
        self._client = _Client(options) if is_client else None
        self.counts = DispatchCounts()

    # -- weights -----------------------------------------------------------------------------------
    def taker(self, bucket: int) -> int:
        """The client, who broadcasts; of files every rank writes its share."""
        return bucket % self._world_size if self._options.weights_folder else 0

    def update_weights(self, buckets: Iterable[Mapping[str, torch.Tensor]], version: str) -> None:
        """Give HF-named tensors to every server that answers, and prove it.  Collective."""
        client, folder = self._client, self._next_folder()
        update: WeightUpdate | None = None
        failed: MtopdError | OSError | None = None
        self.version = self.update = None
        is_student = not version.startswith(BASELINE)
        if client is None and not is_student:
            buckets = ()  # of files: who sends nothing need not read them
        with self._apart():
            if client is not None:
                update = client.begin_update(partial(self._way, folder, version))
        try:
            count = 0
            for bucket in buckets:  # to their end, whatever happens: all ranks take part in each
                if bucket and failed is None:
                    served = self._served(bucket, cast=not is_student)
                    try:
                        if client is not None and update is not None:
                            client.run(update.send(count, served))
                        else:
                            assert folder is not None, "weights for a rank that has no way out"
                            write_bucket(folder, count, served)
                    except (MtopdError, OSError) as error:
                        failed = error
                    del served
                count += 1
                del bucket
            # The same at every update: what a prefix cache kept of them shows a flush left out.
            sequences = probe_sequences(self._vocab_size, 0, self._options.context_length - 1)
            expected = self._score(sequences) if is_student else None
            with self._apart():  # now all files are written
                if failed is not None:
                    raise failed
            with self._apart():
                if client is not None and update is not None:
                    client.run(update.end(count))
                    difference = client.run(update.prove(sequences, expected, self._bound))
                    if is_student:
                        self._bound.keep(difference)
                    client.finish_update(update, version)
                    self.update = update.cost(difference)
        finally:
            if client is not None and update is not None:
                client.run(update.close())
        self.version = version

    def _next_folder(self) -> Path | None:
        root = self._options.weights_folder
        return root / f"{next(self._folders):06d}" if root else None

    def _way(self, folder: Path | None, version: str, servers: Servers) -> WeightUpdate:
        if folder is not None:
            return DiskUpdate(servers, version, folder)
        note = self._options.group_note
        return BroadcastUpdate(servers, f"mtopd-{self._name}", version, note)

    def _served(self, bucket: Mapping[str, torch.Tensor], *, cast: bool) -> dict[str, torch.Tensor]:
        """As servers hold them: without rows of the vocabulary that no token of the tokenizer has,
        which would be sampled; ``cast``: in their dtype, which is not every file's.
        """
        rows = ("embed_tokens.weight", "lm_head.weight")
        return {
            name: (tensor[: self._vocab_size] if name.endswith(rows) else tensor).to(
                self._dtype if cast else tensor.dtype
            )
            for name, tensor in bucket.items()
        }

    # -- responses ---------------------------------------------------------------------------------
    def generate(
        self,
        requests: Sequence[Request],
        log: MemoryLog,
        sampling: Sampling,
        follow: Follow | None = None,
    ) -> Iterator[Response]:
        """All responses come out on rank 0; other ranks get none and return at once.  What follows is
        asked when all before it are answered.
        """
        client = self._client
        while requests and client is not None and not client.is_paused:
            yield from self._answer(client, requests, log, sampling)
            requests = follow(requests) if follow is not None and not client.is_paused else ()

    def _answer(
        self, client: _Client, requests: Sequence[Request], log: MemoryLog, sampling: Sampling
    ) -> Iterator[Response]:
        assert self.version is not None, "weights come first"
        version = self.version
        number = student_version(version)
        works = self._works_of(requests, log, sampling)

        def append(work: Work, chunk: Chunk) -> None:
            log.append(
                work.sample_id,
                chunk.ids,
                chunk.log_probs,
                version=number,
                finish_reason=chunk.finish,
                attempt=min(work.attempts, 255),
            )

        asking = Asking(
            vocab_size=self._vocab_size,
            end_ids=frozenset(self._ending.end_ids),
            version=version,
            seeded=self._options.seeded,
            interval=_INTERVAL if self._options.seeded else _INTERVAL_UNSEEDED,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
        )
        is_over = None
        if self._ending.stop:
            is_over = partial(self._ending.is_over, min_response=sampling.min_response)
        # A server refuses a request's name while it has it, and it may have one that was left behind.
        name = f"{self._name}.{next(self._numbers):08d}"
        running = client.start(works, asking, append, name, is_over)
        if running is None:  # it was paused meanwhile
            return
        running.add_done_callback(lambda _: log.wake())
        try:
            while not running.done():
                log.wait(0.2)
                yield from log.take()
            running.result()
            log.flush()
            yield from log.take()
        finally:
            client.stop(running)
            self.counts = client.counts

    def _works_of(
        self, requests: Sequence[Request], log: MemoryLog, sampling: Sampling
    ) -> list[Work]:
        works = []
        asked: Sequence[int] | np.ndarray = ()  # samples of a prompt share it, and its array
        prompt_ids = np.empty(0, np.int32)
        for request, held in zip(requests, log.begin(requests), strict=True):
            if held.finish_reason is not None:
                continue
            if request.prompt_ids is not asked:
                asked = request.prompt_ids
                prompt_ids = np.asarray(asked, np.int32)
            check_ids(request.prompt_id, prompt_ids, self._vocab_size)
            budget = sampling.budget(request)
            longest = len(prompt_ids) + budget
            if longest > self._options.context_length:
                raise MtopdError(
                    f"prompt {request.prompt_id} has {len(prompt_ids)} tokens, with "
                    f"{budget} of a response more than data.context_length "
                    f"{self._options.context_length}"
                )
            works.append(
                Work(
                    request.sample_id,
                    request.prompt_id,
                    prompt_ids,
                    budget,
                    draw_seed(sampling, request),
                    min_response=max(sampling.min_response - request.position, 0),
                    ids=array("i", held.response_ids.tobytes()),
                )
            )
        return works

    @property
    def servers(self) -> Sequence[Server]:
        """As the client sees them; none on other ranks."""
        client = self._client
        return client.servers.all if client is not None and client.servers is not None else ()

    # -- all else ----------------------------------------------------------------------------------
    def pause(self) -> None:
        if self._client is not None:
            self._client.pause()

    def resume(self) -> None:
        if self._client is not None:
            self._client.resume()

    def release(self) -> None:
        """The servers may be given other weights now, a baseline's: they are asked again after the
        next ``update_weights``.
        """
        self.version = None

    def close(self) -> None:
        if self._client is not None:
            self._client.close()


def draw_seed(sampling: Sampling, request: Request) -> int:
    """63 bits: what all draws of a response follow from, with their positions."""
    text = f"{sampling.seed}/{request.iteration}/{request.prompt_id}/{request.sample}"
    return int(_digest(text)[:16], 16) >> 1


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class _Client:
    """The event loop of all that goes to servers, in a thread of its own: streams are read while
    the main thread works.
    """

    def __init__(self, options: SGLangOptions) -> None:
        self._options = options
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sglang", daemon=True)
        self._thread.start()
        self._session: Any = None
        self.servers: Servers | None = None  # from the first connection on
        # A pause may come from another thread than the one that starts: it meets what was started, or
        # nothing is started behind it.
        self._starting = threading.Lock()
        self._dispatcher: Dispatcher | None = None
        self.is_paused = False
        self.counts = DispatchCounts()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # -- weights -----------------------------------------------------------------------------------
    def begin_update(self, way: Callable[[Servers], WeightUpdate]) -> WeightUpdate:
        async def begin() -> WeightUpdate:
            update = way(await self._connected())
            try:
                await update.begin()
            except (MtopdError, OSError):
                await update.close()
                raise
            return update

        self.pause(servers_too=False)
        return self.run(begin())

    def finish_update(self, update: WeightUpdate, version: str) -> None:
        async def finish() -> None:
            servers = self.servers
            assert servers is not None
            servers.version = version
            for server in update.members:
                servers.take_back(server)

        self.run(finish())
        self.is_paused = False

    async def _connected(self) -> Servers:
        """The servers, checked at the first call."""
        if self.servers is None:
            self._session = open_session()
            servers = Servers(
                self._session, self._options.urls, patience_s=self._options.patience_s
            )
            try:
                await servers.connect(
                    context_length=self._options.context_length, seeded=self._options.seeded
                )
            except MtopdError:
                await self._session.close()
                raise
            self.servers = servers
        return self.servers

    # -- responses ---------------------------------------------------------------------------------
    def start(
        self,
        works: Sequence[Work],
        asking: Asking,
        append: Callable[[Work, Chunk], None],
        rid_prefix: str,
        is_over: Callable[[Sequence[int]], bool] | None,
    ) -> Any:
        """Answer works in the background; the future is done when all are, or none is to be.  None while
        paused.
        """
        assert self.servers is not None
        options = self._options
        dispatcher = Dispatcher(
            self._session,
            self.servers,
            rid_prefix=rid_prefix,
            most_open=options.most_open,
            silence_s=options.silence_s,
            append=append,
            is_over=is_over,
        )
        with self._starting:
            if self.is_paused:
                return None
            assert self._dispatcher is None, "two pieces of work at once"
            self._dispatcher = dispatcher
        self.counts = dispatcher.counts
        return asyncio.run_coroutine_threadsafe(dispatcher.run(works, asking), self._loop)

    def stop(self, running: Any) -> None:
        """What still streams is dropped: the servers abort it."""
        running.cancel()
        self._dispatcher = None

    def pause(self, *, servers_too: bool = True) -> None:
        with self._starting:
            self.is_paused = True
            dispatcher = self._dispatcher

        async def pause() -> None:
            if dispatcher is not None:
                dispatcher.stop()
            if servers_too and self.servers is not None:
                for server, answer in (
                    await self.servers.everywhere("/pause_generation", {"mode": "abort"})
                ).items():
                    if isinstance(answer, ServerError):
                        self.servers.take_out(server, str(answer))
            if dispatcher is not None and servers_too:
                await dispatcher.drained()

        self.run(pause())
        self.is_paused = servers_too

    def resume(self) -> None:
        async def resume() -> None:
            if self.servers is not None:
                for server, answer in (
                    await self.servers.everywhere("/continue_generation")
                ).items():
                    if isinstance(answer, ServerError):
                        self.servers.take_out(server, str(answer))

        self.run(resume())
        self.is_paused = False

    def close(self) -> None:
        async def close() -> None:
            if self.servers is not None:
                await self.servers.close()
                await self._session.close()

        self.run(close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
