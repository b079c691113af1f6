"""What an engine writes tokens to, kept in memory: for evaluations, whose responses are scored and
forgotten.  ``token_log.TokenLog`` is the one that lasts.

A log is what joins a response's tokens, whoever sampled them and in however many pieces, and what
hands it on.  Tokens travel as arrays: there is no Python object for one of them.  In a response of
several turns each turn is a response to the log (``turn_id``), and what an environment replied to
it is kept under the same id.
"""

from __future__ import annotations

import threading
from array import array
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
LogProbs = npt.NDArray[np.float32]
Spans = tuple[tuple[int, int], ...]  # (first token, version of the student) of each run of tokens
FINISH_REASONS = ("stop", "length")
_TURN_SHIFT = 32


def turn_id(sample_id: int, turn: int) -> int:
    """What names a turn of a response in a log; the first has the response's own id."""
    return turn << _TURN_SHIFT | sample_id


def sample_of(turn_id: int) -> int:
    """The response that a turn belongs to."""
    return turn_id & ((1 << _TURN_SHIFT) - 1)


def turn_of(turn_id: int) -> int:
    """The turn's place in its response, from 0."""
    return turn_id >> _TURN_SHIFT


@dataclass(frozen=True, slots=True, eq=False)
class Response:
    """What was sampled, T tokens."""

    sample_id: int
    response_ids: Ids  # [T], with the end token, or the stop string's, that ended it
    log_probs: LogProbs  # [T], of the model's own distribution, whatever the sampling
    version_spans: Spans
    # "stop" (an end token or a stop string) | "length"; of a conversation also "environment_error"
    finish_reason: str
    # [T] 0: not the student's, and its log-prob is 0; None: the student sampled all of them
    loss_mask: npt.NDArray[np.uint8] | None = None

    @property
    def last_turn(self) -> Ids:
        """What the student said last; of one turn all of it."""
        if self.loss_mask is None or self.loss_mask.all():
            return self.response_ids
        return self.response_ids[np.flatnonzero(self.loss_mask == 0)[-1] + 1 :]


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """What a log has of a response, T tokens so far."""

    response_ids: Ids  # [T]
    log_probs: LogProbs  # [T]
    finish_reason: str | None  # None: it is not over


class Named(Protocol):
    """What a log needs of a request."""

    @property
    def sample_id(self) -> int: ...


class Record(NamedTuple):
    """Tokens of one response that were sampled one behind the other."""

    sample_id: int
    start: int  # place of the first in its response
    version: int
    ids: bytes  # int32, little-endian
    log_probs: bytes  # float32, little-endian
    finish_reason: str | None
    attempt: int
    reply: bytes = b""  # or: what an environment replied, and no token


class OpenResponse:
    """A response on its way."""

    __slots__ = ("finish_reason", "ids", "length", "log_probs", "spans")

    def __init__(self) -> None:
        self.ids = bytearray()  # int32, little-endian, as in a log file
        self.log_probs = bytearray()  # float32, likewise
        self.length = 0  # tokens
        self.spans: list[tuple[int, int]] = []
        self.finish_reason: str | None = None

    def extend(self, ids: bytes, log_probs: bytes, count: int, version: int) -> None:
        if count and (not self.spans or self.spans[-1][1] != version):
            self.spans.append((self.length, version))
        self.ids += ids
        self.log_probs += log_probs
        self.length += count

    def held(self) -> Held:
        return Held(
            np.frombuffer(bytes(self.ids), "<i4"),
            np.frombuffer(bytes(self.log_probs), "<f4"),
            self.finish_reason,
        )


def _packed(values: npt.ArrayLike, dtype: str, typecode: str) -> bytes:
    """As in a log file."""
    if type(values) is array:  # of a stream's chunk; numpy takes three times as long for 8 tokens
        assert values.typecode == typecode, values.typecode
        return values.tobytes()
    return np.asarray(values, dtype).tobytes()


