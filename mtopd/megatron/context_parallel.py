"""Context parallelism: which positions of a row a rank works on."""

from __future__ import annotations


def zigzag_chunks(seq_length: int, cp_rank: int, cp_size: int) -> tuple[slice, slice]:
    """The two ranges of positions of a cp rank: of 2 x cp_size equal chunks the r-th from each end,
    so that causal attention costs every rank the same.
    """
    assert seq_length % (2 * cp_size) == 0, (seq_length, cp_size)
    chunk = seq_length // (2 * cp_size)
    first, last = cp_rank, 2 * cp_size - 1 - cp_rank
    return slice(first * chunk, (first + 1) * chunk), slice(last * chunk, (last + 1) * chunk)
