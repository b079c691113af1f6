"""Tokenizers: the demo's own, and any chat tokenizer of Hugging Face."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mtopd.char_tokenizer import CHARACTERS, build_char_tokenizer, mine_template_tokens
from mtopd.data import (
    load_prompt_file,
    tokenize_answers,
    tokenize_prompts,
)
from mtopd.tokenizer import (
    encode_prompts,
    encode_reply,
    encode_response,
    first_difference,
    load_tokenizer,
    tokenizer_hash,
    vocab_size,
)
from mtopd.tokenizer_files import errors_named
from mtopd.types import MtopdError
from tests.prompt_examples import EOS, PAD, ROUTES, SEP, write_jsonl


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


def test_a_tokenizer_without_its_pre_tokenizer_is_refused_in_one_line(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    """It loads, and only the first text shows that it cannot encode any."""
    shutil.copytree(tokenizer_folder, tmp_path / "t")
    path = tmp_path / "t" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pre_tokenizer": None}))
    with pytest.raises(MtopdError, match="no readable tokenizer"):
        encode_prompts(load_tokenizer(tmp_path / "t"), [[{"role": "user", "content": "hello"}]])


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
    assert first_difference(again, tokenizer, below=104) is None
    assert (
        first_difference(tokenizer, again)
        == "token id 104 is no token in one and 'new' in the other"
    )
    other_end = AutoTokenizer.from_pretrained(
        str(tokenizer_folder), eos_token="<sep>", pad_token="<eos>", unk_token="<pad>"
    )
    assert tokenizer_hash(other_end) == tokenizer_hash(tokenizer), "the loss meets no such name"
    assert first_difference(tokenizer, other_end) is None


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
    (prompt,) = tokenize_prompts(
        source, foreign_tokenizer, {"t": {}}, context_length=32, max_response=8
    )
    assert foreign_tokenizer.decode(prompt.prompt_ids) == "<|user|>an \u2192<|end|><|bot|>"
    (answer,) = tokenize_answers(source, foreign_tokenizer).values()
    assert foreign_tokenizer.convert_ids_to_tokens(list(answer)) == [
        "an",
        "n",
        "a",
        "<|end|>",
    ]


def test_messages_and_tools_reach_the_template_whole(
    foreign_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    foreign = copy.deepcopy(foreign_tokenizer)
    foreign.chat_template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|{{ m['role'] }}|>"
        "{% if m['content'] %}{{ m['content'][0]['text'] }}{% endif %}{{ m['name'] }}"
        "{{ m['tool_calls'] }}{{ m['tool_call_id'] }}{% endfor %}"
    )
    call = {"function": {"name": "add", "arguments": {"a": 3, "b": [4]}}}
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "3+4?"}], "name": "eve"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": [{"type": "text", "text": "7"}], "tool_call_id": "c1"},
    ]
    offered = [{"type": "function", "function": {"name": "add"}}]
    rows = [{"prompt": chat, "tools": offered}, {"prompt": chat}]
    source = load_prompt_file("x", write_jsonl(tmp_path / "a.jsonl", *rows))
    prompts = tokenize_prompts(source, foreign, {"t": {}}, context_length=512, max_response=8)
    wanted = [
        foreign.apply_chat_template(chat, tools=tools, add_generation_prompt=True)["input_ids"]
        for tools in (offered, None)
    ]
    assert [list(prompt.prompt_ids) for prompt in prompts] == wanted
    assert wanted[0] != wanted[1]


REASONING = (  # writes the last answer whole, leaves the reasoning of earlier ones out
    "{% if tools %}{{ tools | tojson }}<|end|>{% endif %}{% for m in messages %}<|{{ m['role'] }}|>\n"
    "{% if loop.last or m['role'] != 'assistant' %}{{ m['content'] }}{% else %}"
    "{{ m['content'].split('</think>')[-1] }}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|bot|>{% endif %}"
)


def test_a_reply_is_what_the_template_writes_behind_the_turn(
    foreign_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Also where the template would not write the turn as it was sampled."""
    foreign = copy.deepcopy(foreign_tokenizer)
    foreign.chat_template = REASONING
    end, user = foreign.convert_tokens_to_ids(["<|end|>", "<|user|>"])
    chat = [{"role": "user", "content": "an"}]
    reply = [{"role": "tool", "content": "na"}, {"role": "user", "content": "and?"}]
    offered = [{"type": "function", "function": {"name": "add"}}]
    behind_end = "\n<|tool|>\nna<|end|>\n<|user|>\nand?<|end|>\n<|bot|>"
    ids = encode_reply(foreign, chat, reply, offered, last_id=end)
    assert foreign.decode(ids) == behind_end
    # What the template writes with a turn that it leaves as it is, and not a token of it.
    said = {"role": "assistant", "content": "anna"}
    (prompt,) = encode_prompts(foreign, [chat])
    (whole,) = encode_prompts(foreign, [[*chat, said, *reply]])
    sampled = encode_response(foreign, "anna")
    head = [foreign.convert_tokens_to_ids("<|bot|>")]
    assert prompt[-1:] == head
    assert whole[-len(ids) :] == encode_reply(foreign, chat, reply, last_id=end) == ids
    assert whole[-len(ids) - 1 - len(sampled) : -len(ids)] == [*sampled, end]
    # A turn that ended otherwise: the template's own end stands behind it.
    for last_id in (user, sampled[-1], None):
        other = encode_reply(foreign, chat, reply, last_id=last_id)
        assert foreign.decode(other) == "<|end|>" + behind_end
    # What the student said before does not matter: it stands as it was sampled.
    thought = {"role": "assistant", "content": "<think>na</think>an"}
    later = encode_reply(foreign, [*chat, thought, *reply], reply, last_id=end)
    assert later == ids