class MemoryLog:
    """The responses of one piece of work, on this rank.  ``name`` is the same on every rank, and no
    other piece of work of this start has it: ranks deal the requests by it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.num_calls = 0  # of ``generate`` with this log
        self.num_continued_tokens = 0  # that former starts had sampled of what this rank took over
        self._open: dict[int, OpenResponse] = {}
        self._over: dict[int, Held] = {}  # handed on, kept until they are forgotten
        self._replies: dict[int, bytes] = {}  # likewise
        self._ready: deque[Response] = deque()
        self._is_woken = False
        self._changed = threading.Condition()

    # -- the engine's side -------------------------------------------------------------------------
    def begin(self, requests: Iterable[Named]) -> list[Held]:
        """What is held of each.  Those that a former start ended are handed on without another
        word.
        """
        with self._changed:
            return [self._begin(request.sample_id) for request in requests]

    def _begin(self, sample_id: int) -> Held:
        if sample_id in self._over:
            return self._over[sample_id]
        response = self._open.get(sample_id)
        if response is None:
            response = self._open[sample_id] = self._recovered(sample_id)
            self.num_continued_tokens += response.length
            if response.finish_reason is not None:
                return self._hand_on(sample_id)
        return response.held()

    def append(
        self,
        sample_id: int,
        response_ids: npt.ArrayLike,
        log_probs: npt.ArrayLike,
        *,
        version: int,
        finish_reason: str | None = None,
        attempt: int = 0,
    ) -> None:
        """Take the next tokens of a response that was begun; with ``finish_reason`` its last ones,
        which may be none.  ``version``: student that sampled them.

        It takes no lock: one thread appends to a response, and one that reads streams must not wait
        for who commits or takes.
        """
        ids, probs = _packed(response_ids, "<i4", "i"), _packed(log_probs, "<f4", "f")
        count = len(ids) // 4
        assert len(ids) == len(probs), (len(ids), len(probs))
        assert finish_reason is None or finish_reason in FINISH_REASONS, finish_reason
        response = self._open[sample_id]
        assert response.finish_reason is None, f"sample {sample_id} is over"
        start = response.length
        response.extend(ids, probs, count, version)
        response.finish_reason = finish_reason
        self._note(Record(sample_id, start, version, ids, probs, finish_reason, attempt))

    def append_reply(self, sample_id: int, reply: bytes) -> None:
        """Take what an environment replied to a response that is over.  Any thread may call it."""
        with self._changed:
            assert sample_id not in self._replies, f"two replies to {sample_id}"
            self._replies[sample_id] = reply
        self._note(Record(sample_id, 0, 0, b"", b"", None, 0, reply))

    def reply(self, sample_id: int) -> bytes | None:
        """What an environment replied, in this start or a former one; None: it was not asked, or
        what it said was lost.
        """
        with self._changed:
            if sample_id not in self._replies:
                reply = self._recovered_reply(sample_id)
                if reply is None:
                    return None
                self._replies[sample_id] = reply
            return self._replies[sample_id]

    def take(self) -> list[Response]:
        """Responses that are over and safe, since the last call.  Never waits."""
        with self._changed:
            found, self._ready = self._ready, deque()
        return list(found)

    def wait(self, timeout_s: float) -> None:
        """Until there is something to take, somebody calls ``wake``, or the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._ready) or self._is_woken, timeout_s)
            self._is_woken = False

    def wake(self) -> None:
        """Who waits looks again."""
        with self._changed:
            self._is_woken = True
            self._changed.notify_all()

    def flush(self) -> None:
        """Make safe what was appended.  Only for when none of this rank's responses runs: were it
        done because one has ended, short responses would outlive more kills than long ones.
        """

    def forget(self, sample_ids: Iterable[int]) -> None:
        """Drop responses that were handed on and are kept elsewhere; they are not asked for again."""
        with self._changed:
            for sample_id in sample_ids:
                del self._over[sample_id]
                self._replies.pop(sample_id, None)

    def close(self) -> None:
        """The end: what was appended is safe."""

    # -- what a log that lasts does differently ------------------------------------------------------
    def _recovered(self, sample_id: int) -> OpenResponse:
        """What was sampled of a response before this log began."""
        return OpenResponse()

    def _recovered_reply(self, sample_id: int) -> bytes | None:
        """What was replied to a response before this log began."""
        return None

    def _note(self, record: Record) -> None:
        """Tokens or a reply were appended."""
        if record.finish_reason is not None:
            with self._changed:
                self._hand_on(record.sample_id)

    def _hand_on(self, sample_id: int) -> Held:
        """The response is over and safe; the lock is held."""
        response = self._open.pop(sample_id)
        held = self._over[sample_id] = response.held()
        assert response.finish_reason is not None
        self._ready.append(
            Response(
                sample_id,
                held.response_ids,
                held.log_probs,
                tuple(response.spans),
                response.finish_reason,
            )
        )
        self._changed.notify_all()
        return held
