"""The plan of an iteration's train steps; of a train step's micro-batches on this rank, which teacher
scores which loss rows, and their tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from mtopd.megatron.micro_batch import PackedMicroBatch
from mtopd.megatron.packing import loss_rows_of_rank, pack_rows
from mtopd.objectives import SampledTokens, TeacherRows
from mtopd.planning import plan_train_steps
from mtopd.trajectories import TokenFields
from mtopd.types import (
    MicroBatch,
    PlannedSample,
    SampleMetadata,
    SampleRows,
    TeacherRun,
    TrainStepPlan,
    num_input_tokens,
)

from .iteration import Iteration
from .session import Session

Mask = npt.NDArray[np.uint8]
Runs = Sequence[Sequence[TeacherRun]]  # of each micro-batch of this rank


def plan(
    session: Session, iteration: Iteration, samples: Sequence[SampleMetadata]
) -> list[TrainStepPlan]:
    """The iteration's train steps, for this layout: a function of metadata alone, the same on every
    rank.
    """
    config, student = session.config, session.student
    return plan_train_steps(
        samples,
        num_train_steps=config.train.train_steps_per_iteration,
        teacher_weights=config.teacher_weights,
        dp_size=session.ranks.dp_size,
        micro_batch_size=config.train.micro_batch_size,
        token_budget=config.train.token_budget,
        seq_length_multiple=student.trainer.seq_length_multiple,
        micro_batch_multiple=student.trainer.micro_batch_multiple,
        cost=student.facts.architecture.sample_cost,
        normalization=config.train.normalization,
        seed=iteration.seed,
    )


def num_positions(iteration: Iteration, step_plan: TrainStepPlan) -> int:
    """Tokens of the whole mini-batch that the model reads; padding does not count."""
    planned = (s for part in step_plan.micro_batches for batch in part for s in batch.samples)
    samples = (iteration.tokens.samples[s.sample_id] for s in planned)
    return sum(num_input_tokens(s.prompt_len, s.response_len) for s in samples)


def teacher_runs(session: Session, iteration: Iteration, step_plan: TrainStepPlan) -> Runs:
    """Contiguous runs of one teacher among the loss rows of this rank's micro-batches; none off the
    last stage.
    """

    def runs_of(micro_batch: MicroBatch) -> list[TeacherRun]:
        rows = []
        for planned in micro_batch.samples:
            s = iteration.tokens.samples[planned.sample_id]
            key, tokens = iteration.cache_key(s), trained_tokens(iteration, planned)
            parts = loss_rows_of_rank(tokens, step_plan.seq_length, session.ranks)
            cached = iteration.tokens.tokens(s.sample_id)
            if tokens is not cached:
                parts = [*rows_among(cached.loss_mask, tokens.loss_mask, parts)]
            rows += [
                SampleRows(s.sample_id, s.teacher_index, key, part.start, part.stop)
                for part in parts
            ]
        runs: list[TeacherRun] = []
        for teacher_index, group in itertools.groupby(rows, key=lambda r: r.teacher_index):
            entries = list(group)
            start = runs[-1].stop if runs else 0
            stop = start + sum(r.stop - r.first for r in entries)
            runs.append(TeacherRun(teacher_index, start, stop, entries))
        return runs

    micro_batches = step_plan.micro_batches[session.ranks.dp_rank]
    if not session.ranks.is_last_stage:
        return [[] for _ in micro_batches]
    return [runs_of(micro_batch) for micro_batch in micro_batches]


def trained_tokens(iteration: Iteration, planned: PlannedSample) -> TokenFields:
    """The sample's tokens; with loss mask 0 where it has no weight in its train step, and for tokens
    of students that are too old.
    """
    fields = iteration.tokens.tokens(planned.sample_id)
    if planned.token_weight:
        mask = fields.loss_mask_since(iteration.oldest_trained)
        return fields if mask is fields.loss_mask else replace(fields, loss_mask=mask)
    return replace(fields, loss_mask=np.zeros_like(fields.loss_mask))


def rows_among(
    cached_mask_T: Mask, trained_mask_T: Mask, parts: Sequence[range]
) -> Iterator[range]:
    """``parts`` of the trained tokens' rows as ranges of the cached rows: the hidden cache has one for
    each loss token of the trajectory, trained or not.
    """
    row_of = trained_mask_T[cached_mask_T != 0].nonzero()[0]
    for part in parts:
        rows = row_of[part.start : part.stop]
        for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
            yield range(int(run[0]), int(run[-1]) + 1)


def pack(
    session: Session, iteration: Iteration, step_plan: TrainStepPlan, runs: Runs
) -> list[PackedMicroBatch]:
    """The tensors of this rank's micro-batches, each with its runs and the tokens they predict."""
    num_rows = 1 if step_plan.packed else session.config.train.micro_batch_size or 1
    micro_batches = step_plan.micro_batches[session.ranks.dp_rank]
    return [
        pack_rows(
            [trained_tokens(iteration, planned) for planned in micro_batch.samples],
            [s.token_weight for s in micro_batch.samples],
            shape=(num_rows, step_plan.seq_length),
            packed=step_plan.packed,
            ranks=session.ranks,
            payload=TeacherRows(own, sampled_tokens(session, iteration, own)),
        )
        for micro_batch, own in zip(micro_batches, runs, strict=True)
    ]


def sampled_tokens(
    session: Session, iteration: Iteration, runs: Sequence[TeacherRun]
) -> SampledTokens:
    """The tokens that the rows of a micro-batch predict; none off the last stage."""
    ids, log_probs = [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
    for rows in (rows for run in runs for rows in run.samples):
        fields = iteration.tokens.tokens(rows.sample_id)
        trained = fields.loss_mask.nonzero()[0][rows.first : rows.stop]
        ids.append(fields.response_ids[trained])
        log_probs.append(fields.rollout_log_probs[trained])
    device = session.ranks.device
    return SampledTokens(
        torch.from_numpy(np.concatenate(ids)).to(device, torch.long),
        torch.from_numpy(np.concatenate(log_probs)).to(device),
    )
