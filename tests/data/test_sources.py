"""Prompts from the real reasoning_gym, JSON and Parquet."""

from __future__ import annotations

import datetime
import gzip
import json
import time
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mtopd.data import (
    Asking,
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
        ([{"prompt": None}], r"line 1: column 'prompt' is null, found \['prompt'\]"),
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
        (
            [{"prompt": [{"role": "user", "content": [{"type": "image", "text": "a cat"}]}]}],
            "line 1: a message's content has a part of type 'image'",
        ),
        (
            [{"prompt": [{"role": "user", "content": {"type": "text", "text": "a"}}]}],
            "line 1: a message's content is dict; it must be a string, or a list of parts",
        ),
        (
            [{"prompt": "a"}, {"messages": '[{"role": "user", "content": "a"}]'}],
            "line 2: the prompt is a list of messages written as text; store the list itself",
        ),
        (
            [
                {
                    "prompt": " [{'role': 'user', 'content': \"it's\"}\n {'content': 'b', 'role': 'user'}]"
                }
            ],
            "line 1: the prompt is a list of messages written as text",
        ),
        (
            [{"prompt": json.dumps([{"role": "user", "content": "a"}], indent=1)}],
            "line 1: the prompt is a list of messages written as text",
        ),
        ([{"messages": [{"from": "human", "value": "a"}]}], "found one with 'from', 'value'"),
        ([{"prompt": ["a", "b"]}], "line 1: prompt must be .*, found str"),
        ([{"prompt": {"role": "user", "content": "a"}}], "line 1: prompt must be .*, found one"),
        ([{"prompt": "a", "system": "Be brief."}], "line 1: column 'system' would be lost"),
        ([{"prompt": "a", "images": ["a.png"]}], "line 1: column 'images' .* only text is trained"),
        ([{"prompt": "a"}, {"prompt": "a", "image": "a.png"}], "line 2: column 'image'"),
        ([{"prompt": "a", "functions": [{"name": "f"}]}], "'functions' .* call the column tools"),
        ([{"prompt": "a", "chat_template_kwargs": {"x": 1}}], "set it in the chat template"),
        ([{"prompt": "a", "tools": "search"}], "line 1: tools: no valid JSON"),
        ([{"prompt": "a", "tools": {"a": 1}}], "line 1: tools must be a list of objects"),
        ([{"prompt": [{"role": "assistant", "content": "x"}]}], "ends with an assistant message"),
        ([{"prompt": "a", "answer": ["b"]}], "line 1: answer is list"),
    ],
)
def test_bad_jsonl_is_refused_by_line(tmp_path: Path, records: list, message: str) -> None:
    with pytest.raises(MtopdError, match=message):
        load_prompt_file("x", write_jsonl(tmp_path / "a.jsonl", *records))


def test_text_that_only_begins_like_messages_is_a_prompt(tmp_path: Path) -> None:
    texts = ['[{"role": "user"}] is what?', '[{"role": "user"}]', '[{"a": 1}, 2]', '[{"a": 1']
    path = write_jsonl(tmp_path / "a.jsonl", *({"prompt": text} for text in texts))
    assert [row.question for row in load_prompt_file("x", path).rows] == texts


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
    with pytest.raises(MtopdError, match=r"d\.csv is none of \.jsonl, "):
        load_prompt_file("x", tmp_path / "d.csv")


ROWS = [{"prompt": f"{number} + 1?", "answer": number + 1} for number in range(300)]


