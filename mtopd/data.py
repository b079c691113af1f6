"""Prompts and supervised examples: reasoning-gym by dataset name, JSONL, Parquet; routing;
verifiers.

A source is a list of rows in a fixed order; ``<source name>/<row>`` names a prompt for the whole
run.  What a verifier needs travels in ``Prompt.verify`` as plain data, so a response can be scored
in another process.

The text of a response is never run as code.  Some verifiers of reasoning-gym do that: ``eval`` in
them is replaced by ``ast.literal_eval``, and datasets whose verifier hands the response to sympy's
parser are refused.

Nothing here samples, shuffles or remembers a position (``planning.select_prompts`` does); nothing
is cached on disk.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import functools
import io
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from mtopd.tokenizer import Message, encode_prompts, encode_response
from mtopd.types import MtopdError, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CORRECT_SCORE = 0.999  # a response is correct from this score on
EVAL_SEED = 10_000_019
_DRAWS_PER_EVAL_PROMPT = 16  # bounds the search for unique eval prompts


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One prompt as text.  ``verify`` is empty when nothing can score a response."""

    messages: tuple[Message, ...]
    answer: str | None
    route: Mapping[str, str]
    verify: Mapping[str, Any]

    @property
    def question(self) -> str:
        """The text of the last message."""
        return self.messages[-1]["content"]


@dataclass(frozen=True, slots=True)
class PromptSource:
    """Rows of one origin.  ``domain`` is the route field of that name where a row brings none of
    its own.
    """

    name: str
    domain: str
    rows: Sequence[PromptRow]


