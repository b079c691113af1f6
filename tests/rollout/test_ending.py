"""Where a response ends, and what it says."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mtopd.rollout.ending import Ending


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: k for k, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def length_at_the_end(ending: Ending, ids: list[int]) -> int | None:
    return next((k for k in range(1, len(ids) + 1) if ending.is_over(ids[:k])), None)


def test_a_stop_string_ends_where_its_last_byte_does() -> None:
    tokenizer = byte_tokenizer()
    text = "some words \u2192 and\n\nQ: more"
    ids = tokenizer(text)["input_ids"]
    for stop in ("\u2192", "\n\nQ:", "some", "words \u2192 and\n", text):
        ending = Ending(tokenizer, [tokenizer.eos_token_id], [stop, "not there"])
        until = text[: text.index(stop)]
        assert length_at_the_end(ending, ids) == len((until + stop).encode())
        assert ending.text(ids) == until
    assert length_at_the_end(Ending(tokenizer, [0], ["\nQ: less"]), ids) is None


def test_an_end_token_is_no_text() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("yes.<|end|>")["input_ids"]
    full_stop = tokenizer.convert_tokens_to_ids(".")
    assert length_at_the_end(Ending(tokenizer, [tokenizer.eos_token_id]), ids) == 5
    assert Ending(tokenizer, [tokenizer.eos_token_id]).text(ids) == "yes."
    both = Ending(tokenizer, [tokenizer.eos_token_id, full_stop])  # an ordinary token that ends
    assert length_at_the_end(both, ids) == 4
    assert both.text(ids[:4]) == "yes"
    by_name = Ending(tokenizer, [full_stop], ["<|end|>"])
    assert by_name.is_over(ids)
    assert by_name.text(ids) == "yes."
