"""Responses of several turns: the student's, and between them what an environment replies.

The loop stands above the engine, which is asked for one turn at a time and continues ids.  It runs
on the rank that a turn comes out on: its log has the turn, the reply goes behind it, and no other
rank has to hear of either.

Promises:

- What was sampled is never encoded again: the next turn stands behind the very ids of those before,
  and of a reply only what the chat template writes behind them is encoded.
- A reply is in the log as soon as it is there, with its ids: a later start does not ask again.  Only
  one that a kill took before its commit, a tenth of a second, is asked for once more.
- A reply's tokens count in ``max_response``, are not trained (loss mask 0, log-prob 0), and stand only
  where another turn follows: nothing comes behind the student's last token.
- Where an environment fails, is late or replies what cannot be a message, the response ends as
  "environment_error" with its last turn, and is trained up to there.
"""

from __future__ import annotations

import copy
import json
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mtopd.config_data import SourceConfig
from mtopd.data.environments import Step, Turn, check_reply, load_environment
from mtopd.rollout.asked import Requests
from mtopd.rollout.calls import Call, Calls
from mtopd.rollout.ending import Ending
from mtopd.rollout.engine import Engine, Request, Sampling
from mtopd.rollout.memory_log import Ids, MemoryLog, Response, sample_of, turn_id, turn_of
from mtopd.tokenizer import encode_reply
from mtopd.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MESSAGE = 300  # characters kept of what an environment raised


@dataclass(frozen=True, slots=True)
class Environment:
    """What replies to the responses of one source's prompts."""

    step: Step
    max_turns: int  # of the student
    timeout_s: float  # of one call
    threads: int  # calls at once


