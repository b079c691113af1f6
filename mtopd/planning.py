"""Planning: which prompts are rolled out, and which rank trains on which sample in which order.  Pure Python.

Every function here is a pure function of its arguments: metadata in, plan out.  All ranks call it and get the same
plan without talking to one another, and a resumed run gets the plan it had before.  Nothing here sees a token, a
tensor, a file or a process group.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal, get_args

from mtopd.types import MicroBatch, MtopdError, PlannedSample, SampleMetadata, TrainStepPlan

Normalization = Literal["teacher_balanced", "token_mean", "sequence_mean"]


def plan_train_steps(
    samples: Sequence[SampleMetadata],
    *,
    num_train_steps: int,
    teacher_weights: Sequence[float],
    dp_size: int,
    micro_batch_size: int,
    seq_length_multiple: int = 1,
    normalization: Normalization,
    seed: int,
) -> list[TrainStepPlan]:
    """Plan the optimizer updates of one iteration.

    Promises:

    - Every sample is in exactly one micro-batch of one train step; the numbers of samples of two steps differ by at
      most one.
    - The plan depends on the set of samples and the seed, not on the order in which the samples are given.
    - Every dp rank has the same number of micro-batches in a step, as few as an even deal of the samples needs; empty
      micro-batches stand at the end.
    - A micro-batch holds at most ``micro_batch_size`` samples.
    - Inside a dp rank the teacher index never decreases; equal teachers are in order of sample id.
    - ``seq_length`` holds the longest row of the step and is the smallest such multiple of ``seq_length_multiple``.
    - ``num_tokens`` has an entry for each teacher with at least one loss token in the step, and no other.
    - With N_i loss tokens and B_i samples of teacher i in the step over all dp ranks, N = sum N_i, B = sum B_i, the
      token weights summed over all loss tokens are: ``teacher_balanced`` sum of w_i over the teachers present;
      ``token_mean`` sum w_i N_i / N; ``sequence_mean`` sum w_i B_i / B.
    - A sample without loss tokens stays in the plan with weight 0 and is counted in no N and no B.
    """
    _check_sizes(num_train_steps, dp_size, micro_batch_size, seq_length_multiple, normalization)
    _check_samples(samples, num_train_steps, teacher_weights)
    shuffled = sorted(samples, key=lambda sample: sample.sample_id)
    random.Random(seed).shuffle(shuffled)
    plans = []
    for mini_batch in _split_evenly(shuffled, num_train_steps):
        weights = _token_weights(mini_batch, teacher_weights, normalization)
        num_micro_batches = math.ceil(len(mini_batch) / (dp_size * micro_batch_size))
        parts = _deal(mini_batch, dp_size, room=num_micro_batches * micro_batch_size)
        plans.append(
            TrainStepPlan(
                micro_batches=tuple(_cut(part, num_micro_batches, micro_batch_size, weights) for part in parts),
                seq_length=_round_up(max(map(_row_length, mini_batch)), seq_length_multiple),
                packed=False,
                num_tokens=_loss_tokens_by_teacher(mini_batch),
            )
        )
    return plans


def plan_batches(num_items: int, batch_size: int, num_ranks: int) -> list[list[range]]:
    """Deal consecutive batches of items to ranks: ``result[rank]`` lists the item ranges of that rank, ascending.

    Batch b is the items ``[b * batch_size, (b + 1) * batch_size)``, the last one possibly shorter, and belongs to
    rank ``b % num_ranks``.  b itself is ``range.start // batch_size``; it does not depend on the number of ranks.
    """
    if num_items < 0 or batch_size < 1 or num_ranks < 1:
        raise MtopdError(
            f"cannot deal {num_items} items in batches of {batch_size} to {num_ranks} ranks; "
            "batch size and ranks must be at least 1"
        )
    batches = [range(start, min(start + batch_size, num_items)) for start in range(0, num_items, batch_size)]
    return [batches[rank::num_ranks] for rank in range(num_ranks)]


def select_prompts(num_prompts: int, count: int, iteration: int, seed: int) -> list[int]:
    """The prompt rows that an iteration uses; a resumed run needs no state to go on.

    The rows of all iterations, one after the other, are a sequence of epochs.  An epoch is a permutation of all
    rows, so within it no row comes twice; an iteration may end one epoch and begin the next.
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
        # A string seed is hashed with SHA-512: neighbouring seeds and epochs give unrelated permutations.
        random.Random(f"prompts/{seed}/{epoch}").shuffle(order)
        start = epoch * num_prompts
        rows += order[max(first - start, 0) : end - start]
    return rows


