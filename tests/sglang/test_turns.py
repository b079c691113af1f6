"""Responses of several turns on real servers: the loop is the one of every engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mtopd.data import Turn
from mtopd.rollout.engine import Request, Sampling
from mtopd.rollout.memory_log import MemoryLog, Response
from mtopd.rollout.token_log import (
    log_path,
    read_log,
)
from mtopd.rollout.turns import Environment, Turns
from mtopd.tokenizer import encode_prompts
from mtopd.types import Prompt
from tests.environments import count_letters
from tests.rollout.engines import token_log
from tests.sglang.conftest import EngineUnderTest, Place

COUNT = 24
SAMPLING = Sampling(64, seed=5)
Answers = dict[int, Response]


def answer(
    engine: EngineUnderTest, place: Place, log: MemoryLog, calls: list[tuple[str, int]]
) -> Answers:
    def step(turn: Turn) -> Any:
        calls.append((turn.conversation, turn.turn))
        return count_letters(turn)

    asked = {}
    for i in range(COUNT):
        messages = [{"role": "user", "content": f"word {i}"}]
        told = {"environment": "letters", "messages": messages, "tools": None, "answer": None}
        (ids,) = encode_prompts(place.tokenizer, [messages])
        prompt = Prompt(f"letters/{i}", {}, tuple(ids), 0, {}, told)
        asked[i] = prompt, Request(i, prompt.prompt_id, prompt.prompt_ids)
    turns = Turns(
        asked,
        {"letters": Environment(step, 4, 60.0, 4)},
        log,
        SAMPLING,
        tokenizer=place.tokenizer,
        ending=engine.ending,
        name="test",
    )
    found = {response.sample_id: response for response in turns.answers(engine)}
    assert sorted(found) == list(range(COUNT))
    return found


def test_turns_stand_behind_one_another_and_go_on_from_a_torn_log(
    engine: EngineUnderTest, place: Place, tmp_path: Path
) -> None:
    engine.give(place.student, "run/1/0")
    first, calls = (
        token_log(tmp_path / "whole", 1, COUNT, "sglang", {0: "run/1/0"}),
        list[tuple[str, int]](),
    )
    whole = answer(engine, place, first, calls)
    first.close()
    assert len({*calls}) == len(calls), "asked once a turn"
    num_turns = set()
    for i, response in whole.items():
        (prompt,) = encode_prompts(place.tokenizer, [[{"role": "user", "content": f"word {i}"}]])
        mask = response.loss_mask
        assert mask is not None and mask[-1] == 1 and len(mask) <= SAMPLING.max_response
        num_turns.add(1 + np.count_nonzero(np.diff(mask.astype(np.int8)) == 1))
        (expected,) = place.log_probs(place.student, [[*prompt, *response.response_ids.tolist()]])
        wanted = np.where(mask, expected[len(prompt) - 1 :], 0)
        assert np.abs(response.log_probs - wanted).max() < 1e-5
    assert {1, 2, 3} <= num_turns
    assert {"stop", "length"} <= {r.finish_reason for r in whole.values()}

    data = first.path.read_bytes()
    for number, share in enumerate((0.3, 0.7)):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        log_path(folder, 1, 0).write_bytes(data[: int(share * len(data))])
        num_known = sum(bool(r.reply) for r in read_log(log_path(folder, 1, 0)).records)
        again: list[tuple[str, int]] = []
        log = token_log(folder, 2, COUNT, "sglang", {0: "run/1/0"})
        found = answer(engine, place, log, again)
        log.close()
        assert len(again) == len(calls) - num_known and num_known
        for i, response in whole.items():
            np.testing.assert_array_equal(found[i].response_ids, response.response_ids)
            np.testing.assert_array_equal(found[i].loss_mask, response.loss_mask)
            assert found[i].finish_reason == response.finish_reason
            assert np.abs(found[i].log_probs - response.log_probs).max() < 1e-5
