"""Plan the train steps of an iteration: which dp rank trains on which sample, in which order, and
what each of its tokens weighs.

Strategy:

1. Shuffle the samples with the seed and cut them into one mini-batch for each train step.
2. Share a mini-batch out over the dp ranks, teachers in order.  Padded, by cost.  Packed, in two
   ways, by cost or rank after rank in full rows, of which the cheaper one is taken.
3. Cut each rank's samples into micro-batches: rows padded to one length, or packs of one row with
   samples one behind the other.  The number of packs and their length are chosen together; empty
   micro-batches make the ranks equal.
4. Weigh each sample's loss tokens: its teacher's weight over the denominator of the normalization,
   taken over the whole mini-batch.

Promises:

- Every sample is in exactly one micro-batch of one train step; the numbers of samples of two steps
  differ by at most one.
- The plan depends on the set of samples and the seed, not on the order in which the samples are
  given.
- Every dp rank has the same number of micro-batches in a step, a multiple of
  ``micro_batch_multiple``; empty ones stand at the end.
- A micro-batch holds at most ``micro_batch_size`` samples, or at most ``token_budget`` tokens.
- Padded, the number of micro-batches is as small as an even deal of the samples needs.
- Along a dp rank's micro-batches the teacher index never decreases; equal teachers in a micro-batch
  are in order of sample id.
- The dp ranks share out the teachers in order: over all ranks there are at most (teachers + dp_size
  - 1) pairs of a rank and a teacher it needs.
- Padded, a dp rank's cost is at most the mean plus the most expensive sample's cost where every
  rank has room for all samples.
- Packed, neighbouring packs of a dp rank would not go into one row of the step.
- Packed, waste is at most 5 % for samples as responses are (lengths about log-normal), at least 16
  of them for each dp rank and 10 for each teacher, a budget of twice the longest.  Fewer of a
  teacher's leave no choice.
- ``seq_length`` is the smallest multiple of ``seq_length_multiple`` that holds the longest row of
  the step.
- ``waste`` is the share of a step's rows that is padding, rows of empty micro-batches included.
- ``num_tokens`` has an entry for each teacher with at least one loss token in the step, and no
  other.
- With N_i loss tokens and B_i samples of teacher i in the step over all dp ranks, N = sum N_i, B =
  sum B_i, the token weights summed over all loss tokens are: ``teacher_balanced`` sum of w_i over
  the teachers present; ``token_mean`` sum w_i N_i / N; ``sequence_mean`` sum w_i B_i / B.
- A sample without loss tokens stays in the plan with weight 0 and is counted in no N and no B.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Literal, get_args

from mtopd.planning.stages import SampleCost
from mtopd.types import (
    MicroBatch,
    MtopdError,
    PlannedSample,
    SampleMetadata,
    TrainStepPlan,
    num_input_tokens,
)

MAX_WASTE = 0.05  # of the tokens of all packs, where a plan can keep to it
Normalization = Literal["teacher_balanced", "token_mean", "sequence_mean"]


def plan_train_steps(
    samples: Sequence[SampleMetadata],
    *,
    num_train_steps: int,
    teacher_weights: Sequence[float],
    dp_size: int,
    micro_batch_size: int | None = None,
    token_budget: int | None = None,
    seq_length_multiple: int = 1,
    micro_batch_multiple: int = 1,
    cost: SampleCost | None = None,
    normalization: Normalization,
    seed: int,
) -> list[TrainStepPlan]:
    """One plan for each train step.

    Exactly one of ``micro_batch_size`` (samples, a row each, padded) and ``token_budget`` (tokens
    of a pack) is given.  A sample takes prompt + response - 1 tokens: the last is only predicted.
    """
    sizes = {
        "num_train_steps": num_train_steps,
        "dp_size": dp_size,
        "micro_batch_size": micro_batch_size,
        "token_budget": token_budget,
        "seq_length_multiple": seq_length_multiple,
        "micro_batch_multiple": micro_batch_multiple,
    }
    _check_sizes(sizes, normalization)
    _check_samples(samples, num_train_steps, teacher_weights, token_budget)
    shuffled = sorted(samples, key=lambda sample: sample.sample_id)
    random.Random(seed).shuffle(shuffled)
    cost = cost or SampleCost()
    plans = []
    for mini_batch in _split_evenly(shuffled, num_train_steps):
        if token_budget is None:
            assert micro_batch_size is not None
            assigned = _pad(mini_batch, dp_size, micro_batch_size, micro_batch_multiple, cost)
            longest = max(map(row_length, mini_batch))
        else:
            assigned = _pack(mini_batch, dp_size, token_budget, micro_batch_multiple, cost)
            longest = _longest_pack(assigned)
        seq_length = _round_up(longest, seq_length_multiple)
        weights = _token_weights(mini_batch, teacher_weights, normalization)
        rows = dp_size * len(assigned[0]) * (micro_batch_size or 1)
        plans.append(
            TrainStepPlan(
                micro_batches=tuple(
                    tuple(_micro_batch(batch, weights) for batch in part) for part in assigned
                ),
                seq_length=seq_length,
                packed=token_budget is not None,
                num_tokens=_loss_tokens_by_teacher(mini_batch),
                waste=1.0 - sum(map(row_length, mini_batch)) / (rows * seq_length),
            )
        )
    return plans


def _check_sizes(sizes: Mapping[str, int | None], normalization: str) -> None:
    if (sizes["micro_batch_size"] is None) == (sizes["token_budget"] is None):
        raise MtopdError(
            f"micro_batch_size is {sizes['micro_batch_size']} and token_budget is "
            f"{sizes['token_budget']}; give "
            "exactly one: samples of a padded micro-batch, or tokens of a pack"
        )
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise MtopdError(f"{name} is {value}; it must be at least 1")
    if normalization not in get_args(Normalization):
        raise MtopdError(
            f"normalization is '{normalization}'; use one of {', '.join(get_args(Normalization))}"
        )


def _check_samples(
    samples: Sequence[SampleMetadata],
    num_train_steps: int,
    teacher_weights: Sequence[float],
    token_budget: int | None,
) -> None:
    if not samples:
        raise MtopdError(
            "there are no samples to train on; run the rollout of this iteration first"
        )
    if num_train_steps > len(samples):
        raise MtopdError(
            f"{num_train_steps} train steps need at least {num_train_steps} samples but the "
            "iteration has "
            f"{len(samples)}; lower the number of train steps or roll out more prompts"
        )
    for index, weight in enumerate(teacher_weights):
        if not (math.isfinite(weight) and weight >= 0):
            raise MtopdError(
                f"the weight of teacher {index} is {weight}; it must be finite and not negative"
            )
    sample_id, times = Counter(sample.sample_id for sample in samples).most_common(1)[0]
    if times > 1:
        raise MtopdError(
            f"sample_id {sample_id} is given {times} times; it would be trained on {times} times"
        )
    for sample in samples:
        _check_sample(sample, len(teacher_weights))
        if token_budget is not None and row_length(sample) > token_budget:
            raise MtopdError(
                f"sample {sample.sample_id} has {row_length(sample)} tokens, more than "
                f"token_budget {token_budget}; "
                "raise train.token_budget to the context length or lower data.max_response"
            )


def _check_sample(sample: SampleMetadata, num_teachers: int) -> None:
    if not 0 <= sample.teacher_index < num_teachers:
        raise MtopdError(
            f"sample {sample.sample_id} has teacher_index {sample.teacher_index} but the run has "
            f"{num_teachers} "
            "teachers, counted from 0; use the trajectories with the config that made them"
        )
    if sample.prompt_len < 1 or sample.response_len < 1:
        raise MtopdError(
            f"sample {sample.sample_id} has prompt_len {sample.prompt_len} and response_len "
            f"{sample.response_len}; "
            "both must be at least 1"
        )
    if not 0 <= sample.num_loss_tokens <= sample.response_len:
        raise MtopdError(
            f"sample {sample.sample_id} has {sample.num_loss_tokens} loss tokens in a response of "
            f"{sample.response_len} tokens"
        )


def _split_evenly(
    samples: Sequence[SampleMetadata], num_parts: int
) -> list[Sequence[SampleMetadata]]:
    bounds = [len(samples) * part // num_parts for part in range(num_parts + 1)]
    return [samples[start:end] for start, end in pairwise(bounds)]


def row_length(sample: SampleMetadata) -> int:
    return num_input_tokens(sample.prompt_len, sample.response_len)


Assignment = list[list[list[SampleMetadata]]]  # [dp rank][micro-batch][sample]


def _pad(
    mini_batch: Sequence[SampleMetadata], dp_size: int, size: int, multiple: int, cost: SampleCost
) -> Assignment:
    least = math.ceil(len(mini_batch) / (dp_size * size))
    parts = _deal(mini_batch, dp_size, cost, room=least * size)
    return [
        [part[k * size : (k + 1) * size] for k in range(_round_up(least, multiple))]
        for part in parts
    ]


def _pack(
    mini_batch: Sequence[SampleMetadata], dp_size: int, budget: int, multiple: int, cost: SampleCost
) -> Assignment:
    """The better of two ways: fill the rows of all dp ranks one after the other, which wastes
    least, or deal by cost and let each rank fill its own, which may be cheaper where attention
    outweighs the rest.
    """
    dealt = [
        _longest_first(part) for part in _deal(mini_batch, dp_size, cost, room=len(mini_batch))
    ]
    ways = [
        _fit(lists, dp_size, budget, multiple) for lists in ([_spread(mini_batch, dp_size)], dealt)
    ]
    num_tokens = sum(map(row_length, mini_batch))

    def price(assigned: Assignment) -> tuple[bool, float]:
        """Whether it is wasteful, and what the rank with most work computes: padding costs as
        tokens do, but no pairs.
        """
        computed = len(assigned[0]) * _longest_pack(assigned)
        pairs = max(sum(row_length(s) ** 2 for batch in part for s in batch) for part in assigned)
        waste = 1 - num_tokens / (dp_size * computed)
        return waste > MAX_WASTE, cost.per_token * computed + cost.per_pair * pairs

    return min(ways, key=price)


def _fit(
    lists: Sequence[Sequence[SampleMetadata]], dp_size: int, budget: int, multiple: int
) -> Assignment:
    """Packs along each list, which fills its equal part of the ranks.

    All rows of a step are as long as its longest pack, so the number of packs and their capacity
    are chosen together. More packs are tried as long as they could save 1 %.
    """
    ranks = dp_size // len(lists)
    lengths = [row_length(sample) for samples in lists for sample in samples]

    def packs_of_a_rank(capacity: int) -> int:
        return max(
            math.ceil(len(_fill(samples, row_length, capacity)) / ranks) for samples in lists
        )

    def are_enough(count: int, capacity: int) -> bool:
        return packs_of_a_rank(capacity) <= count

    count = _round_up(packs_of_a_rank(budget), multiple)
    best = (count, budget)
    while True:
        least = max(max(lengths), math.ceil(sum(lengths) / (dp_size * count)))
        if count * least > (1 - 0.01) * math.prod(best):
            break
        found = _smallest(partial(are_enough, count), least, budget)
        best = min(best, (count, found), key=math.prod)
        count += multiple
    count, capacity = best
    assigned: Assignment = []
    for samples in lists:
        packs = _fill(samples, row_length, capacity)
        packs += [[] for _ in range(count * ranks - len(packs))]
        assigned += [packs[rank * count : (rank + 1) * count] for rank in range(ranks)]
    return assigned


def _longest_first(samples: Sequence[SampleMetadata]) -> list[SampleMetadata]:
    """The short ones last, which fill what the long ones leave."""
    return sorted(samples, key=lambda sample: (-row_length(sample), sample.sample_id))


def _spread(mini_batch: Sequence[SampleMetadata], dp_size: int) -> list[SampleMetadata]:
    """Teachers in order, each one's samples from long to short as many times as it will touch dp
    ranks: from long to short only once, the first rank would have the long ones and most of the
    attention.
    """
    waiting: dict[int, list[SampleMetadata]] = {}
    for sample in _longest_first(mini_batch):
        waiting.setdefault(sample.teacher_index, []).append(sample)
    num_tokens, first, spread = sum(map(row_length, mini_batch)), 0, []
    for _, samples in sorted(waiting.items()):
        last = first + sum(map(row_length, samples)) - 1
        ranks = last * dp_size // num_tokens - first * dp_size // num_tokens + 1
        spread += [sample for rank in range(ranks) for sample in samples[rank::ranks]]
        first = last + 1
    return spread


def _longest_pack(assigned: Assignment) -> int:
    return max(sum(map(row_length, batch)) for part in assigned for batch in part)


def _deal(
    mini_batch: Sequence[SampleMetadata], dp_size: int, cost: SampleCost, room: int
) -> list[list[SampleMetadata]]:
    """Share the samples out in teacher order, at most ``room`` to a dp rank, so that the rank with
    most work has little.

    Inside a teacher they come as shuffled: every rank gets long and short ones, which fill packs
    well.
    """

    def price(sample: SampleMetadata) -> int:
        return math.ceil(cost(row_length(sample)) * scale)

    # Whole numbers, so that the search below ends at the same place on every machine.
    scale = 1e6 / max(cost(row_length(sample)) for sample in mini_batch)
    prices = [price(sample) for sample in mini_batch]
    capacity = _smallest(
        lambda c: len(_fill(mini_batch, price, c, room)) <= dp_size,
        max(max(prices), sum(prices) // dp_size),
        sum(prices),
    )
    parts = _fill(mini_batch, price, capacity, room)
    return parts + [[] for _ in range(dp_size - len(parts))]


def _fill(
    samples: Sequence[SampleMetadata],
    size: Callable[[SampleMetadata], int],
    capacity: int,
    room: int | None = None,
) -> list[list[SampleMetadata]]:
    """Fill bins one after the other, teachers in order: a bin takes the first samples of the
    current teacher that still fit and is closed when none does.  A bin holds at most ``capacity``
    in sizes and ``room`` in samples.
    """
    waiting: dict[int, list[tuple[int, SampleMetadata]]] = {}
    for sample in samples:
        waiting.setdefault(sample.teacher_index, []).append((size(sample), sample))
    bins: list[list[SampleMetadata]] = []
    left, places = 0, 0  # of the bin that is open
    for _, queue in sorted(waiting.items()):
        while queue:
            fits = (
                next((i for i, (taken, _) in enumerate(queue) if taken <= left), None)
                if places
                else None
            )
            if fits is None:
                bins.append([])
                left, places = capacity, room or len(samples)
                continue
            taken, sample = queue.pop(fits)
            bins[-1].append(sample)
            left, places = left - taken, places - 1
    return [
        sorted(bin, key=lambda sample: (sample.teacher_index, sample.sample_id)) for bin in bins
    ]


def _smallest(holds: Callable[[int], bool], low: int, high: int) -> int:
    """A number from low to high for which ``holds``, found by bisection; it is known to hold for
    high.
    """
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return high


def _micro_batch(samples: Sequence[SampleMetadata], weights: Mapping[int, float]) -> MicroBatch:
    return MicroBatch(
        tuple(PlannedSample(s.sample_id, s.teacher_index, weights[s.sample_id]) for s in samples)
    )


def _token_weights(
    mini_batch: Sequence[SampleMetadata],
    teacher_weights: Sequence[float],
    normalization: Normalization,
) -> dict[int, float]:
    """The weight of one loss token of each sample, by sample id.  A sample without loss tokens
    divides by nothing.
    """
    num_tokens = _loss_tokens_by_teacher(mini_batch)
    all_tokens = sum(num_tokens.values())
    num_trained = sum(sample.num_loss_tokens > 0 for sample in mini_batch)

    def denominator(sample: SampleMetadata) -> int:
        if normalization == "teacher_balanced":
            return num_tokens[sample.teacher_index]
        if normalization == "token_mean":
            return all_tokens
        return num_trained * sample.num_loss_tokens

    return {
        sample.sample_id: teacher_weights[sample.teacher_index] / denominator(sample)
        if sample.num_loss_tokens
        else 0.0
        for sample in mini_batch
    }


def _loss_tokens_by_teacher(mini_batch: Sequence[SampleMetadata]) -> dict[int, int]:
    num_tokens: Counter[int] = Counter()
    for sample in mini_batch:
        num_tokens[sample.teacher_index] += sample.num_loss_tokens
    return {teacher: count for teacher, count in sorted(num_tokens.items()) if count}


def _round_up(value: int, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple
