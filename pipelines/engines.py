"""The rollout engines that a config can name.  An engine is called on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mtopd.config import RolloutConfig
from mtopd.megatron.agreement import deal
from mtopd.rollout.embedded import EmbeddedEngine
from mtopd.rollout.engine import Engine
from mtopd.tokenizer import pad_id

from .student import Student

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_BATCH = 64  # where there are no rollouts, only evaluations


def embedded(
    student: Student,
    config: RolloutConfig | None = None,
    hf_config: PretrainedConfig | None = None,
) -> Engine:
    """A transformers model on each rank, of ``hf_config`` (default: the student's); it needs
    ``update_weights`` before it answers.  ``config``: None for a run without rollouts.
    """
    return EmbeddedEngine(
        hf_config or student.hf_config,
        dtype=student.dtype,
        vocab_size=student.vocab_size,
        ending=student.ending(config),
        pad_id=pad_id(student.tokenizer, student.end_ids),
        device=student.ranks.device,
        batch_size=config.batch_size if config else _BATCH,
        deal=deal,
    )


ENGINES: dict[str, Callable[..., Engine]] = {"embedded": embedded}