def lines(rows: list) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    crlf = b"\xef\xbb\xbf" + lines(ROWS).replace(b"\n", b"\r\n")
    files = {
        "a.jsonl": lines(ROWS),
        "bom.jsonl": crlf,
        "a.jsonl.gz": gzip.compress(lines(ROWS[:100])) + gzip.compress(lines(ROWS[100:])),
        "a.jsonl.zst": zstd(lines(ROWS[:100])) + zstd(lines(ROWS[100:])),
        "a.json": b"\n " + json.dumps(ROWS, indent=1).encode(),
        "lines.json": lines(ROWS),
        "A.JSONL": lines(ROWS),
    }
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    wanted = load_prompt_file("x", tmp_path / "a.parquet")
    assert wanted.rows[41].answer == "42"
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        assert load_prompt_file("x", tmp_path / name) == wanted, name


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid", "git-lfs pointer"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\xe9"}\n', "line 2: byte 12 is not UTF-8"),
        ("a.jsonl", '{"prompt": "a"}\n'.encode("utf-16"), "line 1: byte 0 is not UTF-8"),
        ("a.jsonl", b'{"prompt": "a", "prompt": "b"}', "line 1: .*'prompt' stands twice"),
        ("a.jsonl", b'{"prompt": [{"role": "user", "role": "system"}]}', "'role' stands twice"),
        ("a.jsonl", b'{"prompt": "a", "level": -Infinity}', "line 1: .*-Infinity is no JSON"),
        ("a.jsonl", b'{"prompt": "a", "level": 1e999}', "line 1: .*1e999 is larger than"),
        ("a.jsonl", b'{"prompt": "a", "tools": [{"max": -1e999}]}', "line 1: .*-1e999 is larger"),
        ("a.jsonl", b'{"prompt": "a", "level": ' + b"9" * 5000 + b"}", "line 1: no valid JSON"),
        ("a.jsonl", b'{"prompt": "a \\ud83d"}', r"line 1: .*ud83d is half a character"),
        ("a.jsonl", b'{"prompt": "a", "domain": "\\udc00"}', "line 1: .*udc00 is half"),
        ("a.jsonl", b'{"prompt": "a", "x": ' + b"[" * 5000, "line 1: .* nested too deeply"),
        ("a.json", b"[" * 5000, r"a\.json: .* nested too deeply"),
        ("a.json", b'[{"prompt": "a"}, 3]', "item 1: found int"),
        ("a.json", b'[{"prompt": "a"}, {"prompt": " "}]', "item 1: prompt is empty"),
        ("a.json", b"[]", "has no rows"),
        ("a.json", b"", "has no rows"),
        ("a.json", b'{"data": [{"prompt": "a"}]}', r"'prompt' is missing, found \['data'\]"),
        ("a.jsonl.gz", gzip.compress(lines(ROWS))[:-9], r"after line \d+: cannot be read on"),
        ("a.jsonl.zst", zstd(lines(ROWS))[:-9], r"after line \d+: cannot be read on"),
        ("a.jsonl.gz", lines(ROWS), "after line 0: cannot be read on"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "' + b" " * (65 << 20)), "line 1 is longer than"),
        ("a.json.gz", gzip.compress(b"[]"), r"is none of \.jsonl"),
        ("a.jsonl", gzip.compress(lines(ROWS)), r"is gzip by its first bytes; name it \.jsonl\.gz"),
        ("a.json", zstd(lines(ROWS)), r"is Zstandard by its first bytes; name it \.jsonl\.zst"),
        ("a.jsonl", b"PAR1...", r"is Parquet by its first bytes; name it \.parquet"),
    ],
)  # fmt: skip
def test_damaged_and_doubtful_files_are_refused_in_one_line(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(MtopdError, match=message) as refused:
        load_prompt_file("x", tmp_path / name)
    assert name in str(refused.value)


def test_columns_that_belong_to_a_prompt_elsewhere_may_be_empty(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "images": [], "system": "", "history": None, "documents": {}}]
    (plain,) = load_prompt_file("x", write_jsonl(tmp_path / "a.jsonl", *rows)).rows
    assert plain.route == {"domain": "x", "system": ""}
    kind = pa.list_(pa.struct([("bytes", pa.binary())]))
    for images, is_lost in (([], False), (None, False), ([{"bytes": b"x"}], True)):
        table = pa.table({"prompt": ["a"], "images": pa.array([images], kind)})
        pq.write_table(table, tmp_path / "a.parquet")
        if is_lost:
            with pytest.raises(MtopdError, match=r"row 0: column 'images' would be lost"):
                load_prompt_file("x", tmp_path / "a.parquet")
        else:
            assert load_prompt_file("x", tmp_path / "a.parquet").rows[0].route == {"domain": "x"}


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("0.00001", "0.00001"),
        ("-2.5e-7", "-0.00000025"),
        ("-0.0", "0"),
        ("2.50", "2.5"),
        ("1e20", "100000000000000000000"),
        ("1e23", "1e+23"),
        ("3.14159265358979323846", "3.14159265358979323846"),
        ("12345678901234567.89", "12345678901234567.89"),
        ("0.10000000000000001", "0.1"),  # 17 digits, as printf's %.17g shows a float
    ],
)
def test_numbers_of_json_become_the_text_that_people_write(
    tmp_path: Path, written: str, text: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"prompt": "a", "answer": {written}, "level": {written}}}')
    (row,) = load_prompt_file("x", path).rows
    assert (row.answer, row.route["level"]) == (text, text)
    path.write_text(f'{{"prompt": "a", "tools": [{{"maximum": {written}}}]}}')
    (row,) = load_prompt_file("x", path).rows
    assert json.dumps(row.tools) == f'[{{"maximum": {float(written)!r}}}]', "a template's number"


