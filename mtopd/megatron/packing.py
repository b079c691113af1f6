"""Where the tokens of samples stand in a micro-batch, and which of their loss rows a cp rank has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from mtopd.megatron import cpu
from mtopd.megatron.context_parallel import zigzag_chunks
from mtopd.megatron.micro_batch import PackedMicroBatch
from mtopd.megatron.parallel import Ranks
from mtopd.types import first_loss_position, num_input_tokens

Integers = NDArray[np.integer[Any]]


class TrainedTokens(Protocol):
    """A prompt, a response, and which of the response's tokens are trained."""

    @property
    def prompt_ids(self) -> Sequence[int] | Integers: ...
    @property
    def response_ids(self) -> Sequence[int] | Integers: ...
    @property
    def loss_mask(self) -> Sequence[int] | Integers: ...


def loss_positions(samples: Sequence[TrainedTokens]) -> tuple[Integers, Integers]:
    """Where in its sample each trained token is predicted, and the number of that sample, in order
    of samples, then positions.
    """
    trained = np.concatenate(
        [np.zeros(0, np.uint8), *(sample.loss_mask for sample in samples)]
    ).nonzero()[0]
    lengths = [len(sample.response_ids) for sample in samples]
    owners = np.repeat(np.arange(len(samples)), lengths)[trained]
    firsts = [first_loss_position(len(sample.prompt_ids)) for sample in samples]
    return trained + (np.array(firsts, np.int64) - _starts(lengths)[:-1])[owners], owners


def loss_rows_of_rank(sample: TrainedTokens, seq_length: int, ranks: Ranks) -> list[range]:
    """The sample's loss rows whose positions this cp rank has: all of them, or those in its two
    ranges of the zigzag.
    """
    if ranks.cp_size == 1:
        rows = [range(int(np.count_nonzero(sample.loss_mask)))]
    else:
        positions, _ = loss_positions([sample])
        chunks = zigzag_chunks(seq_length, ranks.cp_rank, ranks.cp_size)
        rows = [
            range(*np.searchsorted(positions, (chunk.start, chunk.stop)).tolist())
            for chunk in chunks
        ]
    return [part for part in rows if part]


@cpu.no_device_rewrite()
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
    lengths = [num_input_tokens(len(s.prompt_ids), len(s.response_ids)) for s in samples]
    starts = _starts(lengths)  # of the samples, one behind the other
    begins = starts[:-1] if packed else np.arange(len(samples)) * shape[1]
    place_of_token = np.arange(starts[-1]) + np.repeat(begins - starts[:-1], lengths)
    # The last token of a response is never an input: nothing after it is predicted.
    tokens = [part for s in samples for part in (s.prompt_ids, s.response_ids[:-1])]
    input_ids_BS = np.zeros(shape, np.int64)
    position_ids_BS = np.tile(np.arange(shape[1]), (shape[0], 1))
    input_ids_BS.reshape(-1)[place_of_token] = np.concatenate([np.zeros(0, np.int64), *tokens])
    positions, owners = loss_positions(samples)
    if packed:
        positions += starts[owners]
        if starts[-1] < shape[1]:  # the padding is a sample of its own
            starts = np.append(starts, shape[1])
        position_ids_BS[0] -= np.repeat(starts[:-1], np.diff(starts))
    if ranks.cp_size > 1:
        positions_S = np.arange(shape[1])
        chunks = zigzag_chunks(shape[1], ranks.cp_rank, ranks.cp_size)
        held = np.concatenate([positions_S[chunk] for chunk in chunks])
        input_ids_BS = input_ids_BS.take(held, 1)
        position_ids_BS = position_ids_BS.take(held, 1)
        is_held = np.isin(positions, held)
        positions = np.searchsorted(held, positions[is_held])
        owners = owners[is_held]
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


def _starts(lengths: Sequence[int]) -> Integers:
    """Start of each of several consecutive pieces of these ``lengths``, and the end of the last."""
    return np.cumsum([0, *lengths])