def environments(sources: Iterable[SourceConfig]) -> dict[str, Environment]:
    """Those that sources have, by source.  Raises MtopdError for what is not installed here."""
    return {
        source.name: Environment(
            load_environment(found.python),
            found.max_turns,
            found.timeout_s,
            found.threads,
        )
        for source in sources
        if (found := source.environment) is not None
    }


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of asking an environment; a record of the token log."""

    messages: list[dict[str, Any]] = field(default_factory=list)  # none: the conversation is over
    ids: list[int] = field(default_factory=list)  # between the turn's last token and the next turn
    error: str | None = None

    def encode(self) -> bytes:
        values = {"messages": self.messages, "ids": self.ids, "error": self.error}
        return json.dumps(values, allow_nan=False).encode()

    @staticmethod
    def decode(data: bytes) -> Reply:
        return Reply(**json.loads(data))


@dataclass(slots=True)
class _Conversation:
    """One response on its way."""

    prompt: Prompt
    messages: list[dict[str, Any]]  # up to the last turn that was asked about
    turns: list[Response] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)  # each with a turn behind it
    next: dict[int, Request] = field(default_factory=dict)  # behind each turn
    call: Call[Any] | None = None
    is_over: bool = False

    def whole(self, finish_reason: str) -> Response:
        """All turns and the replies between them as one response."""
        ids: list[Ids] = []
        probs, mask, spans = [], [], list[tuple[int, int]]()
        length = 0
        for turn, reply in zip(self.turns, [*self.replies, Reply()], strict=True):
            for start, version in turn.version_spans:
                if not spans or spans[-1][1] != version:
                    spans.append((length + start, version))
            count, replied = len(turn.response_ids), len(reply.ids)
            ids += [turn.response_ids, np.array(reply.ids, np.int32)]
            probs += [turn.log_probs, np.zeros(replied, np.float32)]
            mask += [np.ones(count, np.uint8), np.zeros(replied, np.uint8)]
            length += count + replied
        return Response(
            sample_of(self.turns[0].sample_id),
            np.concatenate(ids),
            np.concatenate(probs),
            tuple(spans),
            finish_reason,
            np.concatenate(mask),
        )


class Turns:
    """The responses of one piece of work on this rank.  ``asked`` by sample id, which ascend;
    ``environments`` by source; ``name`` begins what an environment knows a conversation by.
    """

    def __init__(
        self,
        asked: Mapping[int, tuple[Prompt, Request]],
        environments: Mapping[str, Environment],
        log: MemoryLog,
        sampling: Sampling,
        *,
        tokenizer: PreTrainedTokenizerBase,
        ending: Ending,
        name: str,
    ) -> None:
        self.num_calls = 0
        self.call_s = 0.0  # sum over calls
        self.first_error: str | None = None
        self._asked = asked
        self._id_N = np.fromiter(asked, np.int64, len(asked))
        self._is_forgotten_N = np.zeros(len(asked), bool)
        self._environments = environments
        self._log = log
        self._sampling = sampling
        self._tokenizer = tokenizer
        self._ending = ending
        self._name = name
        self._calls = {
            source: Calls[Any](source, threads=e.threads, timeout_s=e.timeout_s)
            for source, e in environments.items()
        }
        self._lock = threading.Lock()  # of the tokenizer and the counters, for threads that reply
        self._conversations: dict[int, _Conversation] = {}
        self._whole: deque[Response] = deque()

    def answers(self, engine: Engine) -> Iterator[Response]:
        """Whole responses to what is asked, as they end on this rank.  After a pause of the engine it is
        asked for the others again, and goes on where it was.
        """
        requests = Requests(self._asked, self._id_N[~self._is_forgotten_N])
        follow = self._follow if self._environments else None
        for turn in engine.generate(requests, self._log, self._sampling, follow):
            self._take(turn)
            yield from self._drain()
        yield from self._drain()

    def settle(self) -> None:
        """Wait for the environments that were asked: their replies are appended to the log then."""
        for found in self._conversations.values():
            if found.call is not None:
                self._calls[found.prompt.conversation["environment"]].wait(found.call)

    def close(self) -> None:
        """Threads that call environments end."""
        for calls in self._calls.values():
            calls.close()

    def forget(self, sample_ids: Iterable[int]) -> None:
        """Drop whole responses that are kept elsewhere, from here and from the log."""
        for sample_id in sample_ids:
            self._is_forgotten_N[np.searchsorted(self._id_N, sample_id)] = True
            found = self._conversations.pop(sample_id, None)
            count = len(found.turns) if found else 1
            self._log.forget(turn_id(sample_id, turn) for turn in range(count))

    def _drain(self) -> Iterator[Response]:
        while self._whole:
            yield self._whole.popleft()

    # -- one turn ----------------------------------------------------------------------------------
    def _take(self, turn: Response) -> None:
        """A turn of the student is over: ask the environment, unless nothing can follow."""
        sample_id = sample_of(turn.sample_id)
        prompt, _ = self._asked[sample_id]
        if not prompt.conversation:
            self._whole.append(turn)
            return
        found = self._conversations.get(sample_id)
        if found is None:
            messages = copy.deepcopy(prompt.conversation["messages"])
            found = self._conversations[sample_id] = _Conversation(prompt, messages)
        found.turns.append(turn)
        assert turn_of(turn.sample_id) == len(found.turns) - 1, "turns come one behind the other"
        is_last = len(found.turns) == self._environment(prompt).max_turns
        is_full = self._length(found) >= self._sampling.max_response
        if turn.finish_reason == "length" or is_last or is_full:
            self._end(found, turn.finish_reason)
        elif self._log.reply(turn.sample_id) is None:
            found.call = self._ask(found, turn)

    def _length(self, found: _Conversation) -> int:
        """Tokens of the response so far."""
        sampled = sum(len(turn.response_ids) for turn in found.turns)
        return sampled + sum(len(reply.ids) for reply in found.replies)

    def _environment(self, prompt: Prompt) -> Environment:
        return self._environments[prompt.conversation["environment"]]

    def _end(self, found: _Conversation, finish_reason: str) -> None:
        found.is_over = True
        self._whole.append(found.whole(finish_reason))

    def _said(self, turn: Response) -> dict[str, Any]:
        text = self._ending.turn_text(turn.response_ids.tolist())
        return {"role": "assistant", "content": text}

    # -- the environment ---------------------------------------------------------------------------
    def _ask(self, found: _Conversation, turn: Response) -> Call[Any]:
        """Call the environment in a thread, which logs its reply."""
        prompt, environment = found.prompt, self._environment(found.prompt)
        sample_id, told = sample_of(turn.sample_id), prompt.conversation
        request, messages = self._asked[sample_id][1], list(found.messages)
        asked = Turn(
            conversation=f"{self._name}/{request.iteration}/{sample_id}",
            turn=turn_of(turn.sample_id),
            messages=copy.deepcopy([*messages, self._said(turn)]),
            tools=copy.deepcopy(told["tools"]),
            answer=told["answer"],
            fields=dict(prompt.route),
            prompt_id=prompt.prompt_id,
            sample=request.sample,
        )

        def done(result: object, seconds: float) -> None:
            reply = self._reply(result, found, messages, int(turn.response_ids[-1]))
            with self._lock:
                self.num_calls += 1
                self.call_s += seconds
                if reply.error is not None and self.first_error is None:
                    self.first_error = f"{prompt.prompt_id}, turn {asked.turn}: {reply.error}"
            self._log.append_reply(turn.sample_id, reply.encode())

        source = prompt.conversation["environment"]
        return self._calls[source].submit(partial(environment.step, asked), done)

    def _reply(
        self, result: object, found: _Conversation, messages: Sequence[Any], last_id: int
    ) -> Reply:
        """The reply that the environment's result, or what it raised, is."""
        try:
            if isinstance(result, BaseException):
                raise result
            said = check_reply(result)
            if not said:
                return Reply()
            json.dumps(said, allow_nan=False)
            with self._lock:
                ids = encode_reply(
                    self._tokenizer,
                    messages,
                    said,
                    found.prompt.conversation["tools"],
                    last_id=last_id,
                    where="its messages",
                )
            return Reply(said, ids)
        except BaseException as error:  # foreign code raises what it likes
            return Reply(error=f"{type(error).__name__}: {error}"[:_MESSAGE])

    # -- what follows ------------------------------------------------------------------------------
    def _follow(self, batch: Sequence[Request]) -> Sequence[Request]:
        """The next turns of a batch whose turns are all here."""
        found = [self._next(request) for request in batch]
        return [request for request in found if request is not None]

    def _next(self, request: Request) -> Request | None:
        """The request behind an answered one; None: its response is whole."""
        found = self._conversations.get(sample_of(request.sample_id))
        number = turn_of(request.sample_id)
        if found is None or number in found.next:  # an engine may ask again after a pause
            return found.next[number] if found else None
        if found.is_over:
            return None
        turn = found.turns[number]
        if found.call is not None:
            self._calls[found.prompt.conversation["environment"]].wait(found.call)
            found.call = None
        data = self._log.reply(turn.sample_id)
        assert data is not None, f"no reply to turn {number} of sample {request.sample_id}"
        reply = Reply.decode(data)
        if reply.error is not None:
            self._end(found, "environment_error")
        elif not reply.messages:
            self._end(found, "stop")
        elif self._length(found) + len(reply.ids) >= self._sampling.max_response:
            self._end(found, "length")
        else:
            found.replies.append(reply)
            found.messages += [self._said(turn), *reply.messages]
            ids = [
                np.asarray(part, np.int32)
                for part in (request.prompt_ids, turn.response_ids, reply.ids)
            ]
            found.next[number] = Request(
                turn_id(sample_of(request.sample_id), number + 1),
                request.prompt_id,
                np.concatenate(ids),
                request.sample,
                self._length(found),
                request.iteration,
            )
        return found.next.get(number)