def test_floats_inside_structs_have_their_shortest_digits_too(tmp_path: Path) -> None:
    kind = pa.struct([("ground_truth", pa.float32())])
    calls = pa.list_(pa.struct([("name", pa.string()), ("at", pa.map_(pa.string(), pa.float16()))]))
    message = pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", calls)])
    chat = [
        {"role": "user", "content": "q", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "at": [("x", 0.1)]}]},
        {"role": "tool", "content": "7", "tool_calls": None},
    ]
    columns = {
        "prompt": pa.array([chat], pa.list_(message)),
        "reward_model": pa.array([{"ground_truth": 0.1}], kind),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    (row,) = load_prompt_file("x", tmp_path / "a.parquet").rows
    assert row.answer == "0.1"
    assert row.messages[1]["tool_calls"] == [{"name": "f", "at": {"x": 0.1}}]


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(MtopdError, match=r"a\.jsonl is a folder"):
        load_prompt_file("x", tmp_path / "a.jsonl")


def test_rows_as_verl_writes_them(tmp_path: Path) -> None:
    user = [{"role": "user", "content": "6*7?"}]
    row = {
        "data_source": "gsm8k",
        "prompt": user,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "42"},
        "extra_info": {"split": "train", "index": 0},
    }
    said: list[str] = []
    for name in ("a.parquet", "a.jsonl"):
        if name == "a.parquet":
            pq.write_table(pa.Table.from_pylist([row]), tmp_path / name)
        else:
            (tmp_path / name).write_bytes(lines([row]))
        (found,) = load_prompt_file("x", tmp_path / name, say=said.append).rows
        assert [dict(m) for m in found.messages] == user
        assert (found.answer, found.verify["answer"]) == ("42", "42")
        assert found.route == {"domain": "x", "data_source": "gsm8k", "ability": "math"}
    assert said == [
        f"source 'x': columns of {name} that are not used: reward_model.style, extra_info"
        for name in ("a.parquet", "a.jsonl")
    ]


def test_other_names_of_columns(tmp_path: Path) -> None:
    def load(**row: object):
        return load_prompt_file("x", write_jsonl(tmp_path / "a.jsonl", row)).rows[0]

    chat = [{"role": "user", "content": "a"}]
    assert load(messages=chat) == load(prompt=chat) == load(prompt="a", messages=None)
    with pytest.raises(MtopdError, match="line 1: both prompt and messages are given"):
        load(prompt="a", messages=chat)
    with pytest.raises(MtopdError, match="give the last answer as column 'answer'"):
        load(messages=[*chat, {"role": "assistant", "content": "b"}])
    same = load(prompt="a", answer=4.0, reward_model={"ground_truth": "4"})
    assert same.answer == "4"
    with pytest.raises(MtopdError, match=r"answer and reward_model\.ground_truth differ"):
        load(prompt="a", answer=5, reward_model={"ground_truth": "4"})
    with pytest.raises(MtopdError, match=r"reward_model\.ground_truth is list"):
        load(prompt="a", reward_model={"ground_truth": ["4"]})
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert load(prompt="a", tools=json.dumps(tools)).tools == load(prompt="a", tools=tools).tools
    assert load(prompt="a", tools="[]").tools is None


