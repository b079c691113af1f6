"""Rows of prompts from a file: which columns mean what."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from mtopd.data.answers import has_number
from mtopd.data.readers import LongNumber, Record, parse_json, read_records
from mtopd.data.sources import AS_IT_STANDS, Asking, PromptRow, PromptSource
from mtopd.tokenizer import Message, Tools
from mtopd.types import MtopdError, plain_text

_PROMPT, _ANSWER = ("prompt", "messages"), ("answer", "reward_model")  # a column, or its other name
COLUMNS = (*_PROMPT, *_ANSWER, "tools")
# Columns that other systems make a part of the prompt.
_ONLY_TEXT = "only text is trained: leave such rows out"
_PARTS_ELSEWHERE = {
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _ONLY_TEXT),
    **dict.fromkeys(
        ("system", "system_prompt"),
        "make it the prompt's first message, or `system` of the source",
    ),
    "history": "make it messages of the prompt",
    "documents": "write them into a message",
    "functions": "call the column tools",
    "chat_template_kwargs": "set it in the chat template",
}
_WRITTEN_MESSAGES = re.compile(r"""\[\s*\{\s*['"](?:role|content)['"]\s*:.*\}\s*\]""", re.DOTALL)


def load_prompt_file(
    name: str,
    path: Path,
    *,
    domain: str | None = None,
    asking: Asking = AS_IT_STANDS,
    held_out: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> PromptSource:
    """Prompts of a JSON, JSON Lines or Parquet file.

    Columns: ``prompt`` or ``messages``, a string or a list of chat messages; ``answer`` or
    ``reward_model.ground_truth``, optional, scored by comparison; ``tools``, optional; every other
    string, number or boolean is a route field.  Null and NaN are no value.  Columns that are none
    of these are named once, through ``say``.
    """
    domain = name if domain is None else domain
    rows: list[PromptRow] = []
    unused: dict[str, None] = {}
    for where, record in read_records(path):
        row = asking.applied(_row(record, where, domain, unused), where)
        if held_out:
            _check_answer(row, where, asking)
        rows.append(row)
    if not rows:
        raise MtopdError(f"source '{name}': {path} has no rows; at least one prompt is needed")
    if unused:
        say(f"source '{name}': columns of {path.name} that are not used: {', '.join(unused)}")
    return PromptSource(name, domain, rows)


def _row(record: Record, where: str, domain: str, unused: dict[str, None]) -> PromptRow:
    messages = _messages(_prompt(record, where), where)
    answer = _answer(record, where, unused)
    fields = {"domain": domain}
    for key, value in record.items():
        if key in COLUMNS or value is None:
            continue
        if key in _PARTS_ELSEWHERE and value not in ("", [], {}):
            raise MtopdError(
                f"{where}: column {key!r} would be lost, elsewhere it is a part of the prompt; "
                f"{_PARTS_ELSEWHERE[key]}, or rename the column"
            )
        text = _text(value, f"{where}: column {key!r}")
        if text is not None:
            fields[key] = text
        elif not isinstance(value, float):
            unused[key] = None
    verify_with = {} if answer is None else {"verifier": "exact_match", "answer": answer}
    tools = _tools(record.get("tools"), where)
    return PromptRow(messages, answer, fields, verify_with, tools, where)


def _check_answer(row: PromptRow, where: str, asking: Asking) -> None:
    if row.answer is None:
        raise MtopdError(
            f"{where}: a held-out prompt has no answer to compare with; every row needs one"
        )
    if asking.answer_from == "last_number" and not has_number(row.answer):
        raise MtopdError(
            f"{where}: the answer {row.answer!r} holds no number, answer_from last_number would "
            "never find it; use another rule"
        )


def _text(value: Any, what: str) -> str | None:
    """A string, number or boolean as text; None for NaN, and for what is none of them."""
    if isinstance(value, float | Decimal) and not math.isfinite(value):
        if math.isnan(value):
            return None
        raise MtopdError(f"{what} is {value}; give a finite number, or null")
    if isinstance(value, LongNumber):
        value = value.written
    return plain_text(value) if isinstance(value, str | int | float | Decimal) else None


def _prompt(record: Record, where: str) -> Any:
    given = [key for key in _PROMPT if record.get(key) is not None]
    if not given:
        state = "is null" if any(key in record for key in _PROMPT) else "is missing"
        raise MtopdError(
            f"{where}: column 'prompt' {state}, found {sorted(record)}; every row needs a prompt"
        )
    if len(given) > 1:
        raise MtopdError(f"{where}: both {' and '.join(given)} are given; leave one of them out")
    return record[given[0]]


def _answer(record: Record, where: str, unused: dict[str, None]) -> str | None:
    """None where there is no answer: null, NaN, or text of blanks."""
    found = {}
    for key in _ANSWER:
        value = record.get(key)
        if key == "reward_model" and isinstance(value, Mapping):  # as verl writes it
            unused.update(dict.fromkeys(f"{key}.{k}" for k in value if k != "ground_truth"))
            key, value = f"{key}.ground_truth", value.get("ground_truth")
        elif key == "reward_model" and value is not None:
            unused[key] = None
            continue
        text = _text(value, f"{where}: {key}")
        if text is None and value is not None and not isinstance(value, float | Decimal):
            raise MtopdError(
                f"{where}: {key} is {type(value).__name__}; it must be a string or a number"
            )
        if text is not None and text.strip():
            found[key] = text
    if len({*found.values()}) > 1:
        raise MtopdError(f"{where}: {' and '.join(found)} differ; leave one of them out")
    return next(iter(found.values()), None)


def _messages(prompt: Any, where: str) -> tuple[Message, ...]:
    """The messages whole: what the chat template reads beside role and content is kept."""
    if isinstance(prompt, str):
        _refuse_written_messages(prompt, where)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    for message in messages if isinstance(messages, list) else [None]:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise MtopdError(
                f"{where}: prompt must be a string or a list of messages with string role and "
                f"content, found {_described(prompt if message is None else message)}"
            )
        _check_content(message.get("content"), where)
    if not messages or not _is_question(messages[-1]):
        raise MtopdError(
            f"{where}: prompt is empty or ends with an assistant message; it must end where one "
            "answers: give the last answer as column 'answer'"
        )
    return tuple(messages)


def _described(value: Any) -> str:
    """What stands in place of a message."""
    if isinstance(value, dict):
        return f"one with {', '.join(map(repr, value)) or 'nothing'}"
    if isinstance(value, list) and value:
        return f"a list that holds {type(value[0]).__name__}"
    return type(value).__name__


def _refuse_written_messages(text: str, where: str) -> None:
    """A table's writer may have turned the list of messages into text, as JSON or as Python and numpy
    print it: as a user's words it would be another prompt.
    """
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return
    if _WRITTEN_MESSAGES.fullmatch(text) is None:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return
        if not all(isinstance(item, dict) and {"role", "content"} <= item.keys() for item in found):
            return
    elif "content" not in text or "role" not in text:
        return
    raise MtopdError(
        f"{where}: the prompt is a list of messages written as text; store the list itself"
    )


def _is_question(message: Message) -> bool:
    content = message.get("content")
    is_empty = not content or (isinstance(content, str) and not content.strip())
    return not is_empty and message["role"] != "assistant"


def _check_content(content: Any, where: str) -> None:
    """A message's content is text, parts of text, or nothing (beside tool calls)."""
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list):
        raise MtopdError(
            f"{where}: a message's content is {type(content).__name__}; it must be a string, or a "
            "list of parts of type 'text'"
        )
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise MtopdError(
                f"{where}: a message's content has a part of type {kind!r}; only text is trained: "
                "give a string, or parts of type 'text'"
            )


def _tools(tools: Any, where: str) -> Tools | None:
    """A list of objects, or that as JSON text."""
    if isinstance(tools, str) and tools.strip():
        tools = parse_json(tools.encode("utf-8", "replace"), f"{where}: tools")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise MtopdError(f"{where}: tools must be a list of objects, each the schema of a function")
    return tuple(tools)
