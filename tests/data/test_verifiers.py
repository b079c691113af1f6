"""Verifiers of the real reasoning_gym: right and wrong answers, and no response run as code."""

from __future__ import annotations

import builtins
import json
import pickle
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from mtopd.data import (
    CORRECT_SCORE,
    load_reasoning_gym,
    tokenize_prompts,
    verify,
)
from mtopd.types import MtopdError, Prompt
from tests.prompt_examples import ROUTES


def test_verifier_accepts_right_and_refuses_wrong_answers(sources, tokenizer) -> None:
    for train, held_out in sources.values():
        for source in (train, held_out):
            prompts = tokenize_prompts(
                source, tokenizer, ROUTES, context_length=64, max_response=20, rows=range(20)
            )
            for prompt, row in zip(prompts, source.rows, strict=False):
                assert verify(prompt, row.answer) >= CORRECT_SCORE
                assert verify(prompt, row.answer[:-1] + "!") < CORRECT_SCORE
                assert verify(prompt, "") < CORRECT_SCORE


def test_verifier_works_in_another_process_from_plain_data(sources) -> None:
    row = sources["spir"][0].rows[7]
    prompt = Prompt("spir/7", row.route, (1,), 0, json.loads(json.dumps(row.verify)))
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert pool.submit(verify, pickle.loads(pickle.dumps(prompt)), row.answer).result() == 1.0
        assert pool.submit(verify, prompt, "9 9 9 9").result() == 0.0


def test_a_response_is_never_run_as_code(sources, capsys) -> None:
    row = sources["spir"][0].rows[0]
    prompt = Prompt("spir/0", row.route, (1,), 0, row.verify)
    # spiral_matrix gives a tenth for a Python list; that still works, but only for literals.
    assert verify(prompt, str(row.answer.split())) == pytest.approx(0.1)
    builtins.mtopd_was_run = False
    try:
        assert verify(prompt, "[setattr(__import__('builtins'), 'mtopd_was_run', True)]") == 0.0
        assert builtins.mtopd_was_run is False
    finally:
        del builtins.mtopd_was_run
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert verify(prompt, "[1or 2]") == 0.0
    assert caught == [], "what Python's parser says of a response is nobody's warning"
    assert capsys.readouterr() == ("", "")
    with pytest.raises(MtopdError, match="'countdown' gives the response to sympy"):
        load_reasoning_gym("c", "countdown", {}, size=4, seed=1, eval_size=1)