def test_every_way_in_which_parquet_holds_messages(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    message = pa.struct([("role", pa.string()), ("content", pa.large_string())])
    for kind in (
        pa.list_(message),
        pa.large_list(message),
        pa.list_(message, 2),
        pa.list_(pa.map_(pa.string(), pa.string())),
    ):
        rows = [[list(m.items()) for m in chat]] if "map" in str(kind) else [chat]
        pq.write_table(pa.table({"prompt": pa.array(rows, kind)}), tmp_path / "a.parquet")
        (row,) = load_prompt_file("x", tmp_path / "a.parquet").rows
        assert [dict(m) for m in row.messages] == chat, kind
    names = pa.array(["hard", None, "hard"]).dictionary_encode()
    table = pa.table({"prompt": ["a", "b", "c"], "level": names, "raw": [b"1", b"2", None]})
    pq.write_table(table, tmp_path / "b.parquet")
    said: list[str] = []
    found = load_prompt_file("x", tmp_path / "b.parquet", say=said.append)
    assert [row.route.get("level") for row in found.rows] == ["hard", None, "hard"]
    assert said == ["source 'x': columns of b.parquet that are not used: raw"]


def test_parquet_fills_structs_with_null_and_they_are_emptied_again(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 3}}}
    other = {"type": "function", "function": {"name": "neg", "arguments": {"b": 4}}}
    history = [
        {"role": "user", "content": "3?"},
        {"role": "assistant", "content": None, "tool_calls": [call, other]},
        {"role": "tool", "content": "7", "tool_call_id": "1"},
    ]
    properties = {"content": {"type": "string"}}
    tools = [
        {"type": "function", "function": {"name": "add", "parameters": {"properties": properties}}},
        {"type": "function", "function": {"name": "now"}},
    ]
    pq.write_table(
        pa.Table.from_pylist([{"prompt": history, "tools": tools}]), tmp_path / "a.parquet"
    )
    (row,) = load_prompt_file("x", tmp_path / "a.parquet").rows
    assert list(row.messages) == history
    assert list(row.tools) == tools


