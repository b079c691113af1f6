"""Planning: which prompts are rolled out, and which rank trains on which sample in which order.
Pure Python.

Every function here is a pure function of its arguments: metadata in, plan out.  All ranks call it
and get the same plan without talking to one another, and a resumed run gets the plan it had
before.  Nothing here sees a token, a tensor, a file or a process group.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal, get_args

from mtopd.types import MicroBatch, MtopdError, PlannedSample, SampleMetadata, TrainStepPlan

MAX_STAGE_IMBALANCE = 1.1
MAX_WASTE = 0.05  # of packs, where they can be made so
Normalization = Literal["teacher_balanced", "token_mean", "sequence_mean"]


@dataclass(frozen=True)
class SampleCost:
    """What a sample of n tokens costs the model: ``per_token * n + per_pair * n^2``, in any unit."""

    per_token: float = 1.0
    per_pair: float = 0.0

    def __call__(self, num_tokens: int) -> float:
        return self.per_token * num_tokens + self.per_pair * num_tokens**2


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
    """Plan the optimizer updates of one iteration.

    Exactly one of ``micro_batch_size`` (samples, a row each, padded) and ``token_budget`` (tokens
    of a pack: one row, samples one behind the other) is given.  A sample takes prompt + response -
    1 tokens: the last is only predicted.

    Promises:

    - Every sample is in exactly one micro-batch of one train step; the numbers of samples of two
      steps differ by at most one.
    - The plan depends on the set of samples and the seed, not on the order in which the samples are
      given.
    - Every dp rank has the same number of micro-batches in a step, a multiple of
      ``micro_batch_multiple``; empty ones stand at the end.
    - A micro-batch holds at most ``micro_batch_size`` samples, or at most ``token_budget`` tokens.
    - Padded, the number of micro-batches is as small as an even deal of the samples needs.
    - Along a dp rank's micro-batches the teacher index never decreases; equal teachers in a
      micro-batch are in order of sample id.
    - The dp ranks share out the teachers in order: over all ranks there are at most (teachers +
      dp_size - 1) pairs of a rank and a teacher it needs.
    - Padded, a dp rank's cost is at most the mean plus the most expensive sample's cost where every
      rank has room for all samples.
    - Packed, neighbouring packs of a dp rank would not go into one row of the step.
    - Packed, waste is at most 5 % for samples as responses are (lengths about log-normal), at least
      16 of them for each dp rank and 10 for each teacher, a budget of twice the longest.  Fewer of
      a teacher's leave no choice.
    - ``seq_length`` is the smallest multiple of ``seq_length_multiple`` that holds the longest row
      of the step.
    - ``waste`` is the share of a step's rows that is padding, rows of empty micro-batches included.
    - ``num_tokens`` has an entry for each teacher with at least one loss token in the step, and no
      other.
    - With N_i loss tokens and B_i samples of teacher i in the step over all dp ranks, N = sum N_i,
      B = sum B_i, the token weights summed over all loss tokens are: ``teacher_balanced`` sum of
      w_i over the teachers present; ``token_mean`` sum w_i N_i / N; ``sequence_mean`` sum w_i B_i /
      B.
    - A sample without loss tokens stays in the plan with weight 0 and is counted in no N and no B.
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
    plans = []
    for mini_batch in _split_evenly(shuffled, num_train_steps):
        if token_budget is None:
            assert micro_batch_size is not None
            parts = _pad(
                mini_batch, dp_size, micro_batch_size, micro_batch_multiple, cost or SampleCost()
            )
            longest = max(map(row_length, mini_batch))
        else:
            parts = _pack(
                mini_batch, dp_size, token_budget, micro_batch_multiple, cost or SampleCost()
            )
            longest = _longest_pack(parts)
        seq_length = _round_up(longest, seq_length_multiple)
        weights = _token_weights(mini_batch, teacher_weights, normalization)
        rows = dp_size * len(parts[0]) * (micro_batch_size or 1)
        plans.append(
            TrainStepPlan(
                micro_batches=tuple(
                    tuple(_micro_batch(batch, weights) for batch in part) for part in parts
                ),
                seq_length=seq_length,
                packed=token_budget is not None,
                num_tokens=_loss_tokens_by_teacher(mini_batch),
                waste=1.0 - sum(map(row_length, mini_batch)) / (rows * seq_length),
            )
        )
    return plans


@dataclass(frozen=True)
class Architecture:
    """Numbers of a model from which its cost follows; for experts ``ffn_size`` is what one token
    goes through.
    """

    num_layers: int
    hidden_size: int
    ffn_size: int
    attention_size: int  # query heads x head width
    key_value_size: int  # key-value heads x head width
    vocab_size: int

    @property
    def layer_flops(self) -> float:
        """Of one token in one layer, forward, less attention over other tokens."""
        width, attention = self.hidden_size, self.attention_size
        return 2.0 * width * (2 * attention + 2 * self.key_value_size + 3 * self.ffn_size)

    @property
    def head_flops(self) -> float:
        """Of one token in the output layer, forward."""
        return 2.0 * self.hidden_size * self.vocab_size

    @property
    def sample_cost(self) -> SampleCost:
        """Of a sample's forward through all layers; causal attention sees half of the pairs, in two
        products.
        """
        return SampleCost(
            self.num_layers * self.layer_flops, self.num_layers * 2.0 * self.attention_size
        )


@dataclass(frozen=True)
class StageSplit:
    """Layers of each pipeline stage; ``imbalance`` is the price of the dearest stage over the mean."""

    layers: tuple[int, ...]
    imbalance: float


def price_stages(
    student: Architecture, layers: Sequence[int], *, teacher_hidden_size: int, loss_share: float
) -> StageSplit:
    """Price the stages of a train step, in flops of a token: layers forward and backward (x 3), and
    on the last stage, for the ``loss_share`` of tokens that are trained, the student's head x 3 and
    the teacher's x 1.  Interleaved, a stage is all chunks of a pipeline rank: in the steady state
    ranks wait for the one with most work.
    """
    prices = [3.0 * count * student.layer_flops for count in layers]
    prices[-1] += loss_share * (
        3.0 * student.head_flops + 2.0 * teacher_hidden_size * student.vocab_size
    )
    return StageSplit(tuple(layers), max(prices) * len(prices) / sum(prices))


