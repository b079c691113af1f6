"""Plan a teacher pass: which replica of a teacher runs which samples, in which batches and waves.

Strategy:

1. Deal the samples to the replicas, the longest first, each to the replica with the fewest tokens.
2. Cut each replica's samples, longest first, into batches of neighbours in length.
3. Put the k-th batches of all replicas side by side: a *round*.  Leave out the rounds in which no
   sample is requested.
4. Collect rounds into *waves* whose activations fit the budget; each wave streams the whole teacher
   once.

Promises:

- Every sample is in one batch of one replica; the k-th batches of all replicas are a round and run
  side by side.
- Replicas are balanced by tokens: longest first onto the least loaded.
- A batch holds neighbours in length; its padded tokens stay within ``batch_tokens`` unless it is a
  single sample.
- A round without a requested sample is left out; all others are the same for any ``requested``.
- The padded tokens of a wave's batches, times ``token_bytes``, stay within ``activation_budget``.
- A wave ends after the same round on all replicas, and only where the next would exceed the budget
  of one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence, Set
from dataclasses import dataclass

from mtopd.types import MtopdError


@dataclass(frozen=True)
class Wave:
    """Batches of sample indices of one replica.  ``num_batches``: what every replica runs, with
    empty ones if need be.

    Experts of all ranks take part in every batch: a rank that ran fewer would leave the others
    waiting.
    """

    batches: list[list[int]]
    num_batches: int


def plan_pass(
    lengths: Sequence[int],
    num_replicas: int,
    *,
    batch_tokens: int,
    token_bytes: int,
    activation_budget: int,
    requested: Set[int] | None = None,
) -> list[list[Wave]]:
    """``result[replica]`` lists the replica's waves.

    ``requested``: the samples whose states are asked for, None for all; the others may run beside
    them.  The last bits of a state depend on how long and how many its neighbours in the batch are
    and, where experts are shared, on the batches of the other replicas at its side.  So what a
    killed pass lacks is run in the batches of the whole pass.

    Raises MtopdError when one sample alone exceeds the budget.
    """
    if lengths and max(lengths) * token_bytes > activation_budget:
        raise MtopdError(
            f"teacher_offload.activation_budget is {activation_budget} bytes, but one sample of "
            f"{max(lengths)} tokens takes {max(lengths) * token_bytes}; raise it to at least that"
        )
    wave_tokens = activation_budget // token_bytes
    parts = [
        _length_sorted_batches(part, lengths, min(batch_tokens, wave_tokens))
        for part in _split_over_replicas(lengths, num_replicas)
    ]
    waves: list[list[tuple[list[int], ...]]] = [[]]  # rounds of each
    held = [0] * num_replicas
    for batches in itertools.zip_longest(*parts, fillvalue=[]):
        if requested is not None and all(requested.isdisjoint(batch) for batch in batches):
            continue
        padded = [len(batch) * lengths[batch[0]] if batch else 0 for batch in batches]
        if any(h + p > wave_tokens for h, p in zip(held, padded, strict=True)):
            waves.append([])
            held = [0] * num_replicas
        waves[-1].append(batches)
        held = [h + p for h, p in zip(held, padded, strict=True)]
    # A replica that has run out of batches has none in any later round: its empty ones are the last
    # of a wave.
    return [
        [
            Wave([batches[replica] for batches in wave if batches[replica]], len(wave))
            for wave in waves
        ]
        for replica in range(num_replicas)
    ]


def _split_over_replicas(lengths: Sequence[int], num_replicas: int) -> list[list[int]]:
    """Indices of samples for each replica: longest first onto the least loaded."""
    loads = [0] * num_replicas
    parts: list[list[int]] = [[] for _ in range(num_replicas)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        replica = min(range(num_replicas), key=lambda r: (loads[r], r))
        loads[replica] += lengths[i]
        parts[replica].append(i)
    return parts


def _length_sorted_batches(
    part: Sequence[int], lengths: Sequence[int], batch_tokens: int
) -> list[list[int]]:
    """Batches of neighbours in length, longest first (as ``part`` is)."""
    batches: list[list[int]] = []
    for i in part:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
