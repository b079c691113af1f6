"""Prompts from the real reasoning_gym, JSONL and Parquet."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mtopd.data import (
    load_prompt_file,
    load_reasoning_gym,
    verify,
)
from mtopd.types import MtopdError, Prompt
from tests.prompt_examples import write_jsonl


@pytest.mark.parametrize(("domain", "unique"), [("rot", 18_293), ("rev", 11_534), ("spir", 16_222)])
def test_pools_are_those_of_the_calibrated_demo(sources, domain: str, unique: int) -> None:
    train, held_out = sources[domain]
    questions = {row.question for row in train.rows}
    held_out_questions = [row.question for row in held_out.rows]
    assert len(questions) == unique
    assert len(held_out_questions) == len(set(held_out_questions)) == 256
    assert questions.isdisjoint(held_out_questions)
    assert (train.name, held_out.name) == (domain, f"{domain}-eval")
    assert dict(train.rows[0].route) == {"domain": domain}


@pytest.mark.parametrize(
    ("dataset", "options", "sizes", "message"),
    [
        ("spiral_matrx", {}, {}, "no dataset 'spiral_matrx'; near: spiral_matrix"),
        ("spiral_matrix", {"bogus": 1}, {}, "refuses the options .*bogus"),
        ("spiral_matrix", {"min_n": 4, "max_n": 2}, {}, "min_n must be between"),
        (
            "spell_backward",
            {"min_word_len": 3, "max_word_len": 3},
            {"eval_size": 2000},
            "only .* unique prompts",
        ),
        (
            "spiral_matrix",
            {"min_n": 2, "max_n": 2},
            {"size": 4, "seed": 10_000_019},
            "none of 4 prompts",
        ),
    ],
)
def test_impossible_datasets_are_refused(
    dataset: str, options: dict, sizes: dict, message: str
) -> None:
    with pytest.raises(MtopdError, match=message):
        load_reasoning_gym("x", dataset, options, **{"size": 8, "seed": 1, "eval_size": 8, **sizes})


def test_jsonl_and_parquet_give_the_same_rows(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    records = [
        {
            "prompt": chat,
            "answer": " 4\n",
            "domain": "math",
            "effort": "high",
            "level": 3,
            "hard": True,
            "tags": ["x"],
        },
        {
            "prompt": chat[1:],
            "answer": None,
            "domain": None,
            "effort": "low",
            "level": 1,
            "hard": False,
            "tags": [],
        },
    ]
    jsonl = load_prompt_file("mix", write_jsonl(tmp_path / "a.jsonl", records[0], "  ", records[1]))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    parquet = load_prompt_file("mix", tmp_path / "a.parquet")
    assert jsonl == parquet
    assert [dict(m) for m in jsonl.rows[0].messages] == chat
    assert dict(jsonl.rows[0].route) == {
        "domain": "math",
        "effort": "high",
        "level": "3",
        "hard": "true",
    }
    assert jsonl.rows[1].route["domain"] == "mix", "the source's domain where the row has none"
    prompt = Prompt("mix/0", {}, (1,), 0, jsonl.rows[0].verify)
    assert [verify(prompt, text) for text in ("4", " 4 ", "4.0", "")] == [1.0, 1.0, 0.0, 0.0]
    with pytest.raises(MtopdError, match="mix/1 has no verifier"):
        verify(Prompt("mix/1", {}, (1,), 0, jsonl.rows[1].verify), "4")


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (
            [{"prompt": "a"}, {"question": "b"}],
            r"a\.jsonl, line 2: column 'prompt' is missing, found \['question'\]",
        ),
        ([{"prompt": "a"}, "", "{'prompt'"], r"line 3: no valid JSON"),
        ([b"\xff\xfe{}".decode("latin-1")], r"line 1: no valid JSON"),
        (["[1]"], "line 1: found list"),
        ([], r"a\.jsonl has no rows"),
        ([""], r"a\.jsonl has no rows"),
        ([{"prompt": ""}], "line 1: prompt is empty"),
        ([{"prompt": []}], "line 1: prompt is empty"),
        ([{"prompt": 5}], "line 1: prompt must be a string or a list of messages"),
        ([{"prompt": [{"role": "user"}]}], "line 1: prompt is empty"),
        ([{"prompt": [{"content": "x"}]}], "line 1: prompt must be"),
        (
            [{"prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}],
            "line 1: a message's content has a part of type 'image_url'",
        ),
        ([{"prompt": "a", "tools": "search"}], "line 1: tools must be a list of objects"),
        ([{"prompt": [{"role": "assistant", "content": "x"}]}], "ends with an assistant message"),
        ([{"prompt": "a", "answer": ["b"]}], "line 1: answer is list"),
    ],
)
def test_bad_jsonl_is_refused_by_line(tmp_path: Path, records: list, message: str) -> None:
    with pytest.raises(MtopdError, match=message):
        load_prompt_file("x", write_jsonl(tmp_path / "a.jsonl", *records))


def test_bad_parquet_and_paths_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"question": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(
        MtopdError, match=r"a\.parquet, row 0: column 'prompt' is missing, found \['question'\]"
    ):
        load_prompt_file("x", tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(MtopdError, match=r"b\.parquet: no readable Parquet"):
        load_prompt_file("x", tmp_path / "b.parquet")
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "c.parquet")
    with pytest.raises(MtopdError, match=r"c\.parquet has no rows"):
        load_prompt_file("x", tmp_path / "c.parquet")
    with pytest.raises(MtopdError, match=r"d\.jsonl does not exist"):
        load_prompt_file("x", tmp_path / "d.jsonl")
    with pytest.raises(MtopdError, match=r"neither \.jsonl nor \.parquet"):
        load_prompt_file("x", tmp_path / "d.csv")
