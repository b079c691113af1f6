"""Prompts, routing, verifiers and tokenizers, with the real reasoning_gym and real Hugging Face
tokenizers.
"""

import builtins
import json
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mtopd.data import (
    CORRECT_SCORE,
    PromptSource,
    load_prompt_file,
    load_reasoning_gym,
    route,
    supervised_examples,
    tokenize_prompts,
    verify,
)
from mtopd.tokenizer import (
    CHARACTERS,
    build_char_tokenizer,
    encode_prompts,
    encode_response,
    first_difference,
    mine_template_tokens,
    tokenizer_hash,
    vocab_size,
)
from mtopd.types import MtopdError, Prompt

DOMAINS = {
    "rot": ("rotate_matrix", {"min_n": 2, "max_n": 2}),
    "rev": ("spell_backward", {"min_word_len": 3, "max_word_len": 5}),
    "spir": ("spiral_matrix", {"min_n": 2, "max_n": 3}),
}
ROUTES = [{"domain": domain} for domain in DOMAINS]
PAD, EOS, SEP = 0, 1, 2


@pytest.fixture(scope="module")
def sources() -> dict[str, tuple[PromptSource, PromptSource]]:
    return {k: load_reasoning_gym(k, d, o, size=20_000, seed=1) for k, (d, o) in DOMAINS.items()}


@pytest.fixture(scope="module")
def tokenizer_folder(sources, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_char_tokenizer(
        {k: [row.question for row in train.rows] for k, (train, _) in sources.items()}, folder
    )
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(str(tokenizer_folder))


# -- reasoning-gym ---------------------------------------------------------------------------------


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


# -- files -----------------------------------------------------------------------------------------


def write_jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


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
        ([{"prompt": [{"role": "user"}]}], "line 1: prompt must be"),
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


# -- routing ---------------------------------------------------------------------------------------


def test_route_takes_the_most_specific_match() -> None:
    routes = [
        {},
        {"domain": "math"},
        {"domain": "math", "effort": "high"},
        {"effort": "high", "lang": "de"},
    ]
    assert route({"domain": "code"}, routes) == 0
    assert route({"domain": "math", "effort": "low"}, routes) == 1
    assert route({"domain": "math", "effort": "high"}, routes) == 2
    assert route({"domain": "code", "effort": "high", "lang": "de"}, routes) == 3


def test_routing_errors_show_fields_and_routes() -> None:
    routes = [{"domain": "math"}, {"effort": "high"}]
    with pytest.raises(
        MtopdError, match=r"no teacher's route .*'code'.* 0: .*'math'.*; 1: .*'high'"
    ):
        route({"domain": "code"}, routes)
    with pytest.raises(
        MtopdError, match=r"teachers \[0, 1\] match .*'effort': 'high'.*more specific"
    ):
        route({"domain": "math", "effort": "high"}, routes)


# -- tokenizer -------------------------------------------------------------------------------------


def test_demo_vocabulary_is_the_calibrated_one(tokenizer, sources) -> None:
    assert vocab_size(tokenizer) == 104
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.sep_token_id) == (
        PAD,
        EOS,
        SEP,
    )
    templates = mine_template_tokens(
        {k: [r.question for r in s.rows] for k, (s, _) in sources.items()}
    )
    assert len(templates) == 5
    assert [tokenizer.convert_ids_to_tokens(99 + k) for k in range(5)] == templates
    for domain, longest in {"rot": 15, "rev": 7, "spir": 20}.items():
        train, _ = sources[domain]
        prompts = tokenize_prompts(
            train, tokenizer, ROUTES, context_length=40, max_response=18, rows=range(2000)
        )
        assert max(len(prompt.prompt_ids) for prompt in prompts) == longest


def test_folder_is_an_ordinary_tokenizer(tokenizer_folder: Path) -> None:
    config = json.loads((tokenizer_folder / "tokenizer_config.json").read_text())
    assert "auto_map" not in config
    assert not list(tokenizer_folder.glob("*.py"))


def test_decoding_gives_the_exact_text(tokenizer, sources) -> None:
    texts = [
        "".join(CHARACTERS),
        "  two  spaces \n\n , . 's 'm n't ?  !",
        " degrees  degreesclockwise:\n\n",
    ]
    texts += [row.question for train, _ in sources.values() for row in train.rows[:50]]
    for text in texts:
        for ids in (tokenizer(text)["input_ids"], encode_response(tokenizer, text)):
            assert tokenizer.decode(ids) == text
            assert tokenizer.decode([*ids, EOS], skip_special_tokens=True) == text


def test_responses_do_not_use_template_tokens(tokenizer) -> None:
    text = "90 degrees clockwise:\n"
    assert len(tokenizer(text)["input_ids"]) == 4
    assert encode_response(tokenizer, text) == [tokenizer.convert_tokens_to_ids(c) for c in text]
    assert max(encode_response(tokenizer, text)) < 99


