"""Plan a rollout: the prompts of an iteration, and the rank that answers each.

Strategy:

1. Count through the whole run: iteration i takes the places ``i * count`` to ``(i + 1) * count`` of
   one endless sequence of prompt rows.
2. That sequence is a chain of epochs, each a permutation of all rows drawn from the seed and the
   epoch's number alone (``select_prompts``).
3. Number the answers to a row that comes again in the iteration on from those to its first
   (``number_samples``).
4. Cut what was selected into batches of ``batch_size`` neighbours; the last may be shorter.
5. Deal the batches to the ranks in turn (``plan_batches``).

Promises:

- Within an epoch every row comes exactly once; an iteration may end one epoch and begin the next.
- The rows of an iteration depend on nothing that came before it: a resumed run needs no state.
- Another seed or another epoch gives an unrelated order.
- No two requests of an iteration have one row and one number: a draw is named by these, so a row
  that comes twice is answered twice.
- Every item is in one batch of one rank.  Batch b is the items ``[b * batch_size, (b + 1) *
  batch_size)``, whatever the number of ranks, and belongs to rank ``b % num_ranks``.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence

from mtopd.types import MtopdError


def select_prompts(num_prompts: int, count: int, iteration: int, seed: int) -> list[int]:
    """The prompt rows that an iteration uses, in order."""
    if num_prompts < 1 or count < 1 or iteration < 0:
        raise MtopdError(
            f"cannot select {count} of {num_prompts} prompts for iteration {iteration}; "
            "at least one prompt, a count of at least 1 and an iteration of at least 0 are needed"
        )
    first, end = iteration * count, (iteration + 1) * count
    rows: list[int] = []
    for epoch in range(first // num_prompts, math.ceil(end / num_prompts)):
        order = list(range(num_prompts))
        # A string seed is hashed with SHA-512: neighbouring seeds and epochs give unrelated
        # permutations.
        random.Random(f"prompts/{seed}/{epoch}").shuffle(order)
        start = epoch * num_prompts
        rows += order[max(first - start, 0) : end - start]
    return rows


def number_samples(rows: Sequence[int], samples_per_prompt: int) -> Iterator[tuple[int, int]]:
    """(row, number of the sample) of every request, in order.

    A row that comes for the k-th time, from 0, gets the numbers ``k * samples_per_prompt`` and
    following: where none comes again, they are 0 to ``samples_per_prompt - 1``.
    """
    seen: Counter[int] = Counter()
    for row in rows:
        for sample in range(samples_per_prompt):
            yield row, seen[row] * samples_per_prompt + sample
        seen[row] += 1


def plan_batches(num_items: int, batch_size: int, num_ranks: int) -> list[list[range]]:
    """``result[rank]`` lists the item ranges of that rank, ascending; the number b of a batch is
    ``range.start // batch_size``.
    """
    if num_items < 0 or batch_size < 1 or num_ranks < 1:
        raise MtopdError(
            f"cannot deal {num_items} items in batches of {batch_size} to {num_ranks} ranks; "
            "batch size and ranks must be at least 1"
        )
    batches = [
        range(start, min(start + batch_size, num_items))
        for start in range(0, num_items, batch_size)
    ]
    return [batches[rank::num_ranks] for rank in range(num_ranks)]
