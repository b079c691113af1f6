"""Rows of prompts: reasoning-gym by dataset name, JSONL, Parquet.

A source is a list of rows in a fixed order; ``<source name>/<row>`` names a prompt for the whole
run.  Nothing here samples, shuffles or remembers a position (``planning.select_prompts`` does);
nothing is cached on disk.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mtopd.data.verifiers import open_dataset, quiet
from mtopd.tokenizer import Message, Tools
from mtopd.types import MtopdError

EVAL_SEED = 10_000_019
_DRAWS_PER_EVAL_PROMPT = 16  # bounds the search for unique eval prompts


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One prompt: its messages and tools as they stand in the file.  ``verify`` is empty when
    nothing can score a response.
    """

    messages: tuple[Message, ...]
    answer: str | None
    route: Mapping[str, str]
    verify: Mapping[str, Any]
    tools: Tools | None = None

    @property
    def question(self) -> str:
        """The text of the last message."""
        content = self.messages[-1].get("content") or ""
        return content if isinstance(content, str) else "".join(part["text"] for part in content)


@dataclass(frozen=True, slots=True)
class PromptSource:
    """Rows of one origin.  ``domain`` is the route field of that name where a row brings none of
    its own.
    """

    name: str
    domain: str
    rows: Sequence[PromptRow]


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
    entries = open_dataset(recipe)
    for index in range(size):
        with quiet():
            entry = entries[index]
        messages = ({"role": "user", "content": entry["question"]},)
        answer = None if entry["answer"] is None else str(entry["answer"])
        yield PromptRow(messages, answer, {"domain": domain}, {**recipe, "index": index})


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
        raise MtopdError(f"source '{name}': {path} does not exist or is no file; correct the path")
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
                    f"{path}, line {number}: no valid JSON ({error}); correct or remove the line"
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
    for key in ("prompt", "answer", "tools"):
        route_fields.pop(key, None)
    verify_with = {} if answer is None else {"verifier": "exact_match", "answer": answer}
    messages, tools = _messages(record["prompt"], where), _tools(record.get("tools"), where)
    return PromptRow(messages, answer, route_fields, verify_with, tools)


def _text(value: str | int | float) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _messages(prompt: Any, where: str) -> tuple[Message, ...]:
    """The messages whole: what the chat template reads beside role and content is kept."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    for message in messages if isinstance(messages, list) else [None]:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise MtopdError(
                f"{where}: prompt must be a string or a list of messages with string role and "
                "content"
            )
        _check_content(message.get("content"), where)
    if not messages or not _is_question(messages[-1]):
        raise MtopdError(
            f"{where}: prompt is empty or ends with an assistant message; it must end where one "
            "answers"
        )
    return tuple(messages)


def _is_question(message: Message) -> bool:
    return bool(message.get("content")) and message["role"] != "assistant"


def _check_content(content: Any, where: str) -> None:
    """A message's content is text, parts of text, or nothing (beside tool calls)."""
    if content is None or isinstance(content, str):
        return
    for part in content if isinstance(content, list) else [content]:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise MtopdError(
                f"{where}: a message's content has a part of type {kind!r}; only text is trained: "
                "give a string, or parts of type 'text'"
            )


def _tools(tools: Any, where: str) -> Tools | None:
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise MtopdError(f"{where}: tools must be a list of objects, each the schema of a function")
    return tuple(tools)


def with_fields(source: PromptSource, fields: Mapping[str, str]) -> PromptSource:
    """The source with ``fields`` added to every row's route; a row's own field of that name stands."""
    rows = [dataclasses.replace(row, route={**fields, **row.route}) for row in source.rows]
    return dataclasses.replace(source, rows=rows)
