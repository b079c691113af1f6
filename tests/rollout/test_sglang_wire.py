"""What is refused of a server's words: tokens that pass are trained on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mtopd.rollout.sglang_wire import (
    Asking,
    AttemptFailed,
    Events,
    Part,
    RequestRefused,
    Stream,
    check_ids,
    check_server,
    error_text,
    generate_body,
)
from mtopd.types import MtopdError

ASKING = Asking(
    vocab_size=50,
    end_ids=frozenset({49}),
    version="run/1/3",
    seeded=True,
    interval=8,
)
SERVER = {
    "version": "0.5.23",
    "enable_deterministic_inference": True,
    "incremental_streaming_output": True,
    "skip_tokenizer_init": True,
    "max_req_input_len": 2042,
    "tp_size": 2,
    "device": "cpu",
}
MODEL = {"weight_version": "default", "preferred_sampling_params": None}


def event(ids: list[int], total: int, finish: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "output_ids": ids,
        "meta_info": {
            "output_token_logprobs": [[-1.0 - t / 100, t, None] for t in ids],
            "completion_tokens": total,
            "weight_version": "run/1/3",
            "finish_reason": finish,
            "cached_tokens": 5,
        },
    }


FOUR = Part(4)


def read(*events: dict[str, Any], part: Part = FOUR) -> list[tuple[list[int], str | None]]:
    stream = Stream(ASKING, part)
    chunks = [stream.read(json.dumps(e).encode()) for e in events]
    return [(list(chunk.ids), chunk.finish) for chunk in chunks]


def test_a_stream_is_read_in_pieces_of_any_size() -> None:
    """Bytes arrive as the network cuts them; comments and [DONE] are no events."""
    text = b'data: {"a": 1}\n\n: keep-alive\n\ndata: {"b": 2}\r\n\r\ndata: [DONE]\n\n'
    for size in (1, 3, 7, len(text)):
        events = Events()
        found = [
            json.loads(e)
            for start in range(0, len(text), size)
            for e in events.feed(text[start : start + size])
        ]
        assert found == [{"a": 1}, {"b": 2}], size


def test_chunks_of_any_size_and_each_end() -> None:
    assert read(event([1], 1), event([2, 3], 3), event([49], 4, {"type": "stop"})) == [
        ([1], None),
        ([2, 3], None),
        ([49], "stop"),
    ]
    assert read(event([1, 2, 3, 4], 4, {"type": "length"})) == [([1, 2, 3, 4], "length")]
    assert read(event([1], 1), event([], 1, {"type": "abort"})) == [([1], None), ([], "abort")]
    # before its least length an end token ends nothing
    endless = Part(2, endless=True)
    assert read(event([49, 1], 2, {"type": "length"}), part=endless) == [([49, 1], "length")]


def _with(
    change: Callable[[dict[str, Any]], object], ids: list[int] | None = None
) -> dict[str, Any]:
    found = event([1, 2] if ids is None else ids, 2)
    change(found)
    return found


@pytest.mark.parametrize(
    ("why", "events"),
    [
        ("server counts", [event([1], 1), event([1], 1)]),  # came twice
        ("server counts", [event([1], 1), event([3], 3)]),  # one is missing
        ("were asked for", [event([1, 2, 3, 4, 5], 5)]),
        ("called it length", [event([1, 2], 2, {"type": "length"})]),  # a full KV pool
        ("no end token", [event([1, 2], 2, {"type": "stop"})]),
        ("behind an end token", [event([49, 2], 2)]),
        ("behind an end token", [event([49, 49], 2, {"type": "stop"})]),
        ("not below the tokenizer's", [event([1, 50], 2)]),
        ("not below the tokenizer's", [event([-1, 2], 2)]),
        ("finish reason", [event([1, 2], 2, {"type": "tired"})]),
        ("with weights", [_with(lambda e: e["meta_info"].update(weight_version="run/1/2"))]),
        ("differ", [_with(lambda e: e.update(output_ids=[1, 3]))]),
        ("differ", [_with(lambda e: e["meta_info"]["output_token_logprobs"].pop())]),
        (
            "must hold",
            [_with(lambda e: e["meta_info"]["output_token_logprobs"][0].__setitem__(0, None))],
        ),
        ("must hold", [_with(lambda e: e["meta_info"].pop("completion_tokens"))]),
        ("must hold", [_with(lambda e: e.pop("meta_info"))]),
        ("must hold", [[]]),  # type: ignore[list-item]
        (
            "not finite",
            [
                _with(
                    # as float32, which is what is kept
                    lambda e: e["meta_info"]["output_token_logprobs"][1].__setitem__(0, -1e300)
                )
            ],
        ),
    ],
)
def test_what_is_not_as_asked_fails_the_attempt(why: str, events: list[dict[str, Any]]) -> None:
    with pytest.raises(AttemptFailed, match=why):
        read(*events)


def test_a_token_that_is_no_whole_number_is_refused() -> None:
    wrong = event([1], 1)
    wrong["output_ids"] = [1.5]
    wrong["meta_info"]["output_token_logprobs"] = [[-1.0, 1.5, None]]
    with pytest.raises(AttemptFailed, match="must hold"):
        read(wrong)
    with pytest.raises(AttemptFailed, match="not JSON"):
        Stream(ASKING, Part(4)).read(b'{"output_ids": [1')
    with pytest.raises(AttemptFailed, match="not JSON"):
        read(_with(lambda e: e["meta_info"]["output_token_logprobs"][0].__setitem__(0, math.nan)))


def test_errors_inside_a_stream() -> None:
    """They come with status 200: 400 would be met again, others may pass."""
    with pytest.raises(RequestRefused, match="too long"):
        read({"error": {"code": 400, "message": "too long"}})
    with pytest.raises(AttemptFailed, match="worker died"):
        read({"error": {"code": 503, "message": "worker died"}})


def test_the_body_of_a_request() -> None:
    ids = np.array([1, 2], np.int32)
    body = json.loads(generate_body(ASKING, "r", ids, Part(7), 11))
    params = body.pop("sampling_params")
    assert body == {"rid": "r", "input_ids": [1, 2], "stream": True, "return_logprob": True}
    assert params == {
        "temperature": 1.0,
        "max_new_tokens": 7,
        "stop_token_ids": [49],
        "sampling_seed": 11,
        "stream_interval": 8,
    }
    endless = json.loads(generate_body(ASKING, "r", ids, Part(7, endless=True), 11))
    assert endless["sampling_params"]["ignore_eos"] is True
    assert "stop_token_ids" not in endless["sampling_params"]


def test_ids_that_would_end_a_server_are_not_sent() -> None:
    check_ids("a/0", np.array([0, 49], np.int32), 50)
    for ids in ([-1], [50], []):
        with pytest.raises(MtopdError, match="prompt a/7"):
            check_ids("a/7", np.array(ids, np.int32), 50)


def _check(server: dict[str, Any], model: dict[str, Any] = MODEL, **changes: Any) -> Any:
    return check_server(
        "http://h:1", server, model, **{"context_length": 64, "seeded": True, **changes}
    )


def test_a_server_that_fits() -> None:
    facts = _check(SERVER)
    assert (facts.tp_size, facts.device, facts.longest_input) == (2, "cpu", 2041)
    _check({**SERVER, "enable_deterministic_inference": False}, seeded=False)
    _check(SERVER, context_length=2041)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": "0.5.22"}, "install sglang==0.5.23"),
        ({"enable_deterministic_inference": False}, "--enable-deterministic-inference"),
        ({"incremental_streaming_output": False}, "--incremental-streaming-output"),
        ({"skip_tokenizer_init": None}, "--skip-tokenizer-init"),
        ({"max_req_input_len": 64}, "--context-length"),
    ],
)
def test_a_server_that_does_not_fit_is_told_the_flag(change: dict[str, Any], said: str) -> None:
    with pytest.raises(MtopdError, match=said):
        _check({**SERVER, **change})


def test_a_server_that_changes_requests_is_refused() -> None:
    with pytest.raises(MtopdError, match="--preferred-sampling-params"):
        _check(SERVER, {**MODEL, "preferred_sampling_params": {"top_k": 1}})


def test_what_an_error_says() -> None:
    assert error_text('{"error": {"message": "bad"}}') == "bad"
    assert error_text('{"message": "worse"}') == "worse"
    assert error_text("<html>") == "<html>"
