"""Tokenized prompts and supervised examples."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mtopd.data import (
    load_prompt_file,
    supervised_examples,
    tokenize_prompts,
    verify,
)
from mtopd.types import MtopdError
from tests.prompt_examples import EOS, ROUTES, SEP, write_jsonl


def test_prompts_carry_id_route_teacher_and_verifier(tokenizer, sources) -> None:
    held_out = sources["rev"][1]
    prompts = tokenize_prompts(
        held_out, tokenizer, ROUTES, context_length=64, max_response=20, rows=[200, 3]
    )
    assert [prompt.prompt_id for prompt in prompts] == ["rev-eval/200", "rev-eval/3"]
    for prompt, row in zip(prompts, (held_out.rows[200], held_out.rows[3]), strict=True):
        assert prompt.teacher_index == 1
        assert prompt.prompt_ids[-1] == SEP
        assert tokenizer.decode(prompt.prompt_ids[:-1]) == row.question
        assert verify(prompt, row.answer) == 1.0
    with pytest.raises(MtopdError, match="no teacher's route"):
        tokenize_prompts(held_out, tokenizer, ROUTES[:1], context_length=64, max_response=20)


def test_supervised_examples_end_with_eos(tokenizer, sources) -> None:
    train = sources["spir"][0]
    examples = supervised_examples(train, tokenizer, context_length=40, rows=range(300))
    assert {len(example.response_ids) for example in examples} == {8, 18}
    for example, row in zip(examples, train.rows, strict=False):
        assert example.response_ids[-1] == EOS
        assert example.response_ids.count(EOS) == 1
        assert tokenizer.decode(example.response_ids[:-1]) == row.answer


def test_too_long_prompts_and_answers_are_refused_with_both_numbers(
    tokenizer, tmp_path: Path
) -> None:
    source = load_prompt_file(
        "long", write_jsonl(tmp_path / "a.jsonl", {"prompt": "12345", "answer": "123"})
    )
    limits = {"context_length": 16, "max_response": 10}
    assert len(tokenize_prompts(source, tokenizer, [{}], **limits)[0].prompt_ids) == 6
    with pytest.raises(
        MtopdError, match="prompt long/0 has 6 tokens; at least 1 and at most 5 fit"
    ):
        tokenize_prompts(source, tokenizer, [{}], context_length=16, max_response=11)
    assert len(supervised_examples(source, tokenizer, context_length=10)) == 1
    with pytest.raises(
        MtopdError, match="prompt long/0 has 6 tokens; at least 1 and at most 5 fit"
    ):
        supervised_examples(source, tokenizer, context_length=9)


def test_supervised_examples_need_answers(tokenizer, tmp_path: Path) -> None:
    source = load_prompt_file(
        "x", write_jsonl(tmp_path / "a.jsonl", {"prompt": "a", "answer": "b"}, {"prompt": "c"})
    )
    with pytest.raises(MtopdError, match="x/1 has no answer"):
        supervised_examples(source, tokenizer, context_length=9)
    assert len(supervised_examples(source, tokenizer, context_length=9, rows=[0])) == 1


def test_importing_data_imports_neither_torch_nor_reasoning_gym() -> None:
    code = "import sys, mtopd.data; sys.exit(bool({'torch', 'reasoning_gym', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
