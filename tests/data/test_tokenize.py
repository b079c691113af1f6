"""Tokenized prompts and supervised examples."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mtopd.data import (
    Overlong,
    PromptSource,
    load_prompt_file,
    tokenize_answers,
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


def test_a_prompt_without_a_teacher_is_named_by_file_and_line(tokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": "1", "domain": domain} for domain in ("a", "b")]
    path = write_jsonl(tmp_path / "p.jsonl", *rows)
    with pytest.raises(MtopdError) as error:
        tokenize_prompts(
            load_prompt_file("s", path),
            tokenizer,
            {"math": {"domain": "a"}},
            context_length=64,
            max_response=20,
        )
    assert str(error.value).startswith(
        f"prompt s/1 ({path}, line 2): no teacher's route matches a prompt with {{'domain': 'b'}}; "
        "the routes are math: {'domain': 'a'}"
    )


def test_answers_end_with_eos(tokenizer, sources) -> None:
    train = sources["spir"][0]
    answers = tokenize_answers(train, tokenizer, rows=range(300))
    assert {len(answer) for answer in answers.values()} == {8, 18}
    for (prompt_id, answer), (number, row) in zip(
        answers.items(), enumerate(train.rows), strict=False
    ):
        assert prompt_id == f"spir/{number}"
        assert answer[-1] == EOS
        assert answer.count(EOS) == 1
        assert tokenizer.decode(answer[:-1]) == row.answer


def test_prompts_without_room_are_all_named_at_once(tokenizer, tmp_path: Path) -> None:
    texts = ["1", "12345", "12", "123456789", "1234", "12345678"]
    source = load_prompt_file(
        "s", write_jsonl(tmp_path / "a.jsonl", *[{"prompt": t, "answer": "1"} for t in texts])
    )
    limits = {"context_length": 16, "max_response": 11}  # 5 tokens of a prompt, <sep> with them
    with pytest.raises(MtopdError) as error:
        tokenize_prompts(source, tokenizer, {"t": {}}, **limits)
    assert str(error.value) == (
        "3 prompts leave no room for the response: s/1, s/3, s/5; the longest, prompt s/3 "
        f"({tmp_path}/a.jsonl, line 4), needs 21 tokens (10 and 11 of the response), "
        "data.context_length is 16: raise it, lower data.max_response, or leave such prompts out "
        "with data.overlong=drop"
    )
    overlong: list[Overlong] = []
    prompts = tokenize_prompts(source, tokenizer, {"t": {}}, **limits, overlong=overlong)
    assert [p.prompt_id for p in prompts] == ["s/0", "s/2", "s/4"]
    assert [(o.prompt_id, o.prompt_len) for o in overlong] == [("s/1", 6), ("s/3", 10), ("s/5", 9)]
    answers = tokenize_answers(source, tokenizer)
    prompts = tokenize_prompts(source, tokenizer, {"t": {}}, **limits, answers=answers)
    assert len(prompts) == 6, "of an answer to learn only its own tokens need room"


def test_supervised_training_needs_answers(tokenizer, tmp_path: Path) -> None:
    source = load_prompt_file(
        "x", write_jsonl(tmp_path / "a.jsonl", {"prompt": "a", "answer": "b"}, {"prompt": "c"})
    )
    with pytest.raises(MtopdError, match=r"x/1 .*line 2\) has no answer"):
        tokenize_answers(source, tokenizer)
    assert len(tokenize_answers(source, tokenizer, rows=[0])) == 1


PLACES = {"jsonl": "line 3", "json": "item 1", "parquet": "row 1"}


@pytest.mark.parametrize("form", PLACES)
def test_what_is_wrong_with_a_prompt_names_where_it_stands(
    tokenizer, tmp_path: Path, form: str
) -> None:
    path = tmp_path / f"a.{form}"
    place = f"x/1 ({path}, {PLACES[form]})"

    def load(**second: object) -> PromptSource:
        first = {**dict.fromkeys(second), "prompt": "a", "answer": "b"}
        rows = [first, {"prompt": "c", "answer": "d", **second}]
        if form == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        elif form == "json":
            path.write_text(json.dumps(rows))
        else:
            write_jsonl(path, first, "", rows[1])  # a blank line counts as line, not as row
        return load_prompt_file("x", path)

    def prompts(source: PromptSource, *, template: str | None = None, **routes: object) -> None:
        asked = copy.deepcopy(tokenizer)
        asked.chat_template = template or asked.chat_template
        tokenize_prompts(source, asked, routes or {"t": {}}, context_length=30, max_response=8)

    refusing = "{% if messages[0]['content'] == 'c' %}{{ raise_exception('no') }}{% endif %}a"
    for attempt, start in (
        (lambda: prompts(load(), template=refusing), "prompt "),
        (lambda: prompts(load(level="2"), t={"domain": "x"}, u={"level": "2"}), "prompt "),
        (lambda: prompts(load(prompt="c" * 40)), "1 prompt leaves no room .* the longest, prompt "),
        (lambda: tokenize_answers(load(answer=None), tokenizer), "prompt "),
        (lambda: tokenize_answers(load(answer="\u2603"), tokenizer), "answer of prompt "),
    ):
        with pytest.raises(MtopdError, match=f"^{start}{re.escape(place)}"):
            attempt()


def test_importing_data_imports_neither_torch_nor_reasoning_gym() -> None:
    code = "import sys, mtopd.data; sys.exit(bool({'torch', 'reasoning_gym', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