@dataclass(frozen=True, slots=True)
class SupervisedExample:
    """A prompt and the answer to learn; ``response_ids`` ends with EOS."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]

    @property
    def loss_mask(self) -> tuple[int, ...]:
        """Every token of the answer is trained."""
        return (1,) * len(self.response_ids)


def load_reasoning_gym(
    name: str,
    dataset: str,
    options: Mapping[str, Any],
    *,
    size: int,
    seed: int,
    eval_size: int = 256,
    eval_seed: int = EVAL_SEED,
    domain: str | None = None,
) -> tuple[PromptSource, PromptSource]:
    """The train pool ``name`` and the held-out set ``name-eval`` of a reasoning-gym dataset.

    The eval set is the first ``eval_size`` unique prompts drawn at ``eval_seed``.  The train pool
    is ``size`` draws at ``seed``, duplicates included, less every draw whose text is an eval
    prompt.
    """
    domain = domain or name
    unique: dict[str, PromptRow] = {}
    num_draws = eval_size * _DRAWS_PER_EVAL_PROMPT
    for row in _draw(domain, dataset, options, num_draws, eval_seed):
        if len(unique) == eval_size:
            break
        unique.setdefault(row.question, row)
    if len(unique) < eval_size:
        raise MtopdError(
            f"source '{name}': {num_draws} draws of {dataset} hold only {len(unique)} unique "
            "prompts, eval_size is "
            f"{eval_size}; lower it, or widen the dataset's options {dict(options)}"
        )
    train = [
        row for row in _draw(domain, dataset, options, size, seed) if row.question not in unique
    ]
    if not train:
        raise MtopdError(
            f"source '{name}': none of {size} prompts of {dataset} is left after removing "
            f"{eval_size} eval prompts; "
            f"raise the size, or widen the dataset's options {dict(options)}"
        )
    return PromptSource(name, domain, train), PromptSource(
        f"{name}-eval", domain, list(unique.values())
    )


def _draw(
    domain: str, dataset: str, options: Mapping[str, Any], size: int, seed: int
) -> Iterator[PromptRow]:
    # The entry itself is not kept: a verifier draws it again from these few values, in any process.
    recipe = {
        "verifier": "reasoning_gym",
        "dataset": dataset,
        "options": dict(options),
        "size": size,
        "seed": seed,
    }
    entries = _open_dataset(recipe)
    for index in range(size):
        with _quiet():
            entry = entries[index]
        messages = ({"role": "user", "content": entry["question"]},)
        answer = None if entry["answer"] is None else str(entry["answer"])
        yield PromptRow(messages, answer, {"domain": domain}, {**recipe, "index": index})


def _open_dataset(recipe: Mapping[str, Any]) -> Any:
    options = json.dumps(recipe["options"], sort_keys=True)
    return _create_dataset(recipe["dataset"], options, recipe["size"], recipe["seed"])


@functools.cache
def _create_dataset(name: str, options: str, size: int, seed: int) -> Any:
    with _quiet():
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

        if name not in DATASETS:
            near = difflib.get_close_matches(name, DATASETS, n=3)
            raise MtopdError(
                f"reasoning-gym has no dataset '{name}'; "
                + (f"near: {', '.join(near)}" if near else "")
            )
        try:
            dataset = reasoning_gym.create_dataset(
                name, size=size, seed=seed, **json.loads(options)
            )
        # a dataset's own checks raise what they like, mostly AssertionError and TypeError
        except Exception as error:
            raise MtopdError(
                f"reasoning-gym refuses the options {options} of dataset '{name}': {error}"
            ) from error
        _disarm_verifier(name, dataset)
        entry = dataset[0]
        if entry != dataset[0] or (entry["answer"] is not None and not _is_correct(dataset, entry)):
            raise MtopdError(
                f"reasoning-gym dataset '{name}' with options {options} does not draw the same "
                "entry twice, or does "
                "not accept its own answer; a run cannot be scored with it: use another dataset"
            )
    return dataset


def _is_correct(dataset: Any, entry: Mapping[str, Any]) -> bool:
    return bool(dataset.score_answer(answer=str(entry["answer"]), entry=entry) >= CORRECT_SCORE)


def _disarm_verifier(name: str, dataset: Any) -> None:
    """Keep ``score_answer`` from running a response as code: responses come from a model, or from
    the network.
    """
    score = type(dataset).score_answer
    if "parse_expr" in score.__code__.co_names:
        raise MtopdError(
            f"the verifier of reasoning-gym dataset '{name}' gives the response to sympy's parser, "
            "which runs it as "
            "code; use another dataset, or write the prompts to JSONL with an `answer` for exact "
            "match"
        )
    if "eval" in score.__code__.co_names:
        score.__globals__["eval"] = ast.literal_eval


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def verify(prompt: Prompt, response_text: str) -> float:
    """The verifier's score of a response, 0 to 1; it is correct from ``CORRECT_SCORE`` on.

    Raises MtopdError for a prompt whose ``verify`` is empty.
    """
    recipe = prompt.verify
    if not recipe:
        raise MtopdError(
            f"prompt {prompt.prompt_id} has no verifier; give its source an `answer` column"
        )
    if recipe["verifier"] == "exact_match":
        return float(response_text.strip() == recipe["answer"].strip())
    dataset = _open_dataset(recipe)
    with _quiet():
        entry = dataset[recipe["index"]]
        try:
            return float(dataset.score_answer(answer=response_text, entry=entry))
        # the text is arbitrary and some verifiers raise on what they cannot read: a wrong answer
        except Exception:
            return 0.0


def load_prompt_file(name: str, path: Path, *, domain: str | None = None) -> PromptSource:
    """Prompts of a JSONL or Parquet file.

    Columns: ``prompt``, a string or a list of chat messages; ``answer``, optional, scored by exact
    match after stripping; every other string, number or boolean is a route field.  Other columns
    and nulls are ignored.
    """
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise MtopdError(
            f"source '{name}': {path} is neither .jsonl nor .parquet; convert it to one of them"
        )
    if not path.is_file():
        raise MtopdError(f"source '{name}': {path} does not exist or is no file; mend the path")
    domain = domain or name
    rows = [_file_row(record, where, domain) for where, record in readers[path.suffix](path)]
    if not rows:
        raise MtopdError(f"source '{name}': {path} has no rows; at least one prompt is needed")
    return PromptSource(name, domain, rows)


def _read_jsonl(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise MtopdError(
                    f"{path}, line {number}: no valid JSON ({error}); mend or remove the line"
                ) from error
            if not isinstance(record, dict):
                raise MtopdError(
                    f"{path}, line {number}: found {type(record).__name__}, each line must be an "
                    "object"
                )
            yield f"{path}, line {number}", record


def _read_parquet(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise MtopdError(f"{path}: no readable Parquet file ({error}); write it again") from error
    for number, record in enumerate(table.to_pylist()):
        yield f"{path}, row {number}", record


def _file_row(record: Mapping[str, Any], where: str, domain: str) -> PromptRow:
    if record.get("prompt") is None:
        raise MtopdError(
            f"{where}: column 'prompt' is missing, found {sorted(record)}; every row needs a prompt"
        )
    answer = record.get("answer")
    if answer is not None and not isinstance(answer, str | int | float):
        raise MtopdError(
            f"{where}: answer is {type(answer).__name__}; it must be a string or a number"
        )
    answer = None if answer is None else _text(answer)
    fields = {
        key: _text(value) for key, value in record.items() if isinstance(value, str | int | float)
    }
    route_fields = {"domain": domain, **fields}
    for key in ("prompt", "answer"):
        route_fields.pop(key, None)
    verify_with = {} if answer is None else {"verifier": "exact_match", "answer": answer}
    return PromptRow(_messages(record["prompt"], where), answer, route_fields, verify_with)


def _text(value: str | int | float) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _messages(prompt: Any, where: str) -> tuple[Message, ...]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    for message in messages if isinstance(messages, list) else [None]:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(k), str) for k in ("role", "content")
        ):
            raise MtopdError(
                f"{where}: prompt must be a string or a list of messages with string role and "
                "content"
            )
    if not messages or not messages[-1]["content"] or messages[-1]["role"] == "assistant":
        raise MtopdError(
            f"{where}: prompt is empty or ends with an assistant message; it must end where one "
            "answers"
        )
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)


def with_fields(source: PromptSource, fields: Mapping[str, str]) -> PromptSource:
    """The source with ``fields`` added to every row's route; a row's own field of that name stands."""
    rows = [dataclasses.replace(row, route={**fields, **row.route}) for row in source.rows]
    return dataclasses.replace(source, rows=rows)


def route(fields: Mapping[str, str], routes: Sequence[Mapping[str, str]]) -> int:
    """The index of the teacher whose route matches: all its keys equal the prompt's fields.

    Of several the one with the most keys is taken; the empty route matches everything.
    """
    matching = [index for index, wanted in enumerate(routes) if wanted.items() <= fields.items()]
    known = "; ".join(f"{index}: {dict(wanted)}" for index, wanted in enumerate(routes))
    if not matching:
        raise MtopdError(
            f"no teacher's route matches a prompt with {dict(fields)}; the routes are {known}: add "
            "a teacher for it, "
            "or take the prompt out"
        )
    most_keys = max(len(routes[index]) for index in matching)
    best = [index for index in matching if len(routes[index]) == most_keys]
    if len(best) > 1:
        raise MtopdError(
            f"teachers {best} match a prompt with {dict(fields)} equally well; the routes are "
            f"{known}: make one of "
            "them more specific"
        )
    return best[0]


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
    return encode_prompts(tokenizer, [source.rows[number].messages for number in numbers])


def _check_room(prompt_id: str, prompt_len: int, response_len: int, context_length: int) -> None:
    if prompt_len < 1 or prompt_len > context_length - response_len:
        raise MtopdError(
            f"prompt {prompt_id} has {prompt_len} tokens; at least 1 and at most "
            f"{context_length - response_len} fit "
            f"(context_length {context_length} less {response_len} of the response): shorten it or "
            "raise context_length"
        )
