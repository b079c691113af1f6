"""Where the tokens of samples stand in a micro-batch, and which of their loss rows a cp rank has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from mtopd.megatron import cpu
from mtopd.megatron.context_parallel import zigzag_chunks
from mtopd.megatron.parallel import Ranks
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
    """Loss rows [first, stop) of a sample, all on this cp rank."""

    first: int
    stop: int


def loss_positions(samples: Sequence[TrainedTokens]) -> tuple[Any, Any]:
    """Where in its sample each trained token is predicted, and whose it is, in order of samples,
    then positions.

    Response token k is predicted at position prompt_len - 1 + k.
    """
    trained = np.concatenate(
        [np.zeros(0, np.uint8), *(sample.loss_mask for sample in samples)]
    ).nonzero()[0]
    lengths = [len(sample.response_ids) for sample in samples]
    owners = np.repeat(np.arange(len(samples)), lengths)[trained]
    before = (
        np.array([len(sample.prompt_ids) - 1 for sample in samples], np.int64)
        - _starts(lengths)[:-1]
    )
    return trained + before[owners], owners


def rows_here(sample: TrainedTokens, seq_length: int, ranks: Ranks) -> list[RowRange]:
    """The loss rows whose positions this cp rank has: all of them, or those in its two ranges of
    the zigzag.
    """
    if ranks.cp_size == 1:
        here = [RowRange(0, int(np.count_nonzero(sample.loss_mask)))]
    else:
        positions, _ = loss_positions([sample])
        bounds = [
            (chunk.start, chunk.stop)
            for chunk in zigzag_chunks(seq_length, ranks.cp_rank, ranks.cp_size)
        ]
        here = [RowRange(*np.searchsorted(positions, chunk).tolist()) for chunk in bounds]
    return [rows for rows in here if rows.first < rows.stop]


@cpu.own_code()
def pack_rows(
    samples: Sequence[TrainedTokens],
    token_weights: Sequence[float],
    *,
    shape: tuple[int, int],
    packed: bool,
    ranks: Ranks,
    payload: Any,
) -> PackedMicroBatch:
    """Lay samples out in ``shape`` [B, S], each in its own row or, packed, one behind the other in
    the only row.

    Loss rows stand in order of samples, then positions.  Under context parallelism the result has
    this rank's part.
    """
    assert len(samples) == len(token_weights)
    lengths = [len(sample.prompt_ids) + len(sample.response_ids) - 1 for sample in samples]
    starts = _starts(lengths)  # of the samples, one behind the other
    places = (
        starts[:-1] if packed else np.arange(len(samples)) * shape[1]
    )  # where they are to begin
    place_of_token = np.arange(starts[-1]) + np.repeat(places - starts[:-1], lengths)
    tokens = [part for sample in samples for part in (sample.prompt_ids, sample.response_ids[:-1])]
    input_ids_BS, position_ids_BS = (
        np.zeros(shape, np.int64),
        np.tile(np.arange(shape[1]), (shape[0], 1)),
    )
    input_ids_BS.reshape(-1)[place_of_token] = np.concatenate([np.zeros(0, np.int64), *tokens])
    positions, owners = loss_positions(samples)
    if packed:
        positions += starts[owners]
        starts = (
            np.append(starts, shape[1]) if starts[-1] < shape[1] else starts
        )  # the padding is a sample of its own
        position_ids_BS[0] -= np.repeat(starts[:-1], np.diff(starts))
    if ranks.cp_size > 1:
        whole = np.arange(shape[1])
        here = np.concatenate(
            [whole[chunk] for chunk in zigzag_chunks(shape[1], ranks.cp_rank, ranks.cp_size)]
        )
        input_ids_BS, position_ids_BS = input_ids_BS.take(here, 1), position_ids_BS.take(here, 1)
        is_here = np.isin(positions, here)
        positions, owners = np.searchsorted(here, positions[is_here]), owners[is_here]
    return PackedMicroBatch(
        input_ids_BS=torch.from_numpy(input_ids_BS).to(ranks.device),
        position_ids_BS=torch.from_numpy(position_ids_BS).to(ranks.device),
        position_T=torch.from_numpy(positions).to(ranks.device),
        row_T=torch.from_numpy(np.zeros_like(owners) if packed else owners).to(ranks.device),
        token_weight_T=torch.from_numpy(np.array(token_weights, np.float32)[owners]).to(
            ranks.device
        ),
        payload=payload,
        cu_seqlens=torch.tensor(starts, dtype=torch.int32, device=ranks.device) if packed else None,
        max_seqlen=int(np.diff(starts).max()) if packed else 0,
    )


def _starts(lengths: Sequence[int]) -> Any:
    """Where each of some things stands that lie one behind the other, and where the last one ends."""
    return np.cumsum([0, *lengths])
