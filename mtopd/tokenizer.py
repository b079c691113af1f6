"""What every part asks of a Hugging Face tokenizer: prompts and responses as tokens and back, which
tokens end a response, whether two tokenizers agree.

It may be any that has a chat template.  Two agree when every id names the same token: equal sizes
prove nothing, and which tokens end, pad or are called special is nothing that the loss can meet.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtopd.tokenizer_files import (
    CONFIG,
    check_tokenizer_files,
    end_ids_of_configs,
    errors_named,
    said,
)
from mtopd.types import MtopdError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# {"role": ..., "content": ..., and whatever else the chat template reads}, as it stands in the file
Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]  # JSON schemas of functions, as it stands in the file

# Kept in tokenizer_config.json: responses are encoded without template tokens.
RESPONSES_BY_CHARACTER = "responses_by_character"


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    tools: Sequence[Tools | None] | None = None,
    where: Sequence[str] | None = None,
) -> list[list[int]]:
    """Token ids of each conversation through the chat template, up to where the response begins.

    Messages and ``tools`` (of each conversation) reach the template whole; ``where`` names each
    conversation in errors.  Raises MtopdError for what the template or the tokenizer does not take.
    """
    if tokenizer.chat_template is None:
        raise MtopdError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template; add chat_template.jinja there"
        )
    if not conversations:
        return []
    names = where or [f"conversation {i}" for i in range(len(conversations))]
    texts = [
        _render(tokenizer, conversation, offered, name)
        for conversation, offered, name in zip(
            conversations, tools or [None] * len(conversations), names, strict=True
        )
    ]
    ids = _encode(tokenizer, texts, names)
    for row, name in zip(ids, names, strict=True):
        if not row:
            raise MtopdError(
                f"{name}: {_template_file(tokenizer)} makes no token of its messages; a response "
                "needs at least one before it"
            )
    return ids


_SAID = f"turn {uuid.uuid4().hex}"  # in place of one whose tokens are known; nobody else says it


def encode_reply(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Sequence[Message],
    reply: Sequence[Message],
    tools: Tools | None = None,
    *,
    last_id: int | None,
    where: str = "reply",
) -> list[int]:
    """Token ids of ``reply`` behind an assistant's turn of sampled tokens, up to where the next turn
    begins: what the chat template writes behind that turn.  Nothing that was sampled is encoded again.

    ``conversation``: all messages before that turn.  ``last_id``: the turn's last token; an end token
    that the template writes there, too, is left out.  Raises MtopdError for what the template or the
    tokenizer does not take.
    """
    said = {"role": "assistant", "content": _SAID}
    text = _render(tokenizer, [*conversation, said, *reply], tools, where)
    _, _, tail = text.partition(_SAID)
    if text.count(_SAID) != 1:
        raise MtopdError(
            f"{where}: {_template_file(tokenizer)} does not write an assistant's turn as it stands; "
            "what follows it cannot be told: use a template that does"
        )
    if last_id is not None:
        end = tokenizer.decode([last_id], clean_up_tokenization_spaces=False)
        between, found, rest = tail.partition(str(end))
        tail = rest if found and not between.strip() else tail
    return _encode(tokenizer, [tail], [where])[0] if tail else []


def _render(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Sequence[Message],
    tools: Tools | None,
    where: str,
) -> str:
    """The prompt's text.  Raises MtopdError for what the template refuses, or leaves out."""
    try:
        text = _template_result(tokenizer, conversation, tools)
    except Exception as error:  # a template can raise anything
        raise MtopdError(
            f"{where}: {_template_file(tokenizer)} does not take its messages: {said(error)}; "
            "change the messages or the template"
        ) from error
    for what, left_out in (
        ("tools", tools and (conversation, None)),
        *((name, _without(name, conversation, tools)) for name in ("tool_calls", "function_call")),
    ):
        if left_out and text == _result_or_none(tokenizer, *left_out):
            raise MtopdError(
                f"{where}: {_template_file(tokenizer)} makes nothing of its {what}; use a template "
                f"that does, or take {what} out of the prompt"
            )
    for number, message in enumerate(conversation):
        content = message.get("content")
        if isinstance(content, str) and content.strip() not in text:
            _refuse_left_out(tokenizer, conversation, tools, number, text, where)
        if isinstance(content, list | tuple) and (
            repr(list(content)) in text or not all(_stands_in(part, text) for part in content)
        ):
            raise MtopdError(
                f"{where}: {_template_file(tokenizer)} does not take content in parts; give it as "
                "one string"
            )
    return text


def _refuse_left_out(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Sequence[Message],
    tools: Tools | None,
    number: int,
    text: str,
    where: str,
) -> None:
    """A template may write a message otherwise (less its reasoning, say); one whose absence changes
    nothing is lost, as system messages are in templates that know of none.
    """
    others = [*conversation[:number], *conversation[number + 1 :]]
    if text == _result_or_none(tokenizer, others, tools):
        message = conversation[number]
        raise MtopdError(
            f"{where}: {_template_file(tokenizer)} makes nothing of its {message['role']} message "
            f"{_shortened(message['content'])}; use a template that does, or take the message out"
        )


