"""What an SGLang server is sent and what it answers, as bytes: bodies, events, and every check of them.

A chunk of a stream is "what is new", of any size: chunks may merge on the way, or come twice from a
broken proxy; the running total that each carries tells.  Tokens that pass here are trained on, so what
is not exactly as asked is refused.  No network and no clock in this file.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mtopd.types import MtopdError

Ids = npt.NDArray[np.int32]  # [T]
VERSION = "0.5.23"  # its wire format and its flags are what this client was tested with
_LONGEST_EVENT = 64 << 20  # bytes: a server that streams cumulatively would grow without end
_EVENT = b"data:"
_SHORT = 10  # bytes: an event of no more may be the last
DETERMINISTIC = "--enable-deterministic-inference"
_NEEDED = {  # field of /server_info -> the flag that sets it
    "enable_deterministic_inference": DETERMINISTIC,
    "incremental_streaming_output": "--incremental-streaming-output",
    "skip_tokenizer_init": "--skip-tokenizer-init",
}
FLAGS = tuple(_NEEDED.values())
RESERVED = 8  # tokens of a server's context that it takes no request for
# In a server's environment: so many tokens, although the model's config names fewer.
ALLOW_LONGER = "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"


class AttemptFailed(Exception):
    """This attempt ended early; what it delivered before counts, another may go on behind it.
    ``kind`` is what metrics count it as.
    """

    def __init__(self, why: str, kind: str = "malformed") -> None:
        super().__init__(why)
        self.kind = kind


class RequestRefused(Exception):
    """The server will not answer this request, now or later."""


# -- a server --------------------------------------------------------------------------------------
def server_flags(folder: Path, *, seeded: bool) -> list[str]:
    """What every server of a run is started with.

    ``folder`` holds config.json.  ``seeded``: draws follow from seed and position.
    """
    needed = (flag for flag in FLAGS if seeded or flag != DETERMINISTIC)
    return ["--model-path", str(folder), "--load-format", "dummy", *needed]


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server says of itself."""

    longest_input: int  # tokens of prompt and response together
    tp_size: int
    device: str  # "cpu", "cuda"


def check_server(
    url: str,
    server_info: Mapping[str, Any],
    model_info: Mapping[str, Any],
    *,
    context_length: int,
    seeded: bool,
) -> ServerFacts:
    """Raise MtopdError, with the flag to change, unless the server answers as this client reads."""

    def refuse(found: str, needed: str, do: str) -> MtopdError:
        return MtopdError(f"SGLang server {url}: {found}; {needed}: {do}")

    found = server_info.get("version")
    if found != VERSION:
        raise refuse(
            f"version {found}",
            f"this client speaks to {VERSION}",
            f"install sglang=={VERSION} there",
        )
    for field, flag in _NEEDED.items():
        if flag == DETERMINISTIC and not seeded:
            continue
        if server_info.get(field) is not True:
            more = ", or set rollout.seeded=false" * (flag == DETERMINISTIC)
            raise refuse(f"{field} is off", "it must be on", f"start it with {flag}{more}")
    if model_info.get("preferred_sampling_params"):
        raise refuse(
            f"preferred_sampling_params are {model_info['preferred_sampling_params']}",
            "they would change every request",
            "start it without --preferred-sampling-params",
        )
    # The longest accepted input is one token less than it says (seen at 2048: 2041 and not 2042).
    longest = int(server_info.get("max_req_input_len") or 0) - 1
    if context_length > longest:
        raise refuse(
            f"its longest input is {longest} tokens",
            f"data.context_length {context_length} must fit, or a response near its end could not "
            "be continued",
            "raise --context-length and --max-total-tokens, or lower data.context_length",
        )
    return ServerFacts(longest, int(server_info.get("tp_size", 1)), str(server_info.get("device")))


# -- a request -------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Part:
    """The tokens that one attempt is asked for."""

    num_tokens: int
    endless: bool = (
        False  # end tokens are tokens like any other: before the response's least length
    )


@dataclass(frozen=True, slots=True)
class Asking:
    """What all requests of a phase have in common."""

    vocab_size: int  # of the tokenizer: ids at or above it are nobody's
    end_ids: frozenset[int]
    version: str  # of the weights that must answer
    seeded: bool
    interval: int  # tokens of a chunk
    temperature: float = 1.0  # 0: the most likely token
    top_p: float = 1.0


def check_ids(prompt_id: str, prompt_ids: Ids, vocab_size: int) -> None:
    """One id outside the model's rows ends an SGLang server with all that it answers."""
    if not len(prompt_ids):
        raise MtopdError(f"prompt {prompt_id} has no tokens; an engine needs one: remove it")
    lowest, highest = int(prompt_ids.min()), int(prompt_ids.max())
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise MtopdError(
            f"prompt {prompt_id} holds the token id {wrong}; ids of the student's tokenizer run "
            f"from 0 to {vocab_size - 1}: tokenize it with the student's own"
        )