def test_longest_template_wins(tmp_path: Path) -> None:
    prompts = {"a": ["count to 1", "count to 2"], "b": ["count to the end 1", "count to the end 2"]}
    tokenizer = build_char_tokenizer(prompts, tmp_path)
    assert tokenizer.tokenize("count to the end 7count to 7") == [
        "count to the end ",
        "7",
        "count to ",
        "7",
    ]


def test_prompts_go_through_the_chat_template(tokenizer) -> None:
    (ids,) = encode_prompts(tokenizer, [[{"role": "user", "content": "hi"}]])
    assert ids == [*encode_response(tokenizer, "hi"), SEP]
    conversation = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "x"},
    ]
    (ids,) = encode_prompts(tokenizer, [conversation])
    assert tokenizer.decode(ids) == "hi<sep>yo<eos>x<sep>"
    assert encode_prompts(tokenizer, []) == []


def test_unknown_character_is_refused_by_name(tokenizer) -> None:
    with pytest.raises(MtopdError, match=r"U\+2192"):
        encode_prompts(
            tokenizer,
            [[{"role": "user", "content": "fine"}], [{"role": "user", "content": "a \u2192 b"}]],
        )
    with pytest.raises(MtopdError, match=r"U\+00E9"):
        encode_response(tokenizer, "caf\u00e9")
    with pytest.raises(MtopdError, match="domain 'a' has no prompts"):
        mine_template_tokens({"a": []})


def test_hash_and_difference_go_by_token_not_by_size(
    tokenizer, tokenizer_folder: Path, tmp_path: Path
) -> None:
    again = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    assert tokenizer_hash(tokenizer) == tokenizer_hash(again)
    assert first_difference(tokenizer, again) is None
    backend = json.loads(again.backend_tokenizer.to_str())
    vocabulary = backend["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    swapped = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        pad_token="<pad>",
        eos_token="<eos>",
        sep_token="<sep>",
    )
    assert vocab_size(swapped) == vocab_size(tokenizer)
    assert tokenizer_hash(swapped) != tokenizer_hash(tokenizer)
    assert first_difference(tokenizer, swapped) == "token id 36 is 'A' in one and 'B' in the other"
    again.add_tokens(["new"])
    assert vocab_size(again) == 105
    assert (
        first_difference(tokenizer, again)
        == "token id 104 is no token in one and 'new' in the other"
    )
    other_eos = AutoTokenizer.from_pretrained(str(tokenizer_folder), eos_token="<sep>")
    assert tokenizer_hash(other_eos) != tokenizer_hash(tokenizer)
    assert first_difference(tokenizer, other_eos) == "eos_token_id is 1 in one and 2 in the other"


@pytest.fixture(scope="module")
def foreign_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with merges and a chat template, as released models have."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        token: k for k, token in enumerate([*alphabet, "an", "<|end|>", "<|user|>", "<|bot|>"])
    }
    backend = Tokenizer(models.BPE(vocabulary, [("a", "n")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|bot|>"],
        chat_template="{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|bot|>{% endif %}",
    )


def test_any_chat_tokenizer_works_the_same_way(foreign_tokenizer, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"prompt": "an \u2192", "answer": "anna"})
    source = load_prompt_file("x", path)
    (prompt,) = tokenize_prompts(source, foreign_tokenizer, [{}], context_length=32, max_response=8)
    assert foreign_tokenizer.decode(prompt.prompt_ids) == "<|user|>an \u2192<|end|><|bot|>"
    (example,) = supervised_examples(source, foreign_tokenizer, context_length=32)
    assert example.prompt_ids == prompt.prompt_ids
    assert foreign_tokenizer.convert_ids_to_tokens(list(example.response_ids)) == [
        "an",
        "n",
        "a",
        "<|end|>",
    ]


def test_tokenizer_without_chat_template_or_eos_is_refused(tokenizer_folder: Path, sources) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_folder / "tokenizer.json"))
    with pytest.raises(MtopdError, match="no chat template"):
        encode_prompts(bare, [[{"role": "user", "content": "a"}]])
    with pytest.raises(MtopdError, match="no EOS token"):
        supervised_examples(sources["rot"][0], bare, context_length=64)


def test_a_part_the_tokenizer_maps_to_unknown_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "known": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    lossy = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", chat_template="{{ messages[0]['content'] }}"
    )
    assert encode_prompts(lossy, [[{"role": "user", "content": "known"}]]) == [[1]]
    with pytest.raises(MtopdError, match="does not know a part"):
        encode_prompts(lossy, [[{"role": "user", "content": "known news"}]])


# -- tokenized prompts and examples ----------------------------------------------------------------


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
