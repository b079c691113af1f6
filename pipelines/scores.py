"""Log-probs of given tokens as the student under training computes them, at any layout.

What a rollout engine's weights are proven by, and what its log-probs are compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mtopd.kernels import label_log_probs
from mtopd.megatron.agreement import gather
from mtopd.megatron.packing import loss_rows_of_rank, pack_rows

from .student import Student

_Rows = list[tuple[int, int, np.ndarray]]  # number of the sequence, first loss row, log-probs


@dataclass(frozen=True)
class _Sequence:
    """All tokens but the first are predicted."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    loss_mask: Sequence[int]


def score(student: Student, sequences: Sequence[Sequence[int]]) -> list[np.ndarray] | None:
    """Log-probs [length - 1] in float64 of each sequence's tokens behind its first, on rank 0; None
    elsewhere.  Every dp rank computes all: few sequences.  Collective.
    """
    ranks, trainer = student.ranks, student.trainer
    samples = [_Sequence(ids[:1], ids[1:], [1] * (len(ids) - 1)) for ids in sequences]
    multiple = trainer.seq_length_multiple
    seq_length = -(-max(len(ids) - 1 for ids in sequences) // multiple) * multiple
    groups = trainer.micro_batch_multiple  # an interleaved schedule takes so many at once
    size = -(-len(samples) // groups)
    micro_batches = []
    for start in range(0, size * groups, size):
        part = samples[start : start + size]
        rows = [
            (start + number, row)
            for number, sample in enumerate(part)
            for row in loss_rows_of_rank(sample, seq_length, ranks)
        ]
        labels = [
            token
            for number, row in rows
            for token in samples[number].response_ids[row.start : row.stop]
        ]
        micro_batches.append(
            pack_rows(
                part,
                [0.0] * len(part),
                shape=(size, seq_length),
                packed=False,
                ranks=ranks,
                payload=(rows, torch.tensor(labels, dtype=torch.long, device=ranks.device)),
            )
        )
    found: _Rows = []

    def keep(hidden_TD: torch.Tensor, weight_vD: torch.Tensor, micro_batch: Any) -> torch.Tensor:
        rows, labels_T = micro_batch.payload
        log_prob_T = label_log_probs(
            hidden_TD, weight_vD, labels_T, vocab_size=student.vocab_size, tp_group=ranks.tp_group
        )
        values = log_prob_T.double().cpu().numpy()
        done = 0
        for number, row in rows:
            found.append((number, row.start, values[done : done + len(row)]))
            done += len(row)
        return log_prob_T.sum()

    trainer.forward(micro_batches, keep)
    holds = ranks.is_last_stage and ranks.tp_rank == 0 and ranks.dp_rank == 0
    everywhere = gather(ranks, lambda: found if holds else [])
    if ranks.rank != 0:
        return None
    log_probs = [np.full(len(ids) - 1, np.nan) for ids in sequences]
    for number, first, values in (piece for rank in everywhere for piece in rank):
        log_probs[number][first : first + len(values)] = values
    return log_probs