def propose_split(
    student: Architecture,
    pp_size: int,
    *,
    vpp_size: int = 1,
    teacher_hidden_size: int,
    loss_share: float,
) -> tuple[StageSplit, StageSplit | None]:
    """(even split, best one or None).  The best is proposed when the even one's imbalance exceeds
    1.1 and it is better.

    Of equally good splits the one with the most even layers: beside a dear last stage others may be
    had in many ways.
    """
    assert student.num_layers % (pp_size * vpp_size) == 0, (student.num_layers, pp_size, vpp_size)
    price = partial(
        price_stages, student, teacher_hidden_size=teacher_hidden_size, loss_share=loss_share
    )
    even = price([student.num_layers // pp_size] * pp_size)
    if pp_size == 1 or even.imbalance <= MAX_STAGE_IMBALANCE:
        return even, None
    splits = map(price, expressible_splits(student.num_layers, pp_size, vpp_size))
    best = min(splits, key=lambda split: (split.imbalance, sum(count**2 for count in split.layers)))
    return even, best if best.imbalance < even.imbalance else None


def expressible_splits(
    num_layers: int, pp_size: int, vpp_size: int = 1
) -> Iterator[tuple[int, ...]]:
    """All splits over two stages or more that Megatron can be told: any first and last stage, equal
    ones between, all of at least one layer in each model chunk.  ``num_layers`` is a multiple of
    ``vpp_size``.
    """
    between = pp_size - 2
    for each in range(vpp_size, num_layers, vpp_size) if between else [0]:
        ends = num_layers - between * each
        for last in range(vpp_size, ends, vpp_size):
            yield (ends - last, *[each] * between, last)


def plan_batches(num_items: int, batch_size: int, num_ranks: int) -> list[list[range]]:
    """Deal consecutive batches of items to ranks: ``result[rank]`` lists the item ranges of that
    rank, ascending.

    Batch b is the items ``[b * batch_size, (b + 1) * batch_size)``, the last one possibly shorter,
    and belongs to rank ``b % num_ranks``.  b itself is ``range.start // batch_size``; it does not
    depend on the number of ranks.
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


def select_prompts(num_prompts: int, count: int, iteration: int, seed: int) -> list[int]:
    """The prompt rows that an iteration uses; a resumed run needs no state to go on.

    The rows of all iterations, one after the other, are a sequence of epochs.  An epoch is a
    permutation of all rows, so within it no row comes twice; an iteration may end one epoch and
    begin the next.
    """
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
    """Tokens that the model reads of a sample: the last response token is predicted but predicts
    nothing.
    """
    return sample.prompt_len + sample.response_len - 1


Parts = list[list[list[SampleMetadata]]]  # [dp rank][micro-batch][sample]


def _pad(
    mini_batch: Sequence[SampleMetadata], dp_size: int, size: int, multiple: int, cost: SampleCost
) -> Parts:
    num_micro_batches = _round_up(math.ceil(len(mini_batch) / (dp_size * size)), multiple)
    parts = _deal(
        mini_batch, dp_size, cost, room=math.ceil(len(mini_batch) / (dp_size * size)) * size
    )
    return [[part[k * size : (k + 1) * size] for k in range(num_micro_batches)] for part in parts]


def _pack(
    mini_batch: Sequence[SampleMetadata], dp_size: int, budget: int, multiple: int, cost: SampleCost
) -> Parts:
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

    def price(parts: Parts) -> tuple[bool, float]:
        """Wasteful or not, and what the dearest rank computes: padding costs as tokens do, and no
        pairs.
        """
        computed = len(parts[0]) * _longest_pack(parts)
        pairs = max(sum(row_length(s) ** 2 for batch in part for s in batch) for part in parts)
        return 1 - num_tokens / (
            dp_size * computed
        ) > MAX_WASTE, cost.per_token * computed + cost.per_pair * pairs

    return min(ways, key=price)


def _fit(
    lists: Sequence[Sequence[SampleMetadata]], dp_size: int, budget: int, multiple: int
) -> Parts:
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
        best = min(best, (count, _least(partial(are_enough, count), least, budget)), key=math.prod)
        count += multiple
    count, capacity = best
    parts: Parts = []
    for samples in lists:
        packs = _fill(samples, row_length, capacity)
        packs += [[] for _ in range(count * ranks - len(packs))]
        parts += [packs[rank * count : (rank + 1) * count] for rank in range(ranks)]
    return parts


def _longest_first(samples: Sequence[SampleMetadata]) -> list[SampleMetadata]:
    """The short ones last, which fill what the long ones leave."""
    return sorted(samples, key=lambda sample: (-row_length(sample), sample.sample_id))


def _spread(mini_batch: Sequence[SampleMetadata], dp_size: int) -> list[SampleMetadata]:
    """Teachers in order, each one's samples from long to short as many times as it will touch dp
    ranks.  Once for all, the first rank would have the long ones and most of the attention.
    """
    waiting: dict[int, list[SampleMetadata]] = {}
    for sample in _longest_first(mini_batch):
        waiting.setdefault(sample.teacher_index, []).append(sample)
    num_tokens, first, spread = sum(map(row_length, mini_batch)), 0, []
    for _, of_teacher in sorted(waiting.items()):
        last = first + sum(map(row_length, of_teacher)) - 1
        ranks = last * dp_size // num_tokens - first * dp_size // num_tokens + 1
        spread += [sample for rank in range(ranks) for sample in of_teacher[rank::ranks]]
        first = last + 1
    return spread


def _longest_pack(parts: Parts) -> int:
    return max(sum(map(row_length, batch)) for part in parts for batch in part)


def _deal(
    mini_batch: Sequence[SampleMetadata], dp_size: int, cost: SampleCost, room: int
) -> list[list[SampleMetadata]]:
    """Share the samples out in teacher order, at most ``room`` to a dp rank, so that the dearest
    rank is cheap.

    Inside a teacher they come as shuffled: every rank gets long and short ones, which fill packs
    well.
    """

    def price(sample: SampleMetadata) -> int:
        return math.ceil(cost(row_length(sample)) * scale)

    # Whole numbers, so that the search below ends at the same place on every machine.
    scale = 1e6 / max(cost(row_length(sample)) for sample in mini_batch)
    prices = [price(sample) for sample in mini_batch]
    capacity = _least(
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
    current teacher that still fit and is closed when none does.  At most ``capacity`` and ``room``
    samples in a bin.
    """
    waiting: dict[int, list[tuple[int, SampleMetadata]]] = {}
    for sample in samples:
        waiting.setdefault(sample.teacher_index, []).append((size(sample), sample))
    bins: list[list[SampleMetadata]] = []
    left, places = 0, 0  # of the bin that is open
    for _, of_teacher in sorted(waiting.items()):
        while of_teacher:
            fits = (
                next((i for i, (taken, _) in enumerate(of_teacher) if taken <= left), None)
                if places
                else None
            )
            if fits is None:
                bins.append([])
                left, places = capacity, room or len(samples)
                continue
            taken, sample = of_teacher.pop(fits)
            bins[-1].append(sample)
            left, places = left - taken, places - 1
    return [
        sorted(bin, key=lambda sample: (sample.teacher_index, sample.sample_id)) for bin in bins
    ]


def _least(holds: Callable[[int], bool], low: int, high: int) -> int:
    """A number between low and high for which ``holds``, by bisection; it holds for high."""
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