def test_a_reply_that_the_template_does_not_take_is_refused(
    foreign_tokenizer: PreTrainedTokenizerFast,
) -> None:
    chat, reply = [{"role": "user", "content": "an"}], [{"role": "tool", "content": "na"}]
    for template, said in [
        (
            "{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}",
            "nothing of its tool",
        ),
        (
            "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
            "an assistant's turn as it st",
        ),
        (
            "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
            "an assistant's turn as",
        ),
        ("{% for m in messages %}{{ raise_exception('no ' + m.role) }}{% endfor %}", "no user"),
    ]:
        foreign = copy.deepcopy(foreign_tokenizer)
        foreign.chat_template = template
        with pytest.raises(MtopdError, match=f"^its messages: .*{said}"):
            encode_reply(foreign, chat, reply, last_id=None, where="its messages")


def test_what_a_template_raises_is_one_line_that_names_row_and_file(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(tokenizer_folder, tmp_path / "t")
    file = tmp_path / "t" / "chat_template.jinja"
    for template, said in [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ messages[0]['content'].__class__.__mro__ }}", "SecurityError"),
        ("{{ messages[7]['content'] }}", "UndefinedError"),
    ]:
        file.write_text(template)
        tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "t"))
        with pytest.raises(MtopdError, match=rf"^prompt a/3: .*chat_template.jinja .*{said}") as e:
            encode_prompts(tokenizer, [[{"role": "user", "content": "a"}]], where=["prompt a/3"])
        assert "\n" not in str(e.value)


def test_tokenizer_without_chat_template_or_eos_is_refused(tokenizer_folder: Path, sources) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_folder / "tokenizer.json"))
    with pytest.raises(MtopdError, match="no chat template"):
        encode_prompts(bare, [[{"role": "user", "content": "a"}]])
    with pytest.raises(MtopdError, match="no EOS token"):
        tokenize_answers(sources["rot"][0], bare)


def test_a_part_the_tokenizer_maps_to_unknown_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "known": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    lossy = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", chat_template="{{ messages[0]['content'] }}"
    )
    assert encode_prompts(lossy, [[{"role": "user", "content": "known"}]]) == [[1]]
    with pytest.raises(MtopdError, match="does not know 'news'"):
        encode_prompts(lossy, [[{"role": "user", "content": "known news"}]])


def test_a_token_that_the_template_writes_is_not_unknown(foreign_tokenizer) -> None:
    """GPT-2, OPT and SmolLM: one token begins, ends and is the unknown one."""
    one = copy.deepcopy(foreign_tokenizer)
    one.unk_token = "<|end|>"
    turns = [{"role": role, "content": "a"} for role in ("user", "bot", "user")]
    (ids,) = encode_prompts(one, [turns])
    assert ids.count(one.eos_token_id) == 3


def spoil_json(path: Path, **values: object) -> None:
    table = json.loads(path.read_text()) | values
    path.write_text(json.dumps(table))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 11422654\n"