def generate_body(asking: Asking, rid: str, input_ids: Ids, part: Part, seed: int) -> bytes:
    """The body of /generate for ``part`` behind ``input_ids``."""
    import orjson

    params: dict[str, Any] = {
        "temperature": asking.temperature,
        "max_new_tokens": part.num_tokens,
        "stream_interval": asking.interval,
    }
    if part.endless:
        params["ignore_eos"] = True
    else:
        params["stop_token_ids"] = sorted(asking.end_ids)
    if asking.top_p < 1:
        params["top_p"] = asking.top_p
    if asking.seeded:
        params["sampling_seed"] = seed
    body = {
        "rid": rid,
        "input_ids": input_ids,
        "stream": True,
        "return_logprob": True,
        "sampling_params": params,
    }
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


# -- a stream --------------------------------------------------------------------------------------
class Events:
    """Cuts a stream of bytes into its events, whatever the pieces it comes in."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The JSON texts of the events that are whole now; comments and the last [DONE] are none."""
        if self._rest:
            data = self._rest + data
        *lines, self._rest = data.split(b"\n")
        if len(self._rest) > _LONGEST_EVENT:
            raise AttemptFailed(f"an event of more than {_LONGEST_EVENT >> 20} MiB")
        events = []
        for line in lines:
            if line.startswith(_EVENT):
                text = line[len(_EVENT) :]
                if len(text) > _SHORT or text.strip() != b"[DONE]":
                    events.append(text)
        return events


@dataclass(slots=True)
class Chunk:
    """The new tokens of one event."""

    ids: array[int]  # int32
    log_probs: array[float]  # float32, as many
    finish: str | None  # "stop", "length", "abort"; None: more will come


class Stream:
    """The checks of one attempt, event by event."""

    __slots__ = ("_asking", "_ends", "_loads", "_rest", "cached_tokens", "is_over", "total")

    def __init__(self, asking: Asking, part: Part) -> None:
        import orjson

        self._loads = orjson.loads
        self._asking = asking
        self._rest = part.num_tokens
        self._ends = frozenset() if part.endless else asking.end_ids
        self.total = 0  # tokens so far
        self.is_over = False  # the server has said why it ended
        self.cached_tokens = 0  # of the prompt, that the server found in its prefix cache

    def read(self, text: bytes) -> Chunk:
        """Raises AttemptFailed, and RequestRefused for an error that another try would meet too."""
        asking = self._asking
        try:
            answer = self._loads(text)
        except ValueError:
            raise AttemptFailed(f"an event is not JSON: {text[:80]!r}") from None
        try:
            if "error" in answer:
                raise _error_event(answer["error"])
            ids_read, meta = answer["output_ids"], answer["meta_info"]
            triples = meta["output_token_logprobs"] if ids_read else []
            log_probs = array("f", [triple[0] for triple in triples])
            if [triple[1] for triple in triples] != ids_read:
                raise AttemptFailed("tokens and those of the log-probs differ")
            ids = array("i", ids_read)
            total, finish = meta["completion_tokens"], meta["finish_reason"]
            version, kind = meta["weight_version"], finish and finish["type"]
        except (KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
            # null is what a masked-out token has for a log-prob
            raise AttemptFailed(f"an event without what it must hold: {error!r:.80}") from None
        if version != asking.version:
            raise AttemptFailed(
                f"answered with weights {version!r}, not {asking.version!r}", "other_weights"
            )
        self.total += len(ids)
        if total != self.total:
            raise AttemptFailed(f"{self.total} tokens came, the server counts {total}")
        if self.total > self._rest:
            raise AttemptFailed(f"{self.total} tokens, {self._rest} were asked for")
        if not math.isfinite(sum(log_probs)):  # NaN and inf stay in a sum
            raise AttemptFailed("a log-prob is not finite")
        if ids_read and not (min(ids_read) >= 0 and max(ids_read) < asking.vocab_size):
            raise AttemptFailed(
                f"a sampled id is not below the tokenizer's {asking.vocab_size}: the server's "
                "vocabulary is not trimmed"
            )
        self.cached_tokens = meta.get("cached_tokens") or 0
        self._check_end(ids_read, kind)
        self.is_over = kind is not None
        return Chunk(ids, log_probs, kind)

    def _check_end(self, ids: list[int], kind: str | None) -> None:
        ends = self._ends
        if not ends.isdisjoint(ids[:-1] if kind == "stop" else ids):
            raise AttemptFailed("tokens come behind an end token")
        if kind == "stop" and not (ids and ids[-1] in ends):
            raise AttemptFailed(f"stopped at {ids[-1:]}, which is no end token of ours")
        if kind == "length" and self.total != self._rest:
            # What a full KV pool looks like.
            raise AttemptFailed(
                f"cut at {self.total} of {self._rest} tokens and called it length", "cut_short"
            )
        if kind not in (None, "stop", "length", "abort"):
            raise AttemptFailed(f"finish reason {kind!r}")


def _error_event(error: Any) -> Exception:
    """An error inside a stream, which has status 200."""
    code = error.get("code") if isinstance(error, dict) else None
    said = error.get("message", error) if isinstance(error, dict) else error
    if code == 400:
        return RequestRefused(f"{said}")
    return AttemptFailed(f"the server said in its stream: {said!s:.200}", "error_event")


def error_text(body: str) -> str:
    """What an answer that is no 200 says."""
    try:
        found = json.loads(body)
    except ValueError:
        return body.strip()[:300]
    for key in ("error", "message"):
        if isinstance(found, dict) and found.get(key):
            value = found[key]
            return str(value.get("message", value) if isinstance(value, dict) else value)[:300]
    return body[:300]
