"""The demo's tokenizer, and what every other part asks of a Hugging Face tokenizer.

``build_char_tokenizer`` makes an ordinary tokenizer folder (``AutoTokenizer.from_pretrained`` reads
it without code of this package): three special tokens, printable ASCII and newline, and a few
template tokens mined from the prompts, so that an instruction repeated in every prompt of a domain
costs one token.  Prompts are encoded longest template first, the rest and every response character
by character; decoding gives the exact text back.  A character outside the vocabulary is refused,
never dropped.

The other functions work with any tokenizer that has a chat template.  Two tokenizers are the same
when every id names the same token: equal sizes prove nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtopd.types import MtopdError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# {"role": ..., "content": ..., and whatever else the chat template reads}, as it stands in the file
Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]  # JSON schemas of functions, as it stands in the file

SPECIAL_TOKENS = ("<pad>", "<eos>", "<sep>")
CHARACTERS = (*map(chr, range(32, 127)), "\n")
# Kept in tokenizer_config.json: responses are encoded without template tokens.
_RESPONSES_BY_CHARACTER = "responses_by_character"
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{{ '<eos>' if message['role'] == 'assistant' else '<sep>' }}{% endfor %}"
)

_MINED_PROMPTS = 300  # of each domain
_MIN_AFFIX_LENGTH = 4
_MIN_WORD_SHARE = 0.2
# with a space before it, and the punctuation and space after it
_WORD = re.compile(r" ?[^\W\d_]{4,}\W*")


def build_char_tokenizer(
    prompts_by_domain: Mapping[str, Sequence[str]], folder: Path
) -> PreTrainedTokenizerFast:
    """Build the tokenizer, save it to ``folder`` and load it from there.  Equal prompts give equal
    vocabularies.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    templates = mine_template_tokens(prompts_by_domain)
    vocabulary = {
        token: index for index, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS, *templates))
    }
    # WordLevel without an unknown token raises on a piece it does not know; BPE would drop it
    # silently.
    backend = Tokenizer(models.WordLevel(vocabulary))
    # The templates come longest first and the alternation takes the first that matches.
    pieces = "|".join([*map(re.escape, templates), r"[\s\S]"])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), behavior="isolated")
    backend.decoder = decoders.Fuse()
    pad, eos, sep = SPECIAL_TOKENS
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        eos_token=eos,
        sep_token=sep,
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE,
        **{_RESPONSES_BY_CHARACTER: True},
    )
    tokenizer.save_pretrained(str(folder))
    return PreTrainedTokenizerFast.from_pretrained(str(folder))


def mine_template_tokens(prompts_by_domain: Mapping[str, Sequence[str]]) -> list[str]:
    """Text that prompts of a domain share: the common prefix and suffix, and words of many prompts.
    Longest first.
    """
    templates: set[str] = set()
    for domain, prompts in prompts_by_domain.items():
        if not prompts:
            raise MtopdError(
                f"domain '{domain}' has no prompts to mine template tokens from; give at least one"
            )
        sample = prompts[:_MINED_PROMPTS]
        prefix = _common_prefix(sample)
        suffix = _common_prefix([prompt[::-1] for prompt in sample])[::-1]
        templates |= {affix for affix in (prefix, suffix) if len(affix) >= _MIN_AFFIX_LENGTH}
        middles = [prompt[len(prefix) : len(prompt) - len(suffix)] for prompt in sample]
        prompts_with = Counter(word for middle in middles for word in set(_WORD.findall(middle)))
        templates |= {
            word for word, count in prompts_with.items() if count >= _MIN_WORD_SHARE * len(sample)
        }
    return sorted(templates, key=lambda template: (-len(template), template))


def _common_prefix(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)  # what these two share, all that sort between them share
    length = next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b),
        min(len(first), len(last)),
    )
    return first[:length]


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
            "the tokenizer has no chat template; add chat_template.jinja to its folder"
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
    return _encode(tokenizer, texts, names)


def _render(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Sequence[Message],
    tools: Tools | None,
    where: str,
) -> str:
    """The prompt's text.  transformers renders in Jinja's sandbox: a template runs no code."""
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in conversation],
            tools=None if tools is None else [dict(tool) for tool in tools],
            add_generation_prompt=True,
            tokenize=False,
        )
    except Exception as error:  # a template can raise anything
        raise MtopdError(
            f"{where}: {_template_file(tokenizer)} does not take its messages: {_said(error)}; "
            "change the messages or the template"
        ) from error
    assert isinstance(text, str)
    return text