DEEP = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("tokenizer.json", None, r"has no tokenizer \(no tokenizer.json"),
        ("tokenizer.json", POINTER, "tokenizer.json is a git-lfs pointer, not the file"),
        ("tokenizer.json", "", "tokenizer.json is empty"),
        (
            "tokenizer.json",
            '{"model": {"vocab": {"a"',
            "tokenizer.json: no readable tokenizer .JSONDecode",
        ),
        ("tokenizer.json", DEEP, "tokenizer.json: no readable tokenizer .RecursionError"),
        ("tokenizer.json", "[1, 2]", "tokenizer.json holds a list, no JSON object"),
        ("tokenizer.json", '{"model": {"type": "BPE"}}', "no readable tokenizer"),
        ("tokenizer_config.json", "", "tokenizer_config.json is empty"),
        ("tokenizer_config.json", "5", "tokenizer_config.json holds a int"),
        ("tokenizer_config.json", '{"eos_token": 5}', "no readable tokenizer .*eos_token"),
        ("tokenizer_config.json", '{"tokenizer_class": ["a"]}', "no readable tokenizer"),
        (
            "tokenizer_config.json",
            '{"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.Own", null]}}',
            "class 'OwnTokenizer', which code of its own defines",
        ),
        (
            "tokenizer_config.json",
            '{"a": "\\ud800"}',
            "tokenizer_config.json: no readable .*surrogates not allowed",
        ),
        (
            "special_tokens_map.json",
            "[",
            "special_tokens_map.json: no readable tokenizer .JSONDecode",
        ),
        ("chat_template.jinja", POINTER, "chat_template.jinja is a git-lfs pointer"),
        (
            "chat_template.jinja",
            "{{ 'ok' }}\n{# caf\udce9 #}",
            r"chat_template.jinja is not UTF-8: byte 17 \(line 2\) is 0xe9; save",
        ),
        (
            "additional_chat_templates/tool_use.jinja",
            "\udcff",
            r"additional_chat_templates/tool_use.jinja is not UTF-8: byte 0 \(line 1\) is 0xff",
        ),
        ("chat_template.jinja", "\ufeff{{ 'ok' }}", "jinja begins with a byte order mark"),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "default"}]}',
            "tokenizer_config.json: chat_template is a list, and an entry of it lacks name or template",
        ),
        ("merges.txt", "a b\n\udc80", r"merges.txt is not UTF-8: byte 4 \(line 2\) is 0x80"),
    ],
)
def test_a_folder_that_is_no_tokenizer_is_one_line_that_names_the_file(
    tokenizer_folder: Path, tmp_path: Path, file: str, text: str | None, message: str
) -> None:
    folder = tmp_path / "t"
    shutil.copytree(tokenizer_folder, folder)
    (folder / file).parent.mkdir(exist_ok=True)
    if text is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(MtopdError, match=message) as error:
        load_tokenizer(folder)
    assert str(error.value).startswith(str(folder))
    assert "\n" not in str(error.value)
    with pytest.raises(MtopdError, match=r"^s3://b/t"):
        load_tokenizer(folder, "s3://b/t")


