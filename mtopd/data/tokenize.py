"""Prompts and answers as tokens, routed.  A prompt must leave room for its response: those that do
not are all named at once, or left out and counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mtopd.data.routes import Routes, route
from mtopd.data.sources import PromptRow, PromptSource
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


@dataclass(frozen=True, slots=True)
class Overlong:
    """A prompt without room for its response."""

    prompt_id: str
    place: str  # the prompt's name, with file and line where it comes from one
    prompt_len: int
    response_len: int

    @property
    def num_tokens(self) -> int:
        return self.prompt_len + self.response_len


def tokenize_prompts(
    source: PromptSource,
    tokenizer: PreTrainedTokenizerBase,
    routes: Routes,
    *,
    context_length: int,
    max_response: int,
    answers: Mapping[str, Sequence[int]] | None = None,
    overlong: list[Overlong] | None = None,
    rows: Sequence[int] | None = None,
    environment: str | None = None,
) -> list[Prompt]:
    """Prompts of the given rows (default: all), routed and tokenized, with room for
    ``max_response`` tokens each, or for their answers in ``answers`` (by prompt id).

    Those without room are left out and added to ``overlong``; without a list they are refused.
    ``environment``: the name of the source whose environment replies to the responses.
    """
    numbers = range(len(source.rows)) if rows is None else rows
    prompts, without_room = [], []
    for number, ids in zip(numbers, _prompt_ids(source, tokenizer, numbers), strict=True):
        row, prompt_id = source.rows[number], prompt_name(source, number)
        response_len = max_response if answers is None else len(answers[prompt_id])
        if len(ids) + response_len > context_length:
            place = _place(source, number)
            without_room.append(Overlong(prompt_id, place, len(ids), response_len))
            continue
        try:
            teacher = route(row.route, routes)
        except MtopdError as error:
            raise MtopdError(f"{_place(source, number)}: {error}") from None
        conversation = {} if environment is None else _conversation(row, environment)
        prompts.append(Prompt(prompt_id, row.route, tuple(ids), teacher, row.verify, conversation))
    if overlong is None:
        refuse_overlong(without_room, context_length)
    else:
        overlong += without_room
    return prompts


def refuse_overlong(overlong: Sequence[Overlong], context_length: int) -> None:
    """Raise MtopdError that names the prompts without room, if there are any."""
    if not overlong:
        return
    longest = max(overlong, key=lambda prompt: prompt.num_tokens)
    count, shown = len(overlong), ", ".join(prompt.prompt_id for prompt in overlong[:3])
    raise MtopdError(
        f"{count} {'prompt leaves' if count == 1 else 'prompts leave'} no room for the response: "
        f"{shown}{', ...' if count > 3 else ''}; the longest, {longest.place}, needs "
        f"{longest.num_tokens} tokens ({longest.prompt_len} and {longest.response_len} of the "
        f"response), data.context_length is {context_length}: raise it, lower data.max_response, "
        "or leave such prompts out with data.overlong=drop"
    )


def tokenize_answers(
    source: PromptSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: Sequence[int] | None = None,
) -> dict[str, tuple[int, ...]]:
    """Answers of the given rows (default: all) by prompt id, each ended with EOS, for supervised
    training.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise MtopdError(
            "the tokenizer has no EOS token; an answer could not be ended: set eos_token in its "
            "folder"
        )
    answers = {}
    for number in range(len(source.rows)) if rows is None else rows:
        answer, place = source.rows[number].answer, _place(source, number)
        if answer is None:
            raise MtopdError(f"{place} has no answer; supervised training needs one for each row")
        ids = encode_response(tokenizer, answer, f"answer of {place}")
        answers[prompt_name(source, number)] = (*ids, eos)
    return answers


def _conversation(row: PromptRow, environment: str) -> dict[str, object]:
    """What an environment is told of the prompt, as plain data."""
    return {
        "environment": environment,
        "messages": list(row.messages),
        "tools": row.tools,
        "answer": row.answer,
    }


def prompt_name(source: PromptSource, number: int) -> str:
    return f"{source.name}/{number}"


def _place(source: PromptSource, number: int) -> str:
    where = source.rows[number].where
    return f"prompt {prompt_name(source, number)}" + f" ({where})" * bool(where)


def _prompt_ids(
    source: PromptSource, tokenizer: PreTrainedTokenizerBase, numbers: Sequence[int]
) -> list[list[int]]:
    rows = [source.rows[number] for number in numbers]
    return encode_prompts(
        tokenizer,
        [row.messages for row in rows],
        [row.tools for row in rows],
        [_place(source, number) for number in numbers],
    )
