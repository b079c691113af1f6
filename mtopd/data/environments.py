"""Environments: installed Python callables that reply to the student between its turns.

    def step(turn: mtopd.data.Turn) -> list[dict] | None

is told of a turn that the student has ended, and returns the messages that follow it (role and
content, as the chat template takes them), or None where nothing does: the response is whole.  It
runs in a thread, several at once; what it raises ends that response.  docs/data.md has the contract.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mtopd.tokenizer import Message, Tools
from mtopd.types import MtopdError


@dataclass(frozen=True, slots=True)
class Turn:
    """What an environment is told; all of it is its own copy.

    ``messages``: the whole conversation; the last is what the student said, as text with all tokens
    but the one that ended it.  Another start that lost a reply asks again with equal values.
    """

    conversation: str  # names it: no other of the run, or of an evaluation, has this name
    turn: int  # the student's turns before this one
    messages: list[Message]
    tools: Tools | None
    answer: str | None  # the prompt's, where it has one
    fields: Mapping[str, str]  # the prompt's, for routing
    prompt_id: str
    sample: int  # which of the prompt's responses


Step = Callable[[Turn], "Sequence[Message] | None"]


def load_environment(name: str) -> Step:
    """The callable that ``name``, module:function, says.  Raises MtopdError for what is not installed, or
    takes no turn.
    """
    where = f"environment {name!r}"
    module, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:  # a module may raise anything while it is imported
        raise MtopdError(
            f"{where}: module {module!r} cannot be imported ({type(error).__name__}: {error}); install it "
            "where mtopd is installed, on every host"
        ) from error
    for part in attribute.split("."):
        if (found := getattr(found, part, None)) is None:
            raise MtopdError(
                f"{where}: {module!r} has no {attribute!r}; give module:function of an installed callable"
            )
    if not callable(found) or inspect.iscoroutinefunction(found):
        kind = "a coroutine function" if callable(found) else f"{type(found).__name__}"
        raise MtopdError(f"{where} is {kind}; it must be a plain callable that takes one Turn")
    try:
        inspect.signature(found).bind(None)
    except TypeError:
        raise MtopdError(f"{where} cannot be called with one argument, the Turn") from None
    except ValueError:  # a builtin does not say what it takes
        pass
    step: Step = found
    return step


def check_reply(reply: object) -> list[dict[str, Any]]:
    """The messages of a reply; empty: nothing follows.  Raises MtopdError for anything else."""
    if reply is None:
        return []
    if not isinstance(reply, list | tuple):
        raise MtopdError(
            f"it returned {type(reply).__name__}; it must be a list of messages, or None"
        )
    for message in reply:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise MtopdError("it returned a message that is no dict with a role")
        if not isinstance(message.get("content"), str):
            raise MtopdError("it returned a message whose content is no text")
    if reply and reply[-1]["role"] == "assistant":
        raise MtopdError("its last message is the assistant's; it must end where one answers")
    return [dict(message) for message in reply]