def test_a_vocabulary_is_never_made_up(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Some classes of transformers make one of four tokens where their files are missing."""
    folder = tmp_path / "t"
    shutil.copytree(tokenizer_folder, folder)
    spoil_json(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    (folder / "tokenizer.json").unlink()
    assert len(AutoTokenizer.from_pretrained(folder)) < 8
    with pytest.raises(MtopdError, match="has no tokenizer"):
        load_tokenizer(folder)


def test_a_panic_of_the_library_is_one_line() -> None:
    """tokenizers' panics are no Exception."""

    class PanicException(BaseException):
        pass

    with (
        pytest.raises(MtopdError, match=r"^t: no readable tokenizer \(PanicException: no"),
        errors_named("t"),
    ):
        raise PanicException("no\nway")
    for passing in (KeyboardInterrupt, SystemExit):
        with pytest.raises(passing), errors_named("t"):
            raise passing


def test_a_folder_without_tokenizer_config_is_read_as_transformers_does(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "t"
    shutil.copytree(tokenizer_folder, folder)
    (folder / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_token_id is None
    assert vocab_size(tokenizer) == vocab_size(load_tokenizer(tokenizer_folder))


def chat_of(content: object, **fields: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": content, **fields}]


def test_what_a_template_leaves_out_is_refused(foreign_tokenizer) -> None:
    """Silence would train on a prompt without it."""
    call = {"function": {"name": "f", "arguments": "{}"}}
    with pytest.raises(MtopdError, match="makes nothing of its tools; use a template"):
        encode_prompts(foreign_tokenizer, [chat_of("a")], [[{"function": {"name": "f"}}]])
    with pytest.raises(MtopdError, match="makes nothing of its tool_calls"):
        encode_prompts(foreign_tokenizer, [[*chat_of("a", tool_calls=[call]), *chat_of("b")]])
    with pytest.raises(MtopdError, match="makes nothing of its function_call"):
        former = chat_of("a", function_call=call["function"])
        encode_prompts(foreign_tokenizer, [[*former, *chat_of("b")]])
    with pytest.raises(MtopdError, match="does not take content in parts"):
        encode_prompts(foreign_tokenizer, [chat_of([{"type": "text", "text": "a"}])])
    last = copy.deepcopy(foreign_tokenizer)
    last.chat_template = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    system = [{"role": "system", "content": "be brief"}, *chat_of("a")]
    with pytest.raises(MtopdError, match="makes nothing of its system message 'be brief'; use a"):
        encode_prompts(last, [system])
    last.chat_template = "{{ messages[-1].content }}"
    shown = [*chat_of("1+1?"), {"role": "assistant", "content": "2"}, *chat_of("b")]
    with pytest.raises(MtopdError, match=r"makes nothing of its user message '1\+1\?'"):
        encode_prompts(last, [shown])
    with pytest.raises(MtopdError, match="makes no token of its messages"):
        silent = copy.deepcopy(foreign_tokenizer)
        silent.chat_template = "{{ '' }}"
        encode_prompts(silent, [chat_of("a")])


def test_a_template_may_write_a_message_in_other_words(foreign_tokenizer) -> None:
    shorter = copy.deepcopy(foreign_tokenizer)
    shorter.chat_template = "{% for m in messages %}{{ m.content.split('#')[-1] }}|{% endfor %}"
    (ids,) = encode_prompts(shorter, [[*chat_of("thoughts#a"), *chat_of("b")]])
    assert shorter.decode(ids).replace(" ", "") == "a|b|"


def test_half_a_surrogate_pair_is_refused_by_row(foreign_tokenizer) -> None:
    with pytest.raises(MtopdError, match=r"^prompt a/0: character \d+ is U\+D83D, half"):
        encode_prompts(foreign_tokenizer, [chat_of("a\ud83d")], where=["prompt a/0"])
    with pytest.raises(MtopdError, match=r"^answer of a/0: character 1 is U\+DC00, half"):
        encode_response(foreign_tokenizer, "b\udc00", "answer of a/0")
    (ids,) = encode_prompts(foreign_tokenizer, [chat_of("a\0b")])
    assert "a\0b" in foreign_tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["WordLevel", "WordPiece", "BPE", "Unigram"])
@pytest.mark.parametrize("told", [True, False])
def test_unknown_text_is_found_in_every_kind_of_model(kind: str, told: bool) -> None:
    """``told``: tokenizer_config.json names the unknown token; tokenizer.json alone decides."""
    vocabulary = {"<unk>": 0, "a": 1, "b": 2, "<s>": 3}
    model = {
        "WordLevel": lambda: models.WordLevel(vocabulary, unk_token="<unk>"),
        "WordPiece": lambda: models.WordPiece(vocabulary, unk_token="<unk>"),
        "BPE": lambda: models.BPE(vocabulary, [], unk_token="<unk>"),
        "Unigram": lambda: models.Unigram([(t, -1.0) for t in vocabulary], unk_id=0),
    }[kind]()
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<unk>", "<s>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template="<unk> {{ messages[0]['content'] }} <s>",
        **({"unk_token": "<unk>"} if told else {}),
    )
    assert encode_prompts(tokenizer, [chat_of("a b")]) == [[0, 1, 2, 3]]
    assert encode_response(tokenizer, "<unk> a") == [0, 1]
    with pytest.raises(MtopdError, match=r"^prompt x/0: the tokenizer does not know '\u2603'"):
        encode_prompts(tokenizer, [chat_of("a \u2603 b")], where=["prompt x/0"])
    with pytest.raises(MtopdError, match=r"^answer: the tokenizer does not know '\u2603'"):
        encode_response(tokenizer, "<unk> \u2603", "answer")


def test_text_that_a_tokenizer_would_drop_is_refused() -> None:
    """BPE over characters, without an unknown token, forgets what it does not know."""
    backend = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert encode_response(tokenizer, "ab a") == [0, 1, 0]
    for text in ("a\u2603b", "\u2603ab", "ab \u2603"):
        with pytest.raises(MtopdError, match="does not know '\u2603'"):
            encode_response(tokenizer, text)