def _template_result(
    tokenizer: PreTrainedTokenizerBase, conversation: Sequence[Message], tools: Tools | None
) -> str:
    """transformers renders in Jinja's sandbox: a template runs no code."""
    text = tokenizer.apply_chat_template(
        [dict(message) for message in conversation],
        tools=[dict(tool) for tool in tools] if tools else None,
        add_generation_prompt=True,
        tokenize=False,
    )
    assert isinstance(text, str)
    return text


def _result_or_none(
    tokenizer: PreTrainedTokenizerBase, conversation: Sequence[Message], tools: Tools | None
) -> str | None:
    try:
        return _template_result(tokenizer, conversation, tools)
    except Exception:  # it needs what was taken away
        return None


def _without(
    name: str, conversation: Sequence[Message], tools: Tools | None
) -> tuple[list[Message], Tools | None] | None:
    """The conversation less what its messages have under ``name``; None when that is nothing."""
    if not any(message.get(name) for message in conversation):
        return None
    return [{k: m[k] for k in m if k != name} for m in conversation], tools


def _stands_in(part: Mapping[str, Any], text: str) -> bool:
    return str(part.get("text", "")).strip() in text


def _template_file(tokenizer: PreTrainedTokenizerBase) -> str:
    folder = Path(tokenizer.name_or_path)
    for name in ("chat_template.jinja", CONFIG):
        if (folder / name).is_file():
            return f"the chat template in {folder / name}"
    return "the tokenizer's chat template"


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], names: Sequence[str]
) -> list[list[int]]:
    """Token ids of texts in which the template's own tokens already stand.  Raises MtopdError for a
    text of which the tokenizer would lose a part.
    """
    for text, name in zip(texts, names, strict=True):
        _refuse_surrogates(text, name)
    try:
        ids = _token_ids(tokenizer, texts)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic too; which text it was, tokenizers does not say
        for text, name in zip(texts, names, strict=True):
            with errors_named(f"{name}: {_shortened(text)}"):
                _refuse_unknown_characters(tokenizer, text, name)
                _token_ids(tokenizer, [text])
        raise MtopdError(
            f"{names[0]} and those after it: the tokenizer fails on them together ({said(error)})"
        ) from error
    unknown, drops = _unknown_ids(tokenizer), _drops_text(tokenizer)
    for text, row, name in zip(texts, ids, names, strict=True):
        if not drops and unknown.isdisjoint(row):
            continue
        if (lost := _lost_text(tokenizer, text, row, unknown, drops)) is not None:
            raise MtopdError(
                f"{name}: the tokenizer does not know {lost!r}, a part of {_shortened(text)}; "
                "change the text, or use a tokenizer that has it"
            )
    return ids


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    encoded: Any = tokenizer(list(texts), add_special_tokens=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _refuse_surrogates(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MtopdError(
            f"{name}: character {error.start} is U+{ord(text[error.start]):04X}, half a surrogate "
            "pair, which no tokenizer reads; write the text again as UTF-8"
        ) from None


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


# -- what a tokenizer would lose -------------------------------------------------------------------
_NO_CHARACTER = "\U0010ffff"  # no vocabulary has it


def _pieces_of_unknown(tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """Ids that the model of a fast tokenizer gives to what it does not know; None where it raises,
    or is a slow one.
    """
    if not tokenizer.is_fast:
        return None
    try:
        return [piece.id for piece in tokenizer.backend_tokenizer.model.tokenize(_NO_CHARACTER)]
    except Exception:  # such a model refuses unknown text by itself
        return None


def _unknown_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that may stand for text the tokenizer does not know."""
    pieces = _pieces_of_unknown(tokenizer) or []
    # several are bytes: nothing is unknown to such a model
    found = {tokenizer.unk_token_id, *(pieces if len(pieces) == 1 else [])}
    return {index for index in found if index is not None}


def _drops_text(tokenizer: PreTrainedTokenizerBase) -> bool:
    """BPE without an unknown token, over characters: what it does not know vanishes."""
    if _pieces_of_unknown(tokenizer) != []:
        return False
    backend = tokenizer.backend_tokenizer
    return "ByteLevel" not in f"{backend.pre_tokenizer} {backend.normalizer}"


def _lost_text(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    ids: Sequence[int],
    unknown: set[int],
    drops: bool,
) -> str | None:
    """The first part of the text of which ``ids`` say nothing.  An unknown token is none of them
    where it stands in the text as such: templates of GPT-2, OPT and SmolLM write it as end token.
    """
    if drops:
        characters = [c for c in dict.fromkeys(text) if not c.isspace()]
        pieces = zip(characters, _token_ids(tokenizer, characters), strict=True)
        return next((c for c, found in pieces if not found), None)
    literals = {index: str(tokenizer.convert_ids_to_tokens(index)) for index in unknown}
    if not tokenizer.is_fast:
        is_lost = any(ids.count(i) > text.count(literal) for i, literal in literals.items())
        return text if is_lost else None
    encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    for index, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if index in unknown and text[start:end].strip() != literals[index]:
            return text[start:end]
    return None


def encode_response(
    tokenizer: PreTrainedTokenizerBase, text: str, where: str = "response"
) -> list[int]:
    """Token ids of a response's text, without EOS; ``where`` names it in errors."""
    if not tokenizer.init_kwargs.get(RESPONSES_BY_CHARACTER):
        return _encode(tokenizer, [text], [where])[0]
    vocabulary = tokenizer.get_vocab()
    for character in text:
        if character not in vocabulary:
            raise _unknown_character(character, text, where)
    return [vocabulary[character] for character in text]


def vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Highest token id + 1; ids without a token in between count."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256, hex, over the (id, token) table: equal for tokenizers that agree."""
    content = sorted(_token_table(tokenizer).items())
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def first_difference(
    tokenizer_a: PreTrainedTokenizerBase,
    tokenizer_b: PreTrainedTokenizerBase,
    *,
    below: int | None = None,
) -> str | None:
    """The first token id (``below`` a limit) at which two tokenizers differ, with both tokens; None
    when they agree.
    """
    table_a, table_b = _token_table(tokenizer_a), _token_table(tokenizer_b)
    for index in sorted(table_a.keys() | table_b.keys()):
        if below is not None and index >= below:
            break
        if (token_a := table_a.get(index)) != (token_b := table_b.get(index)):
            return (
                f"token id {index} is {_quoted(token_a)} in one and {_quoted(token_b)} in the other"
            )
    return None


def further_tokens(tokenizer: PreTrainedTokenizerBase, first: int) -> list[str]:
    """The tokens with ids from ``first`` on."""
    return [token for index, token in sorted(_token_table(tokenizer).items()) if index >= first]


def end_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The EOS token as text; None where there is none."""
    token = tokenizer.eos_token
    return None if token is None else str(token)


def end_ids(tokenizer: PreTrainedTokenizerBase, folder: Path) -> tuple[int, ...]:
    """Every token that ends a response of the folder's model, its tokenizer's EOS first: chat models
    name further ones in config.json or generation_config.json (``eos_token_id``, often a list).
    Answers to learn end with the tokenizer's EOS alone.

    Raises MtopdError when there is none, or one that no token has: answers would run past it.
    """
    table, of_configs = _token_table(tokenizer), end_ids_of_configs(folder)
    for index, path in of_configs:
        if index not in table:
            raise MtopdError(
                f"{path}: eos_token_id {index} is outside the vocabulary: no token of the "
                f"tokenizer has that id ({len(table)} tokens, the last is {max(table)}); give the "
                "id of the token that ends an answer, or leave eos_token_id out"
            )
    own = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if not (found := (*own, *(index for index, _ in of_configs))):
        raise MtopdError(
            f"{folder} names no EOS token: an answer could not end; set eos_token in its {CONFIG}"
        )
    return tuple(dict.fromkeys(found))


def pad_id(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> int:
    """The id that fills up short prompts of a batch, where attention is masked: an end token where
    the tokenizer has no pad token.
    """
    index = tokenizer.pad_token_id
    return ends[0] if index is None else int(index)


def _token_table(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}


def _quoted(token: str | None) -> str:
    return "no token" if token is None else repr(token)


def _refuse_unknown_characters(tokenizer: PreTrainedTokenizerBase, text: str, name: str) -> None:
    if not tokenizer.init_kwargs.get(RESPONSES_BY_CHARACTER):
        return
    vocabulary = tokenizer.get_vocab()
    special = "|".join(map(re.escape, tokenizer.all_special_tokens))
    for part in re.split(special, text):
        for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(part):
            if piece not in vocabulary:
                raise _unknown_character(piece, text, name)


def _unknown_character(piece: str, text: str, name: str) -> MtopdError:
    code = f" (U+{ord(piece):04X})" if len(piece) == 1 else ""
    return MtopdError(
        f"{name}: the tokenizer has no token for {piece!r}{code} of "
        f"{_shortened(text)}; it knows printable ASCII and newline: replace the character, or use a "
        "tokenizer that has it"
    )


def load_tokenizer(folder: Path, named: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of an HF folder, as transformers reads it; never runs code from it.

    Raises MtopdError, with ``named`` for the folder, when there is none or it cannot be read.
    """
    from transformers import AutoTokenizer

    named = named or str(folder)
    check_tokenizer_files(folder, named)
    with errors_named(named):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        # What is asked of it later is asked once here, where the folder is known.
        table, ids = _token_table(tokenizer), (tokenizer.eos_token_id, tokenizer.pad_token_id)
        wrong = [i for i in ids if i is not None and i not in table]
    if not table or wrong:
        what = f"id {wrong[0]} ends or pads, but names no token" if table else "it has no tokens"
        raise MtopdError(f"{named}: no usable tokenizer: {what}; save the model's tokenizer again")
    return tokenizer


def decode_response(tokenizer: PreTrainedTokenizerBase, response_ids: Sequence[int]) -> str:
    """The text of a response, special tokens left out."""
    text = tokenizer.decode(
        list(response_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)
    return text