def test_numbers_are_the_same_text_from_every_column(tmp_path: Path) -> None:
    table = pa.table(
        {
            "prompt": ["a", "b"],
            "answer": pa.array([72.0, float("nan")]),
            "level": pa.array([3.0, None]),
            "share": pa.array([0.1, 1e-7], pa.float32()),
            "half": pa.array(np.array([0.5, 2.0], np.float16)),
            "price": pa.array([Decimal("3.00"), Decimal("12.50")], pa.decimal128(9, 2)),
            "big": pa.array([2**62, -(2**62)]),
            "large": pa.array([1e16, -0.0]),
            "hard": [True, False],
            "when": pa.array([datetime.date(2026, 1, 1)] * 2),
            "then": pa.array([2**62, 1], pa.timestamp("ns")),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    said: list[str] = []
    first, second = load_prompt_file("x", tmp_path / "a.parquet", say=said.append).rows
    assert (first.answer, second.answer, second.verify) == ("72", None, {})
    assert first.route == {
        "domain": "x",
        "level": "3",
        "share": "0.1",
        "half": "0.5",
        "price": "3",
        "big": str(2**62),
        "large": "10000000000000000",
        "hard": "true",
    }
    assert "level" not in second.route
    assert [second.route[k] for k in ("share", "half", "price", "large", "hard")] == [
        "0.0000001", "2", "12.5", "0", "false",
    ]  # fmt: skip
    assert said == ["source 'x': columns of a.parquet that are not used: when, then"]
    nan = write_jsonl(tmp_path / "a.jsonl", '{"prompt": "a", "answer": NaN, "level": 3.0}')
    (row,) = load_prompt_file("x", nan).rows
    assert (row.answer, row.route["level"]) == (None, "3")


def test_narrow_floats_have_their_own_shortest_digits_and_whole_numbers_all_of_theirs(
    tmp_path: Path,
) -> None:
    table = pa.table(
        {
            "prompt": ["a", "b"],
            "half": pa.array(np.array([0.1, 65504], np.float16)),
            "single": pa.array(np.array([0.1, 123456792], np.float32)),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    first, second = load_prompt_file("x", tmp_path / "a.parquet").rows
    assert dict(first.route) == {"domain": "x", "half": "0.1", "single": "0.1"}
    assert dict(second.route) == {"domain": "x", "half": "65504", "single": "123456792"}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table([["a"], ["b"]], names=["prompt", "prompt"]), "column 'prompt' stands twice"),
        (pa.table({"prompt": ["a"], "answer": [b"x"]}), "row 0: answer is bytes"),
        (pa.table({"prompt": ["a"], "level": [float("inf")]}), "row 0: column 'level' is inf"),
    ],
)
def test_bad_parquet_is_refused_by_column(tmp_path: Path, table: pa.Table, message: str) -> None:
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(MtopdError, match=message):
        load_prompt_file("x", tmp_path / "a.parquet")


def test_folders_named_like_partitions_add_no_columns(tmp_path: Path) -> None:
    folder = tmp_path / "level=3"
    folder.mkdir()
    pq.write_table(pa.table({"prompt": ["a"]}), folder / "a.parquet")
    assert load_prompt_file("x", folder / "a.parquet").rows[0].route == {"domain": "x"}


def test_system_and_examples_stand_in_front(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    asking = Asking(system="Be brief.", examples=(("2+2?", "4"),))
    path = write_jsonl(tmp_path / "a.jsonl", {"prompt": [*chat, {"role": "user", "content": "3"}]})
    (row,) = load_prompt_file("x", path, asking=asking).rows
    said = [(m["role"], m["content"]) for m in row.messages]
    assert said == [
        ("system", "Be brief."),
        ("user", "2+2?"),
        ("assistant", "4"),
        ("user", "1"),
        ("assistant", "2"),
        ("user", "3"),
    ]
    own = {"prompt": [{"role": "system", "content": "own"}, {"role": "user", "content": "3"}]}
    path = write_jsonl(tmp_path / "a.jsonl", own)
    (row,) = load_prompt_file("x", path, asking=Asking(examples=asking.examples)).rows
    assert [m["role"] for m in row.messages] == ["system", "user", "assistant", "user"]
    with pytest.raises(MtopdError, match=r"line 1: .* system message of its own"):
        load_prompt_file("x", path, asking=asking)


def test_drawn_examples_are_neither_trained_nor_held_out() -> None:
    options = {"min_word_len": 3, "max_word_len": 3}
    sizes = {"size": 400, "seed": 1, "eval_size": 16}
    plain = load_reasoning_gym("x", "spell_backward", options, **sizes)
    train, held_out = load_reasoning_gym(
        "x", "spell_backward", options, **sizes, num_examples=8, asking=Asking(system="s")
    )
    shown = {m["content"] for m in train.rows[0].messages if m["role"] == "user"}
    shown.remove(train.rows[0].question)
    assert len(shown) == 8
    assert [len(row.messages) for row in (train.rows[0], held_out.rows[0])] == [18, 18]
    questions = [{row.question for row in source.rows} for source in (train, held_out)]
    assert shown.isdisjoint(questions[0] | questions[1])
    assert [row.question for row in held_out.rows] == [row.question for row in plain[1].rows]
    assert questions[0] == {row.question for row in plain[0].rows} - shown
    with pytest.raises(MtopdError, match="beside the held-out ones, num_examples is 5000"):
        load_reasoning_gym("x", "spell_backward", options, **sizes, num_examples=5000)


def test_held_out_rows_need_an_answer_that_can_be_found(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "a.jsonl", {"prompt": "a", "answer": "four"}, {"prompt": "b", "answer": " "}
    )
    assert [row.answer for row in load_prompt_file("x", path).rows] == ["four", None]
    with pytest.raises(MtopdError, match="line 2: a held-out prompt has no answer"):
        load_prompt_file("x", path, held_out=True)
    with pytest.raises(MtopdError, match="line 1: the answer 'four' holds no number"):
        load_prompt_file("x", path, held_out=True, asking=Asking(answer_from="last_number"))
    with pytest.raises(MtopdError, match=r"prompt x-eval/0: answer_from last_number takes '\d+'"):
        load_reasoning_gym(
            "x", "rotate_matrix", {}, size=4, seed=1, eval_size=2,
            asking=Asking(answer_from="last_number"),
        )  # fmt: skip


def test_many_rows_are_read_in_little_time(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS * 100))
    started = time.process_time()
    assert len(load_prompt_file("x", tmp_path / "a.jsonl").rows) == 30_000
    assert time.process_time() - started < 6, "0.7 s when this was written"
