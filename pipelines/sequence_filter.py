"""The sequence filter: a sample whose log-probs differ too much between rollout and trainer is not
trained.

Before an iteration's first update the trainer reads every sample once, forward only, with the
weights that sampled it (with ``rollout.overlap`` they may be one iteration younger).  A sample that
exceeds ``train.sequence_filter`` keeps its place in its train step with loss mask 0: it counts in no
N.  All ranks hold the same sums, so they plan alike.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mtopd.kernels import label_log_probs
from mtopd.metrics_lines import SequenceFilterLine
from mtopd.objectives import TeacherRows
from mtopd.step_sums import LocalSums
from mtopd.types import MtopdError, SampleMetadata

from .iteration import Iteration
from .micro_batches import pack, plan, teacher_runs
from .session import Session


def trained_samples(
    session: Session, iteration: Iteration, samples: list[SampleMetadata]
) -> list[SampleMetadata]:
    """The iteration's samples, those that are left out without loss tokens.  Collective."""
    limit = session.config.train.sequence_filter
    if limit is None:
        return samples
    started = time.perf_counter()
    sums = difference_sums(session, iteration, samples)
    means = [
        total / sample.num_loss_tokens if sample.num_loss_tokens else 0.0
        for sample, total in zip(samples, sums, strict=True)
    ]
    is_kept = [mean <= math.log(limit) for mean in means]  # NaN is not
    kept = [
        sample if keep else replace(sample, num_loss_tokens=0)
        for sample, keep in zip(samples, is_kept, strict=True)
    ]
    with_loss = [m for sample, m in zip(samples, means, strict=True) if sample.num_loss_tokens]
    if with_loss and not any(sample.num_loss_tokens for sample in kept):
        lowest = min((m for m in with_loss if not math.isnan(m)), default=math.nan)
        raise MtopdError(
            f"train.sequence_filter {limit:g} leaves none of {len(samples)} samples: the smallest "
            f"mean difference of log-probs between trainer and rollout is {lowest:.3g} nats, "
            f"{math.log(limit):.3g} are allowed; the rollout engine sampled with other weights or "
            "another tokenizer"
        )
    line = SequenceFilterLine(
        samples=len(samples),
        samples_filtered=is_kept.count(False),
        tokens_filtered=sum(s.num_loss_tokens for s in samples)
        - sum(s.num_loss_tokens for s in kept),
        wall_s=time.perf_counter() - started,
    )
    session.metrics.write(line, iteration.number)
    return kept


def difference_sums(
    session: Session, iteration: Iteration, samples: list[SampleMetadata]
) -> list[float]:
    """Of each sample the sum of |log-prob of trainer minus that of rollout| over its loss tokens, on
    every rank.  Collective.
    """
    trainer, ranks = session.student.trainer, session.ranks
    number_of = {sample.sample_id: number for number, sample in enumerate(samples)}
    # 8 bytes a sample beside its SampleMetadata, which every rank plans from and is larger.
    sums_S = np.zeros(len(samples))

    def add(hidden_TD: torch.Tensor, weight_vD: torch.Tensor, micro_batch: Any) -> torch.Tensor:
        teacher_rows: TeacherRows = micro_batch.payload
        log_prob_T = label_log_probs(
            hidden_TD,
            weight_vD,
            teacher_rows.sampled.id_T,
            vocab_size=session.student.vocab_size,
            tp_group=ranks.tp_group,
        )
        difference_T = (log_prob_T - teacher_rows.sampled.rollout_log_prob_T).abs().double()
        rows = [rows for run in teacher_rows.runs for rows in run.samples]
        owners = np.array([number_of[r.sample_id] for r in rows], np.int64)
        lengths = np.array([r.stop - r.first for r in rows], np.int64)
        np.add.at(sums_S, np.repeat(owners, lengths), difference_T.cpu().numpy())
        return log_prob_T.sum()

    for step_plan in plan(session, iteration, samples):
        runs = teacher_runs(session, iteration, step_plan)
        trainer.forward(pack(session, iteration, step_plan, runs), add)
    local = LocalSums({}, {"difference": torch.from_numpy(sums_S)})
    return [*trainer.reduce(lambda: local).vectors["difference"]]
