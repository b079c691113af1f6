"""The rollout engines that a config can name.  An engine is called on every rank.

Each is built for the student, or for a baseline of another architecture (``hf_config``), and needs
``update_weights`` before it answers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from mtopd.config import ConsolidateConfig
from mtopd.megatron.agreement import apart, deal
from mtopd.rollout.embedded import EmbeddedEngine
from mtopd.rollout.engine import Engine
from mtopd.rollout.sglang import SGLangEngine, SGLangOptions
from mtopd.rollout.sglang_launch import read_urls
from mtopd.rollout.sglang_proof import ProbeBound
from mtopd.run_dir import RunDir
from mtopd.tokenizer import pad_id

from .scores import score
from .student import Student

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_BATCH = 64  # where there are no rollouts, only evaluations


def embedded(
    student: Student,
    config: ConsolidateConfig | None = None,
    hf_config: PretrainedConfig | None = None,
) -> Engine:
    """A transformers model on each rank.  ``config``: None for a run without rollouts."""
    rollout = config.rollout if config else None
    return EmbeddedEngine(
        hf_config or student.hf_config,
        dtype=student.dtype,
        vocab_size=student.vocab_size,
        ending=student.ending(rollout),
        pad_id=pad_id(student.tokenizer, student.end_ids),
        device=student.ranks.device,
        batch_size=rollout.batch_size if rollout else _BATCH,
        deal=deal,
    )


def sglang(
    student: Student, config: ConsolidateConfig, hf_config: PretrainedConfig | None = None
) -> Engine:
    """SGLang servers, which compute the student's architecture whoever's weights they are given: a
    start refuses baselines of another (``checks.check_baselines``).
    """
    rollout, ranks, run = config.rollout, student.ranks, RunDir(config.run_dir)
    urls = rollout.servers
    if urls == "auto":  # read by their client alone; known since before ranks started
        urls = (read_urls(run.servers) or []) if ranks.rank == 0 else []
    options = SGLangOptions(
        urls,
        context_length=config.data.context_length,
        seeded=rollout.seeded,
        most_open=rollout.open_per_server,
        silence_s=rollout.silence_s,
        patience_s=rollout.patience_s,
        weights_folder=run.weights if rollout.weights == "disk" else None,
        group_note=run.weights_group,
    )
    return SGLangEngine(
        options,
        run_name=str(config.run_dir),
        vocab_size=student.vocab_size,
        dtype=student.dtype,
        ending=student.ending(rollout),
        is_client=ranks.rank == 0,
        apart=functools.partial(apart, ranks),
        score=functools.partial(score, student),
        bound=ProbeBound(None if student.dtype == torch.float32 else run.probe_bound),
        world_size=ranks.world_size,
    )


ENGINES: dict[str, Callable[..., Engine]] = {"embedded": embedded, "sglang": sglang}
