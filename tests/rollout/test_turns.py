"""Responses of several turns: the student's tokens stand, an environment's stand between them, and a
kill changes nothing.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtopd.data import Turn
from mtopd.rollout.ending import Ending
from mtopd.rollout.engine import Request, Sampling
from mtopd.rollout.memory_log import MemoryLog, Response, turn_id, turn_of
from mtopd.rollout.shards import trajectory
from mtopd.rollout.token_log import (
    FormerLogs,
    TokenLog,
    carry_over,
    log_path,
    logs_before,
    read_log,
)
from mtopd.rollout.turns import Environment, Turns
from mtopd.tokenizer import encode_prompts, load_tokenizer
from mtopd.trajectories import TokenStore, write_shard
from mtopd.types import MtopdError, Prompt
from tests.environments import count_letters
from tests.rollout.engines import VERSION, Model, build_embedded, memory_log, small_model, token_log

SAMPLING = Sampling(72, seed=3)
COUNT = 20
Asked = dict[int, tuple[Prompt, Request]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return small_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def asked(model: Model) -> Asked:
    """Every third has no environment."""
    tokenizer = load_tokenizer(model.folder)
    found = {}
    for i in range(COUNT):
        messages = [{"role": "user", "content": f"word {i}"}]
        told = {"environment": "letters", "messages": messages, "tools": None, "answer": str(i)}
        (ids,) = encode_prompts(tokenizer, [messages])
        prompt = Prompt(f"letters/{i}", {"domain": "x"}, tuple(ids), 0, {}, told if i % 3 else {})
        request = Request(i, prompt.prompt_id, prompt.prompt_ids, sample=1, iteration=7)
        found[i] = prompt, request
    return found


def turns_of(
    model: Model,
    asked: Asked,
    log: MemoryLog,
    step: Callable[[Turn], Any] = count_letters,
    *,
    max_turns: int = 4,
    timeout_s: float = 30.0,
) -> Turns:
    tokenizer = load_tokenizer(model.folder)
    return Turns(
        asked,
        {"letters": Environment(step, max_turns, timeout_s, 4)},
        log,
        SAMPLING,
        tokenizer=tokenizer,
        ending=Ending(tokenizer, [1]),
        name="test",
    )


def answer(model: Model, turns: Turns) -> list[Response]:
    """Whole responses in the order of what was asked."""
    engine = build_embedded(model, batch_size=8)
    engine.update_weights(model.buckets(), VERSION)
    found = {response.sample_id: response for response in turns.answers(engine)}
    engine.close()
    assert sorted(found) == list(range(COUNT))
    return [found[i] for i in range(COUNT)]


def bits(responses: list[Response]) -> list[tuple[object, ...]]:
    return [
        (
            r.sample_id,
            r.response_ids.tobytes(),
            r.log_probs.tobytes(),
            r.finish_reason,
            None if r.loss_mask is None else r.loss_mask.tobytes(),
            r.version_spans,
        )
        for r in responses
    ]


def parts(response: Response) -> list[tuple[bool, list[int]]]:
    """(whether the student said it, ids) of each stretch."""
    assert response.loss_mask is not None
    pairs = zip(response.loss_mask.tolist(), response.response_ids.tolist(), strict=True)
    groups = itertools.groupby(pairs, key=lambda pair: bool(pair[0]))
    return [(said, [token for _, token in group]) for said, group in groups]


def test_a_response_is_the_students_turns_and_the_replies_between_them(
    model: Model, asked: Asked, tmp_path: Path
) -> None:
    turns = turns_of(model, asked, memory_log())
    found = answer(model, turns)
    tokenizer = load_tokenizer(model.folder)
    reasons: Counter[str] = Counter()
    num_turns: Counter[int] = Counter()
    for (prompt, request), response in zip(asked.values(), found, strict=True):
        ids, length = response.response_ids, len(response.response_ids)
        assert length <= SAMPLING.max_response
        reasons[response.finish_reason] += 1
        if not prompt.conversation:
            assert response.loss_mask is None and 1 not in ids[:-1]
            continue
        stretches = parts(response)
        assert [said for said, _ in stretches] == [i % 2 == 0 for i in range(len(stretches))]
        assert stretches[-1][0], "nothing behind the student's last token"
        assert response.last_turn.tolist() == stretches[-1][1]
        num_turns[len(stretches) // 2 + 1] += 1
        for number, (said, tokens) in enumerate(stretches[:-1]):
            if said:
                assert tokens[-1] == 1 and 1 not in tokens[:-1]
            else:
                # The char template: the end token is there already, a user's message ends with <sep>.
                before = tokenizer.decode(stretches[number - 1][1][:-1])
                letters = sum(map(str.isalpha, before))
                assert tokenizer.decode(tokens) == f"{letters} in {number // 2}:<sep>"
        # The log-probs are the model's own, behind everything that stands before.
        mask = response.loss_mask
        assert mask is not None
        log_p = model.log_probs(list(request.prompt_ids), ids.tolist())
        wanted = log_p[torch.arange(length), torch.from_numpy(ids.astype(np.int64))].numpy()
        np.testing.assert_allclose(response.log_probs, np.where(mask, wanted, 0), rtol=0, atol=2e-5)
        assert response.version_spans == ((0, 7),)
    assert set(reasons) == {"stop", "length", "environment_error"}, reasons
    assert {1, 2, 3, 4} == set(num_turns), "the test needs short and long conversations"
    assert turns.num_calls and turns.first_error and "too many" in turns.first_error
    samples = [trajectory(*item, r) for item, r in zip(asked.values(), found, strict=True)]
    write_shard(tmp_path, "batch", samples, 1)
    for sample in samples:
        mask = TokenStore(tmp_path).tokens(sample.sample_id).loss_mask
        np.testing.assert_array_equal(mask, np.asarray(sample.loss_mask))


def test_wherever_a_start_is_killed_the_next_one_ends_alike_and_asks_for_what_is_missing(
    model: Model, asked: Asked, tmp_path: Path
) -> None:
    """The log of a whole start is cut at any byte, twice over: the second start is cut, too."""
    first = token_log(tmp_path / "whole", 1, COUNT, "embedded", {7: VERSION})
    whole = answer(model, turns_of(model, asked, first))
    first.close()
    data = first.path.read_bytes()
    rng = np.random.default_rng(0)
    num_replied = sum(bool(record.reply) for record in read_log(first.path).records)
    assert num_replied > 10
    known_counts = set()
    for number, size in enumerate([300, *rng.integers(300, len(data), 3).tolist(), len(data)]):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        log_path(folder, 1, 0).write_bytes(data[:size])
        for generation in (2, 3):
            known = {
                record.sample_id
                for path in logs_before(folder, generation)
                for record in read_log(path).records
                if record.reply
            }
            known_counts.add(len(known))
            again: list[int] = []

            def step(turn: Turn, again: list[int] = again) -> Any:
                again.append(turn_id(int(turn.conversation.removeprefix("test/7/")), turn.turn))
                return count_letters(turn)

            log = token_log(folder, generation, COUNT, "embedded", {7: VERSION})
            found = answer(model, turns_of(model, asked, log, step))
            log.close()
            assert bits(found) == bits(whole), f"cut at {size} of {len(data)}"
            assert len(again) == num_replied - len(known), "asked once a turn"
            assert not known & {*again}
            if generation == 2:
                rest = log.path.read_bytes()
                log.path.write_bytes(rest[: max(300, len(rest) // 2)])
    assert 0 in known_counts and num_replied in known_counts and len(known_counts) > 3


def test_what_one_iteration_hands_over_the_next_one_ends_alike(
    model: Model, asked: Asked, tmp_path: Path
) -> None:
    first = token_log(tmp_path / "whole", 1, COUNT, "embedded", {7: VERSION})
    whole = answer(model, turns_of(model, asked, first))
    first.close()
    data = first.path.read_bytes()
    for number, size in enumerate(np.random.default_rng(1).integers(300, len(data), 3).tolist()):
        old, new = tmp_path / f"{number}" / "old", tmp_path / f"{number}" / "new"
        old.mkdir(parents=True)
        log_path(old, 1, 0).write_bytes(data[:size])
        known = {r.sample_id for r in read_log(log_path(old, 1, 0)).records if r.reply}
        target, samples = log_path(new, 0, 0), range(COUNT)
        carry_over(logs_before(old, 2), target, run="test", engine="embedded", samples=samples)
        again: list[int] = []

        def step(turn: Turn, again: list[int] = again) -> Any:
            again.append(turn_id(int(turn.conversation.removeprefix("test/7/")), turn.turn))
            return count_letters(turn)

        log = token_log(new, 2, COUNT, "embedded", {7: VERSION})
        found = answer(model, turns_of(model, asked, log, step))
        log.close()
        assert bits(found) == bits(whole), f"cut at {size} of {len(data)}"
        assert again and not known & {*again}, "asked once a turn"


def test_a_reply_is_logged_as_soon_as_it_is_there(
    model: Model, asked: Asked, tmp_path: Path
) -> None:
    """Not when its batch goes on: that may be an hour later."""
    log = token_log(tmp_path, 1, COUNT, "embedded", {7: VERSION})
    engine = build_embedded(model, batch_size=COUNT)
    engine.update_weights(model.buckets(), VERSION)
    turns = turns_of(model, asked, log)
    plain = turns._follow
    at_follow: list[int] = []

    def follow(batch: Any) -> Any:
        log.flush()
        at_follow.append(sum(bool(r.reply) for r in read_log(log.path).records))
        return plain(batch)

    turns._follow = follow  # type: ignore[method-assign]
    list(turns.answers(engine))
    log.close()
    assert at_follow[0] > 0, "calls run while the batch is answered"


def test_what_an_environment_gets_is_its_own_and_all_of_the_conversation(
    model: Model, asked: Asked
) -> None:
    seen: dict[tuple[str, int], Turn] = {}

    def step(turn: Turn) -> Any:
        seen[turn.conversation, turn.turn] = turn
        reply = count_letters(turn)
        for message in turn.messages:  # what it does to its copy does nothing
            message.clear()
        return reply

    told: dict[tuple[str, int], list[dict[str, Any]]] = {}

    def keeping(turn: Turn) -> Any:
        told[turn.conversation, turn.turn] = [dict(message) for message in turn.messages]
        return step(turn)

    found = answer(model, turns_of(model, asked, memory_log(), keeping))
    assert bits(found) == bits(answer(model, turns_of(model, asked, memory_log())))
    last = max(told, key=lambda key: key[1])
    turn, messages = seen[last], told[last]
    number = int(last[0].removeprefix("test/7/"))
    assert (turn.prompt_id, turn.answer, turn.sample) == (f"letters/{number}", str(number), 1)
    assert turn.fields == {"domain": "x"} and turn.tools is None
    roles = [message["role"] for message in messages]
    assert roles == ["user", *["assistant", "user"] * turn.turn, "assistant"] and turn.turn == 2
    tokenizer = load_tokenizer(model.folder)
    spoken = [tokenizer.decode(ids).removesuffix("<eos>") for _, ids in parts(found[number])]
    said = [m["content"] for m in messages[1:] if m["role"] == "assistant"]
    assert said == spoken[0:5:2]


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        ("plain text", "it returned str; it must be a list of messages"),
        ([{"content": "no role"}], "no dict with a role"),
        ([{"role": "user", "content": None}], "content is no text"),
        (
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
            "the assistant's",
        ),
        ([{"role": "user", "content": "\u20ac"}], "has no token for"),
        ([{"role": "user", "content": "x", "more": float("nan")}], "not JSON compliant"),
    ],
)
def test_what_cannot_be_a_reply_ends_the_response_there(
    model: Model, asked: Asked, reply: object, error: str
) -> None:
    turns = turns_of(model, asked, memory_log(), lambda turn: reply)
    found = answer(model, turns)
    plain = {r.sample_id: r for r in answer(model, turns_of(model, asked, memory_log()))}
    ended = [r for r in found if r.finish_reason == "environment_error"]
    assert len(ended) > COUNT // 2 and turns.first_error and error in turns.first_error
    for response in ended:
        first = len(response.response_ids)
        assert response.loss_mask is not None and response.loss_mask.all(), "trained up to there"
        np.testing.assert_array_equal(
            plain[response.sample_id].response_ids[:first], response.response_ids
        )


def test_a_late_call_ends_its_response_and_no_other(model: Model, asked: Asked) -> None:
    def step(turn: Turn) -> Any:
        if turn.prompt_id == "letters/1":
            import time

            time.sleep(3)
        return count_letters(turn)

    turns = turns_of(model, asked, memory_log(), step, timeout_s=1.0)
    found = answer(model, turns)
    whole = answer(model, turns_of(model, asked, memory_log()))
    assert (
        found[1].finish_reason == "environment_error"
        and whole[1].finish_reason != "environment_error"
    )
    assert turns.first_error
    others = [i for i in range(COUNT) if i != 1]
    reasons = [r.finish_reason for r in found]
    assert [reasons[i] for i in others] == [whole[i].finish_reason for i in others]
    for i in others:  # a batch has lost a member: other last bits, the same tokens
        np.testing.assert_array_equal(found[i].response_ids, whole[i].response_ids)


def test_max_turns_ends_a_conversation_without_another_call(model: Model, asked: Asked) -> None:
    told: list[int] = []

    def step(turn: Turn) -> Any:
        told.append(turn.turn)
        return count_letters(turn)

    found = answer(model, turns_of(model, asked, memory_log(), step, max_turns=2))
    assert {*told} == {0}, "nobody is asked about the last turn"
    several = [r for r in found if r.loss_mask is not None and len(parts(r)) > 1]
    assert {len(parts(r)) for r in several} == {3} and "stop" in {r.finish_reason for r in several}


def test_a_reply_without_room_for_a_turn_behind_it_is_left_out(model: Model, asked: Asked) -> None:
    """37 tokens with the <sep>: of 72 one fits behind a turn, a second does not."""
    long = [{"role": "user", "content": "x" * 36}]
    found = answer(model, turns_of(model, asked, memory_log(), lambda turn: long))
    reasons: Counter[str] = Counter()
    for response in found:
        if response.loss_mask is None:
            continue
        assert len(response.response_ids) <= SAMPLING.max_response and response.loss_mask[-1] == 1
        assert len(parts(response)) <= 3
        has_ended = response.response_ids[-1] == 1
        reasons[f"{response.finish_reason} {'ended' if has_ended else 'cut'}"] += 1
        if response.finish_reason == "length" and has_ended:
            assert len(response.response_ids) + 37 >= SAMPLING.max_response
    assert reasons["length ended"] > 3, reasons


def test_two_replies_to_a_turn_are_refused(tmp_path: Path) -> None:
    for generation, text in ((1, b"{}"), (2, b"[]")):
        log = TokenLog("w", log_path(tmp_path, generation, 0), run="r", engine="e", versions={})
        log.append_reply(turn_id(4, 2), text)
        log.close()
    with pytest.raises(MtopdError, match="hold two replies to sample 4: two starts"):
        FormerLogs({p: [turn_id(4, 2)] for p in logs_before(tmp_path, 3)}, "r").read(
            [turn_id(4, 2)]
        )
    assert turn_of(turn_id(4, 2)) == 2