def _template_file(tokenizer: PreTrainedTokenizerBase) -> str:
    folder = Path(tokenizer.name_or_path)
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        if (folder / name).is_file():
            return f"the chat template in {folder / name}"
    return "the tokenizer's chat template"


def _said(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], names: Sequence[str]
) -> list[list[int]]:
    """Token ids of texts in which the template's own tokens already stand."""
    try:
        encoded: Any = tokenizer(list(texts), add_special_tokens=False)
    except Exception as error:  # tokenizers raises bare Exception
        for text in texts:
            _refuse_unknown_characters(tokenizer, text, error)
        raise
    ids: list[list[int]] = encoded["input_ids"]
    unknown = tokenizer.unk_token_id
    for text, row, name in zip(texts, ids, names, strict=True):
        if unknown is not None and row.count(unknown) > text.count(str(tokenizer.unk_token)):
            raise MtopdError(
                f"{name}: the tokenizer does not know a part of {text!r}; it would train on "
                f"{tokenizer.unk_token}"
            )
    return ids


def encode_response(
    tokenizer: PreTrainedTokenizerBase, text: str, where: str = "response"
) -> list[int]:
    """Token ids of a response's text, without EOS; ``where`` names it in errors."""
    if not tokenizer.init_kwargs.get(_RESPONSES_BY_CHARACTER):
        return _encode(tokenizer, [text], [f"{where}: its answer"])[0]
    vocabulary = tokenizer.get_vocab()
    for character in text:
        if character not in vocabulary:
            raise _unknown_character(character, text)
    return [vocabulary[character] for character in text]


def vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Highest token id + 1; ids without a token in between count."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256, hex, over the (id, token) table and the special ids; two folders of one vocabulary
    have one hash.
    """
    content = [
        sorted(_token_table(tokenizer).items()),
        tokenizer.eos_token_id,
        sorted(tokenizer.all_special_ids),
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def first_difference(
    tokenizer_a: PreTrainedTokenizerBase, tokenizer_b: PreTrainedTokenizerBase
) -> str | None:
    """The first token id at which two tokenizers differ, with both tokens; None when their hashes
    are equal.
    """
    table_a, table_b = _token_table(tokenizer_a), _token_table(tokenizer_b)
    for index in sorted(table_a.keys() | table_b.keys()):
        if (token_a := table_a.get(index)) != (token_b := table_b.get(index)):
            return (
                f"token id {index} is {_quoted(token_a)} in one and {_quoted(token_b)} in the other"
            )
    for name, a, b in [
        ("eos_token_id", tokenizer_a.eos_token_id, tokenizer_b.eos_token_id),
        (
            "all_special_ids",
            sorted(tokenizer_a.all_special_ids),
            sorted(tokenizer_b.all_special_ids),
        ),
    ]:
        if a != b:
            return f"{name} is {a} in one and {b} in the other"
    return None


def _token_table(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}


def _quoted(token: str | None) -> str:
    return "no token" if token is None else repr(token)


def _refuse_unknown_characters(
    tokenizer: PreTrainedTokenizerBase, text: str, error: Exception
) -> None:
    if not tokenizer.init_kwargs.get(_RESPONSES_BY_CHARACTER):
        return
    vocabulary = tokenizer.get_vocab()
    special = "|".join(map(re.escape, tokenizer.all_special_tokens))
    for part in re.split(special, text):
        for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(part):
            if piece not in vocabulary:
                raise _unknown_character(piece, text) from error


def _unknown_character(character: str, text: str) -> MtopdError:
    return MtopdError(
        f"the tokenizer has no token for {character!r} (U+{ord(character):04X}) of {text!r}; it "
        "knows printable ASCII "
        "and newline: replace the character, or use a tokenizer that has it"
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of an HF folder; never runs code from it.  Raises MtopdError when there is
    none.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").is_file():
        raise MtopdError(
            f"{folder} has no tokenizer (no tokenizer_config.json); save the model's tokenizer "
            "there"
        )
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    )
    return tokenizer


def decode_response(tokenizer: PreTrainedTokenizerBase, response_ids: Sequence[int]) -> str:
    """The text of a response, special tokens left out."""
    text = tokenizer.decode(
        list(response_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)
    return text