def _check_sizes(
    num_train_steps: int, dp_size: int, micro_batch_size: int, seq_length_multiple: int, normalization: str
) -> None:
    sizes = {
        "num_train_steps": num_train_steps,
        "dp_size": dp_size,
        "micro_batch_size": micro_batch_size,
        "seq_length_multiple": seq_length_multiple,
    }
    for name, value in sizes.items():
        if value < 1:
            raise MtopdError(f"{name} is {value}; it must be at least 1")
    if normalization not in get_args(Normalization):
        raise MtopdError(f"normalization is '{normalization}'; use one of {', '.join(get_args(Normalization))}")


def _check_samples(samples: Sequence[SampleMetadata], num_train_steps: int, teacher_weights: Sequence[float]) -> None:
    if not samples:
        raise MtopdError("there are no samples to train on; run the rollout of this iteration first")
    if num_train_steps > len(samples):
        raise MtopdError(
            f"{num_train_steps} train steps need at least {num_train_steps} samples but the iteration has "
            f"{len(samples)}; lower the number of train steps or roll out more prompts"
        )
    for index, weight in enumerate(teacher_weights):
        if not (math.isfinite(weight) and weight >= 0):
            raise MtopdError(f"the weight of teacher {index} is {weight}; it must be finite and not negative")
    sample_id, times = Counter(sample.sample_id for sample in samples).most_common(1)[0]
    if times > 1:
        raise MtopdError(f"sample_id {sample_id} is given {times} times; it would be trained on {times} times")
    for sample in samples:
        _check_sample(sample, len(teacher_weights))


def _check_sample(sample: SampleMetadata, num_teachers: int) -> None:
    if not 0 <= sample.teacher_index < num_teachers:
        raise MtopdError(
            f"sample {sample.sample_id} has teacher_index {sample.teacher_index} but the run has {num_teachers} "
            "teachers, counted from 0; use the trajectories with the config that made them"
        )
    if sample.prompt_len < 1 or sample.response_len < 1:
        raise MtopdError(
            f"sample {sample.sample_id} has prompt_len {sample.prompt_len} and response_len {sample.response_len}; "
            "both must be at least 1"
        )
    if not 0 <= sample.num_loss_tokens <= sample.response_len:
        raise MtopdError(
            f"sample {sample.sample_id} has {sample.num_loss_tokens} loss tokens in a response of "
            f"{sample.response_len} tokens"
        )


def _split_evenly(samples: Sequence[SampleMetadata], num_parts: int) -> list[Sequence[SampleMetadata]]:
    bounds = [len(samples) * part // num_parts for part in range(num_parts + 1)]
    return [samples[start:end] for start, end in pairwise(bounds)]


def _row_length(sample: SampleMetadata) -> int:
    # The last response token is predicted but predicts nothing, so it is no input.
    return sample.prompt_len + sample.response_len - 1


def _deal(mini_batch: Sequence[SampleMetadata], dp_size: int, room: int) -> list[list[SampleMetadata]]:
    """Longest first, each sample to the dp rank with the fewest tokens among those with fewer than ``room`` samples.

    All rows of a step are padded to one length.  Without the bound a rank with many short samples would need more
    micro-batches than an even deal, and every other rank would run dummies beside it.
    """
    parts: list[list[SampleMetadata]] = [[] for _ in range(dp_size)]
    ranks_with_room = [(0, 0, rank) for rank in range(dp_size)]  # a heap of (tokens, samples, rank)
    for sample in sorted(mini_batch, key=lambda s: (-_row_length(s), s.sample_id)):
        tokens, count, rank = heapq.heappop(ranks_with_room)
        parts[rank].append(sample)
        if count + 1 < room:
            heapq.heappush(ranks_with_room, (tokens + _row_length(sample), count + 1, rank))
    return [sorted(part, key=lambda s: (s.teacher_index, s.sample_id)) for part in parts]


def _cut(
    part: Sequence[SampleMetadata], num_micro_batches: int, size: int, weights: Mapping[int, float]
) -> tuple[MicroBatch, ...]:
    planned = [PlannedSample(s.sample_id, s.teacher_index, weights[s.sample_id]) for s in part]
    return tuple(MicroBatch(tuple(planned[k * size : (k + 1) * size])) for k in range(num_micro_batches))


def _token_weights(
    mini_batch: Sequence[SampleMetadata], teacher_weights: Sequence[float], normalization: Normalization
) -> dict[int, float]:
    """The weight of one loss token of each sample, by sample id.  A sample without loss tokens divides by nothing."""
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
        sample.sample_id: teacher_weights[sample.teacher_index] / denominator(sample) if sample.num_loss_tokens else 0.0
        for sample in mini_batch
    }


def _loss_tokens_by_teacher(mini_batch: Sequence[SampleMetadata]) -> dict[int, int]:
    num_tokens: Counter[int] = Counter()
    for sample in mini_batch:
        num_tokens[sample.teacher_index] += sample.num_loss_tokens
    return {teacher: count for teacher, count in sorted(num_tokens.items()) if count}


def _round_up(value: int, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple
