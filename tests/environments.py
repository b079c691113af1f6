"""Environments that tests name in a config: installed callables, as a user's are."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtopd.data import Turn


def count_letters(turn: Turn) -> list[dict[str, Any]] | None:
    """Replies by what was said alone: goes on, ends or fails, each of them often."""
    said = turn.messages[-1]["content"]
    letters = sum(map(str.isalpha, said))
    if letters % 5 == 3:
        return None
    if letters % 11 == 7:
        raise RuntimeError(f"{letters} letters are too many")
    return [{"role": "user", "content": f"{letters} in {turn.turn}:"}]


def counted(turn: Turn) -> list[dict[str, Any]] | None:
    """``count_letters`` that notes each call in the file that CALLS names, before it replies."""
    path = os.environ["CALLS"]
    with open(path, "a") as file:
        file.write(f"{turn.conversation} {turn.turn}\n")
    return count_letters(turn)


def slow(turn: Turn) -> list[dict[str, Any]] | None:
    """``counted``, a call of which takes long enough to be killed in."""
    time.sleep(0.05)
    return counted(turn)


def calls_in(path: Path) -> Sequence[str]:
    return path.read_text().splitlines() if path.exists() else []


async def coroutine(turn: Turn) -> None:
    """No environment: nobody would await it."""


def two_arguments(turn: Turn, more: int) -> None:
    """No environment: it is called with a turn alone."""


NOT_CALLABLE = 3
