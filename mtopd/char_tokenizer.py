"""The demo's tokenizer.

``build_char_tokenizer`` makes an ordinary tokenizer folder (``AutoTokenizer.from_pretrained`` reads
it without code of this package): three special tokens, printable ASCII and newline, and a few
template tokens mined from the prompts, so that an instruction repeated in every prompt of a domain
costs one token.  Prompts are encoded longest template first, the rest and every response character
by character; decoding gives the exact text back.  A character outside the vocabulary is refused,
never dropped.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mtopd.tokenizer import RESPONSES_BY_CHARACTER
from mtopd.types import MtopdError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<eos>", "<sep>")
CHARACTERS = (*map(chr, range(32, 127)), "\n")
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
        **{RESPONSES_BY_CHARACTER: True},
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
