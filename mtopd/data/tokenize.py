"""Prompts and supervised examples as tokens, routed, with room for the response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mtopd.data.routes import route
from mtopd.data.sources import PromptSource
from mtopd.tokenizer import encode_prompts, encode_response
from mtopd.types import MtopdError, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class SupervisedExample:
    """A prompt and the answer to learn; ``response_ids`` ends with EOS."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]

    @property
    def loss_mask(self) -> tuple[int, ...]:
        """Every token of the answer is trained."""
        return (1,) * len(self.response_ids)


def tokenize_prompts(
    source: PromptSource,
    tokenizer: PreTrainedTokenizerBase,
    routes: Sequence[Mapping[str, str]],
    *,
    context_length: int,
    max_response: int,
    rows: Sequence[int] | None = None,
) -> list[Prompt]:
    """Prompts of the given rows (default: all), routed and tokenized, with room for
    ``max_response`` tokens each.
    """
    numbers = range(len(source.rows)) if rows is None else rows
    prompts = []
    for number, ids in zip(numbers, _prompt_ids(source, tokenizer, numbers), strict=True):
        row = source.rows[number]
        prompt_id = f"{source.name}/{number}"
        _check_room(prompt_id, len(ids), max_response, context_length)
        prompts.append(
            Prompt(prompt_id, row.route, tuple(ids), route(row.route, routes), row.verify)
        )
    return prompts


def supervised_examples(
    source: PromptSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int,
    rows: Sequence[int] | None = None,
) -> list[SupervisedExample]:
    """Prompt and answer of the given rows (default: all), for supervised training."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise MtopdError(
            "the tokenizer has no EOS token; an answer could not be ended: set eos_token in its "
            "folder"
        )
    numbers = range(len(source.rows)) if rows is None else rows
    examples = []
    for number, ids in zip(numbers, _prompt_ids(source, tokenizer, numbers), strict=True):
        answer = source.rows[number].answer
        if answer is None:
            raise MtopdError(
                f"prompt {source.name}/{number} has no answer; supervised training needs one for "
                "each row"
            )
        response_ids = (*encode_response(tokenizer, answer), eos)
        _check_room(f"{source.name}/{number}", len(ids), len(response_ids), context_length)
        examples.append(SupervisedExample(tuple(ids), response_ids))
    return examples


def _prompt_ids(
    source: PromptSource, tokenizer: PreTrainedTokenizerBase, numbers: Sequence[int]
) -> list[list[int]]:
    rows = [source.rows[number] for number in numbers]
    return encode_prompts(
        tokenizer,
        [row.messages for row in rows],
        [row.tools for row in rows],
        [f"prompt {source.name}/{number}" for number in numbers],
    )


def _check_room(prompt_id: str, prompt_len: int, response_len: int, context_length: int) -> None:
    if prompt_len < 1 or prompt_len > context_length - response_len:
        raise MtopdError(
            f"prompt {prompt_id} has {prompt_len} tokens; at least 1 and at most "
            f"{context_length - response_len} fit "
            f"(context_length {context_length} less {response_len} of the response): shorten it or "
            "raise context_length"
        )
