"""The rollout engines that a config can name.  An engine is called on every rank."""

from __future__ import annotations

from collections.abc import Callable

from mtopd.rollout.embedded import EmbeddedEngine
from mtopd.rollout.engine import Engine

from .student import Student


def embedded(student: Student) -> Engine:
    """A transformers model on each rank; it needs ``update_weights`` before it answers."""
    tokenizer = student.tokenizer
    return EmbeddedEngine(
        student.hf_config,
        dtype=student.dtype,
        vocab_size=student.vocab_size,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        device=student.ranks.device,
    )


ENGINES: dict[str, Callable[[Student], Engine]] = {"embedded": embedded}
