"""The rollout engines that a config can name.  An engine is called on every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mtopd.rollout.embedded import EmbeddedEngine
from mtopd.rollout.engine import Engine
from mtopd.tokenizer import pad_id

from .student import Student

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def embedded(
    student: Student, stop: Sequence[str] = (), hf_config: PretrainedConfig | None = None
) -> Engine:
    """A transformers model on each rank, of ``hf_config`` (default: the student's); it needs
    ``update_weights`` before it answers.
    """
    return EmbeddedEngine(
        hf_config or student.hf_config,
        dtype=student.dtype,
        vocab_size=student.vocab_size,
        ending=student.ending(stop),
        pad_id=pad_id(student.tokenizer, student.end_ids),
        device=student.ranks.device,
    )


ENGINES: dict[str, Callable[..., Engine]] = {"embedded": embedded}
