"""Plan a rollout: the prompts of an iteration, and the numbers of their answers.

Strategy:

1. Count through the whole run: iteration i takes the places ``i * count`` to ``(i + 1) * count`` of
   one endless sequence of prompt rows.
2. That sequence is a chain of epochs, each a permutation of all rows drawn from the seed and the
   epoch's number alone (``select_prompts``).
3. Number the answers to a row that comes again in the iteration on from those to its first
   (``number_samples``).

Promises:

- Within an epoch every row comes exactly once; an iteration may end one epoch and begin the next.
- The rows of an iteration depend on nothing that came before it: a resumed run needs no state.
- Another seed or another epoch gives an unrelated order.
- No two requests of an iteration have one row and one number: a draw is named by these, so a row
  that comes twice is answered twice.
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
