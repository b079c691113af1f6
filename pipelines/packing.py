"""Where the tokens of samples stand in a micro-batch, and which of their loss rows a cp rank has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from mtopd.megatron.parallel import Ranks, zigzag_chunks
from mtopd.megatron.train_step import PackedMicroBatch


class TrainedTokens(Protocol):
    """A prompt, a response, and which of the response's tokens are trained."""

    @property
    def prompt_ids(self) -> Any: ...
    @property
    def response_ids(self) -> Any: ...
    @property
    def loss_mask(self) -> Any: ...


class RowRange(NamedTuple):
    """Loss rows [first, stop) of a sample, all on this cp rank; ``offset`` + position in the whole row = place here."""

    first: int
    stop: int
    offset: int


def loss_positions(sample: TrainedTokens) -> Any:
    """Where a sample's trained tokens are predicted, ascending: response token k at position prompt_len - 1 + k."""
    return len(sample.prompt_ids) - 1 + np.flatnonzero(sample.loss_mask)


def rows_here(positions: Any, seq_length: int, ranks: Ranks) -> list[RowRange]:
    """The loss rows whose positions this cp rank has: all of them, or those in its two ranges of the zigzag."""
    if ranks.cp_size == 1:
        return [RowRange(0, len(positions), 0)] if len(positions) else []
    here, start = [], 0
    for chunk in zigzag_chunks(seq_length, ranks.cp_rank, ranks.cp_size):
        first, stop = np.searchsorted(positions, [chunk.start, chunk.stop]).tolist()
        here.append(RowRange(first, stop, start - chunk.start))
        start += chunk.stop - chunk.start
    return [rows for rows in here if rows.first < rows.stop]


def pack_rows(
    samples: Sequence[TrainedTokens],
    token_weights: Sequence[float],
    *,
    shape: tuple[int, int],
    packed: bool,
    ranks: Ranks,
    payload: Any,
) -> PackedMicroBatch:
    """Lay samples out in ``shape`` [B, S], each in its own row or, packed, one behind the other in the only row.

    Loss rows stand in order of samples, then positions.  Under context parallelism the result has this rank's part.
    """
    assert len(samples) == len(token_weights)
    input_ids_BS, position_ids_BS = np.zeros(shape, np.int64), np.tile(np.arange(shape[1]), (shape[0], 1))
    positions, owners = [np.zeros(0, np.int64)], [0]  # of consecutive loss rows: where they stand, whose they are
    starts = [0]  # of the samples in a packed row
    for number, sample in enumerate(samples):
        row, begin = (0, starts[-1]) if packed else (number, 0)
        middle, end = begin + len(sample.prompt_ids), begin + len(sample.prompt_ids) + len(sample.response_ids) - 1
        input_ids_BS[row, begin:middle], input_ids_BS[row, middle:end] = sample.prompt_ids, sample.response_ids[:-1]
        if packed:
            position_ids_BS[0, begin:end] = np.arange(end - begin)
        starts.append(end)
        found = loss_positions(sample)
        for here in rows_here(found, shape[1], ranks):
            positions.append(found[here.first : here.stop] + (begin + here.offset))
            owners.append(number)
    owner_T = np.repeat(owners, [len(part) for part in positions])
    if packed:  # the padding is a sample of its own
        padding = shape[1] - starts[-1]
        position_ids_BS[0, starts[-1] :] = np.arange(padding)
        starts += [shape[1]] if padding else []
    if ranks.cp_size > 1:
        chunks = zigzag_chunks(shape[1], ranks.cp_rank, ranks.cp_size)
        input_ids_BS, position_ids_BS = (
            np.concatenate([array[:, chunk] for chunk in chunks], axis=1) for array in (input_ids_BS, position_ids_BS)
        )
    return PackedMicroBatch(
        input_ids_BS=torch.from_numpy(input_ids_BS).to(ranks.device),
        position_ids_BS=torch.from_numpy(position_ids_BS).to(ranks.device),
        position_T=torch.from_numpy(np.concatenate(positions)).to(ranks.device),
        row_T=torch.from_numpy(np.zeros_like(owner_T) if packed else owner_T).to(ranks.device),
        token_weight_T=torch.from_numpy(np.array(token_weights, np.float32)[owner_T]).to(ranks.device),
        payload=payload,
        cu_seqlens=torch.tensor(starts, dtype=torch.int32, device=ranks.device) if packed else None,
        max_seqlen=int(max(np.diff(starts))) if packed else 0,
    )
