"""Plan a teacher pass: which replica of a teacher runs which samples, in which batches and waves.

Strategy:

1. Cut the iteration's samples into *quarters*, by the names of their shards; steps 2 and 3 are done
   for each quarter by itself.
2. Deal the samples to the replicas, the longest first, each to the replica with the fewest tokens.
3. Cut each replica's samples, longest first, into batches of neighbours in length.  Put the k-th
   batches of all replicas side by side: a *round*.  Leave out the rounds in which no sample is
   requested.
4. Collect the rounds of all quarters into *waves* whose activations fit the budget; each wave streams
   the whole teacher once.

Promises:

- Every sample is in one batch of one replica; the k-th batches of all replicas are a round and run
  side by side.
- A round holds samples of one quarter, and is the same whichever other quarters are planned: a
  quarter can run while the answers of the others are still being sampled.
- In a quarter replicas are balanced by tokens: longest first onto the least loaded.
- A batch holds neighbours in length; its padded tokens stay within ``batch_tokens`` unless it is a
  single sample, and its padding within a sixteenth of that.
- A round without a requested sample is left out; all others are the same for any ``requested``.
- The padded tokens of a wave's batches, times ``token_bytes``, stay within ``activation_budget``.
- A wave ends after the same round on all replicas, and only where the next would exceed the budget
  of one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import TypeVar

from mtopd.types import MtopdError

T = TypeVar("T")
_QUARTERS = 4
_PADDING = 16


@dataclass(frozen=True)
class Wave:
    """Batches of sample indices of one replica, one for every round of the wave.  An empty one: other
    replicas have one there.

    Experts of all ranks take part in every batch: a rank that ran fewer would leave the others
    waiting.
    """

    batches: list[list[int]]


def quarters(shards: Sequence[T]) -> list[Sequence[T]]:
    """The shards of a whole iteration, in their order, in four parts that differ by one shard at most;
    fewer where there are fewer shards.

    It is always cut like this, so that no bit of a state depends on when its quarter ran.  Four: a
    quarter that runs by itself costs another stream of its teachers, and leaves batches that are
    not full; what is left for after the rollout is a quarter or little more.
    """
    count = min(_QUARTERS, len(shards))
    ends = [len(shards) * i // count for i in range(count + 1)] if count else [0]
    return [shards[start:end] for start, end in itertools.pairwise(ends)]


def plan_pass(
    quarter_lengths: Sequence[Sequence[int]],
    num_replicas: int,
    *,
    batch_tokens: int,
    token_bytes: int,
    activation_budget: int,
    requested: Set[int] | None = None,
) -> list[list[Wave]]:
    """``result[replica]`` lists the replica's waves.

    ``quarter_lengths``: tokens of the samples of each quarter; samples are counted through, from 0.
    ``requested``: the samples whose states are asked for, None for all; the others may run beside
    them.  The last bits of a state depend on how long and how many its neighbours in the batch are
    and, where experts are shared, on the batches of the other replicas at its side.  So what a
    killed pass lacks is run in the batches of the whole pass.

    Raises MtopdError when one sample alone exceeds the budget.
    """
    lengths = [*itertools.chain.from_iterable(quarter_lengths)]
    ends = [0, *itertools.accumulate(map(len, quarter_lengths))]
    if lengths and max(lengths) * token_bytes > activation_budget:
        raise MtopdError(
            f"teacher_offload.activation_budget is {activation_budget} bytes, but one sample of "
            f"{max(lengths)} tokens takes {max(lengths) * token_bytes}; raise it to at least that"
        )
    wave_tokens = activation_budget // token_bytes
    rounds: list[tuple[list[int], ...]] = []
    for quarter in itertools.starmap(range, itertools.pairwise(ends)):
        parts = [
            _length_sorted_batches(part, lengths, min(batch_tokens, wave_tokens))
            for part in _split_over_replicas(quarter, lengths, num_replicas)
        ]
        rounds += itertools.zip_longest(*parts, fillvalue=[])
    waves: list[list[tuple[list[int], ...]]] = [[]]  # rounds of each
    held = [0] * num_replicas
    for batches in rounds:
        if requested is not None and all(requested.isdisjoint(batch) for batch in batches):
            continue
        padded = [len(batch) * lengths[batch[0]] if batch else 0 for batch in batches]
        if any(h + p > wave_tokens for h, p in zip(held, padded, strict=True)):
            waves.append([])
            held = [0] * num_replicas
        waves[-1].append(batches)
        held = [h + p for h, p in zip(held, padded, strict=True)]
    return [
        [Wave([batches[replica] for batches in wave]) for wave in waves]
        for replica in range(num_replicas)
    ]


def _split_over_replicas(
    samples: Sequence[int], lengths: Sequence[int], num_replicas: int
) -> list[list[int]]:
    """The samples of each replica: longest first onto the least loaded."""
    loads = [0] * num_replicas
    parts: list[list[int]] = [[] for _ in range(num_replicas)]
    for i in sorted(samples, key=lambda i: (-lengths[i], i)):
        replica = min(range(num_replicas), key=lambda r: (loads[r], r))
        loads[replica] += lengths[i]
        parts[replica].append(i)
    return parts


def _length_sorted_batches(
    part: Sequence[int], lengths: Sequence[int], batch_tokens: int
) -> list[list[int]]:
    """Batches of neighbours in length, longest first (as ``part`` is)."""
    batches: list[list[int]] = []
    padding = 0  # of the last batch
    for i in part:
        longest = lengths[batches[-1][0]] if batches else 0
        padding += longest - lengths[i]
        if (
            batches
            and (len(batches[-1]) + 1) * longest <= batch_tokens
            and padding * _PADDING <= batch_tokens
        ):
            batches[-1].append(i)
        else:
            batches.append([i])
            padding = 0
    return batches
