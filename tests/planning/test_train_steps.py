"""The promises of `plan_train_steps` on random metadata, numbers by hand, and what it refuses."""

from __future__ import annotations

import math
import random
from collections import Counter
from fractions import Fraction
from itertools import chain, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtopd.planning import SampleCost, plan_train_steps, row_length
from mtopd.types import MtopdError, PlannedSample, SampleMetadata, TrainStepPlan

NORMALIZATIONS = ["teacher_balanced", "token_mean", "sequence_mean"]
WEIGHTS = [0.5, 0.3, 0.0, 0.2]


def teachers_of(plan: TrainStepPlan, dp_rank: int) -> set[int]:
    """The head loads that this train step needs on a dp rank."""
    return {s.teacher_index for mb in plan.micro_batches[dp_rank] for s in mb.samples}


def metadata(
    sample_id: int,
    teacher: int = 0,
    prompt_len: int = 3,
    response_len: int = 4,
    loss: int | None = None,
):
    return SampleMetadata(
        sample_id, teacher, prompt_len, response_len, response_len if loss is None else loss
    )


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[SampleMetadata], dict]:
    rows = draw(
        st.lists(
            st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(1, 30)),
            min_size=1,
            max_size=40,
        )
    )
    first_id = draw(st.integers(0, 5))
    samples = [
        metadata(
            first_id + 3 * k, teacher, prompt_len, response_len, draw(st.integers(0, response_len))
        )
        for k, (teacher, prompt_len, response_len) in enumerate(rows)
    ]
    packed = draw(st.booleans())
    options = {
        "num_train_steps": draw(st.integers(1, min(len(samples), 4))),
        "dp_size": draw(st.integers(1, 5)),
        "micro_batch_size": None if packed else draw(st.integers(1, 6)),
        "token_budget": draw(st.integers(max(map(row_length, samples)), 150)) if packed else None,
        "micro_batch_multiple": draw(st.integers(1, 3)),
        "cost": draw(st.sampled_from([None, SampleCost(1.0, 0.5)])),
        "seq_length_multiple": draw(st.sampled_from([1, 4, 16])),
        "normalization": draw(st.sampled_from(NORMALIZATIONS)),
        "seed": draw(st.integers(0, 99)),
        "teacher_weights": WEIGHTS,
    }
    return samples, options


def samples_of(plan: TrainStepPlan) -> list[PlannedSample]:
    return [s for rank in plan.micro_batches for micro_batch in rank for s in micro_batch.samples]


def stated_total(mini_batch: list[SampleMetadata], normalization: str) -> Fraction:
    """The sum of all token weights as the module states it, in exact arithmetic."""
    tokens, sequences = Counter(), Counter()
    for s in mini_batch:
        if s.num_loss_tokens:
            tokens[s.teacher_index] += s.num_loss_tokens
            sequences[s.teacher_index] += 1
    share = {
        "teacher_balanced": dict.fromkeys(tokens, 1),
        "token_mean": tokens,
        "sequence_mean": sequences,
    }
    counts = share[normalization]
    whole = 1 if normalization == "teacher_balanced" else sum(counts.values()) or 1
    return sum((Fraction(WEIGHTS[i]) * count / whole for i, count in counts.items()), Fraction(0))


@given(problems())
@settings(max_examples=150, deadline=None)
def test_every_promise_holds(problem: tuple[list[SampleMetadata], dict]) -> None:
    samples, options = problem
    plans = plan_train_steps(samples, **options)
    by_id = {s.sample_id: s for s in samples}

    assert len(plans) == options["num_train_steps"]
    planned = list(chain.from_iterable(samples_of(plan) for plan in plans))
    assert sorted(s.sample_id for s in planned) == sorted(by_id)
    assert all(s.teacher_index == by_id[s.sample_id].teacher_index for s in planned)
    sizes = [len(samples_of(plan)) for plan in plans]
    assert max(sizes) - min(sizes) <= 1
    for plan in plans:
        check_step(plan, [by_id[s.sample_id] for s in samples_of(plan)], options)

    shuffled = list(samples)
    random.Random(1).shuffle(shuffled)
    assert plan_train_steps(shuffled, **options) == plans


def check_step(plan: TrainStepPlan, mini_batch: list[SampleMetadata], options: dict) -> None:
    size, budget, dp_size = options["micro_batch_size"], options["token_budget"], options["dp_size"]
    length = {s.sample_id: row_length(s) for s in mini_batch}
    assert len(plan.micro_batches) == dp_size and plan.packed == (size is None)
    (count,) = {len(part) for part in plan.micro_batches}
    assert count % options["micro_batch_multiple"] == 0
    if size:
        least = math.ceil(len(mini_batch) / (dp_size * size))
        assert count - least < options["micro_batch_multiple"]
    for part in plan.micro_batches:
        fill = [len(micro_batch.samples) for micro_batch in part]
        assert sorted(map(bool, fill), reverse=True) == list(map(bool, fill)), (
            "empty micro-batches stand at the end"
        )
        order = [s.teacher_index for micro_batch in part for s in micro_batch.samples]
        assert order == sorted(order), "the teacher index never decreases inside a rank"
        for micro_batch in part:
            inside = [(s.teacher_index, s.sample_id) for s in micro_batch.samples]
            assert inside == sorted(inside)
            assert len(inside) <= size if size else sum(length[i] for _, i in inside) <= budget
    teachers = {s.teacher_index for s in mini_batch}
    assert (
        sum(len(teachers_of(plan, rank)) for rank in range(dp_size)) <= len(teachers) + dp_size - 1
    )
    cost = options["cost"] or SampleCost()
    if size and size * math.ceil(len(mini_batch) / (dp_size * size)) >= len(mini_batch):
        costs = [
            sum(cost(length[s.sample_id]) for mb in part for s in mb.samples)
            for part in plan.micro_batches
        ]
        most_expensive = max(cost(n) for n in length.values())
        # Costs are rounded to one in 1e6.
        assert max(costs) <= (math.fsum(costs) / dp_size + most_expensive) * (1 + 1e-4)

    rows = [
        sum(length[s.sample_id] for s in mb.samples) for part in plan.micro_batches for mb in part
    ]
    longest = max(length.values()) if size else max(rows)
    if not size:
        by_rank = [rows[rank * count : (rank + 1) * count] for rank in range(dp_size)]
        assert all(a + b > longest for packs in by_rank for a, b in pairwise(packs) if b)
    assert plan.seq_length % options["seq_length_multiple"] == 0
    assert longest <= plan.seq_length < longest + options["seq_length_multiple"]
    computed = dp_size * count * (size or 1) * plan.seq_length
    assert plan.waste == pytest.approx(1 - sum(length.values()) / computed) and 0 <= plan.waste < 1

    loss_tokens = Counter()
    for s in mini_batch:
        loss_tokens[s.teacher_index] += s.num_loss_tokens
    assert plan.num_tokens == {i: n for i, n in loss_tokens.items() if n}

    tokens = {s.sample_id: s.num_loss_tokens for s in mini_batch}
    assert all(s.token_weight == 0 for s in samples_of(plan) if not tokens[s.sample_id])
    total = math.fsum(s.token_weight * tokens[s.sample_id] for s in samples_of(plan))
    assert total == pytest.approx(
        float(stated_total(mini_batch, options["normalization"])), rel=1e-12
    )


def plan_one(samples: list[SampleMetadata], **changes) -> TrainStepPlan:
    options = {
        "num_train_steps": 1,
        "dp_size": 1,
        "micro_batch_size": 8,
        "seed": 0,
        "teacher_weights": [0.5, 0.25],
    }
    (plan,) = plan_train_steps(samples, **{"normalization": "token_mean", **options, **changes})
    return plan


@pytest.mark.parametrize(
    ("normalization", "expected"),
    [
        ("teacher_balanced", [0.5 / 8, 0.5 / 8, 0.25 / 10, 0.0]),
        ("token_mean", [0.5 / 18, 0.5 / 18, 0.25 / 18, 0.0]),
        ("sequence_mean", [0.5 / (3 * 2), 0.5 / (3 * 6), 0.25 / (3 * 10), 0.0]),
    ],
)
def test_token_weights_by_hand(normalization: str, expected: list[float]) -> None:
    # The last sample has a long response and no loss token: it must enter neither N nor B.
    samples = [
        metadata(0, 0, response_len=5, loss=2),
        metadata(1, 0, response_len=6),
        metadata(2, 1, response_len=10),
        metadata(3, 1, response_len=9, loss=0),
    ]
    # The denominators are global: two dp ranks get the weights that one gets.
    for dp_size in (1, 2):
        plan = plan_one(samples, normalization=normalization, dp_size=dp_size)
        weights = {s.sample_id: s.token_weight for s in samples_of(plan)}
        assert [weights[k] for k in range(4)] == pytest.approx(expected)
        assert plan.num_tokens == {0: 8, 1: 10}


def test_an_absent_teacher_is_not_made_up_for() -> None:
    plan = plan_one([metadata(0, 1)], normalization="teacher_balanced")
    assert sum(s.token_weight for s in samples_of(plan)) * 4 == pytest.approx(0.25)


def test_a_step_without_any_loss_token_is_planned_with_weight_zero() -> None:
    for normalization in NORMALIZATIONS:
        plan = plan_one([metadata(0, loss=0)], normalization=normalization)
        assert samples_of(plan) == [PlannedSample(0, 0, 0.0)]
        assert plan.num_tokens == {}


def response_lengths(plan: TrainStepPlan, samples: list[SampleMetadata]) -> list[list[int]]:
    return [
        sorted(samples[s.sample_id].response_len for mb in part for s in mb.samples)
        for part in plan.micro_batches
    ]


def test_dealing_is_by_cost_within_the_room_of_an_even_deal() -> None:
    samples = [
        metadata(k, prompt_len=1, response_len=length) for k, length in enumerate([1, 1, 1, 1, 4])
    ]
    assert sorted(response_lengths(plan_one(samples, dp_size=2), samples)) == [[1, 1, 1, 1], [4]]
    # By cost alone the first rank would get the long sample only and the second need four
    # micro-batches.
    samples = [
        metadata(k, prompt_len=1, response_len=length) for k, length in enumerate([100, *[1] * 7])
    ]
    plan = plan_one(samples, dp_size=2, micro_batch_size=2)
    assert sorted(response_lengths(plan, samples)) == [[1, 1, 1, 1], [1, 1, 1, 100]]
    assert [len(part) for part in plan.micro_batches] == [2, 2]


@pytest.mark.parametrize(
    ("token_budget", "cost", "expected"),
    [
        # Three packs, an empty one: by tokens the long sample has company on its rank.
        (8, None, [8, 9]),
        # Attention makes it cost more than its tokens; the waste is the same.
        (8, SampleCost(0.0, 1.0), [1, 16]),
        (24, SampleCost(0.0, 1.0), [5, 12]),  # that would be a waste of 25 % instead of none
    ],
)
def test_packs_are_dealt_by_cost_unless_it_is_wasteful(
    token_budget: int, cost: SampleCost | None, expected: list[int]
) -> None:
    samples = [
        metadata(k, prompt_len=1, response_len=length) for k, length in enumerate([8, *[1] * 16])
    ]
    plan = plan_one(samples, dp_size=2, micro_batch_size=None, token_budget=token_budget, cost=cost)
    assert sorted(len(part) for part in response_lengths(plan, samples)) == expected


def test_a_rank_sees_few_teachers() -> None:
    samples = [metadata(k, teacher=k % 10) for k in range(240)]
    for limit in ({"micro_batch_size": 8}, {"micro_batch_size": None, "token_budget": 64}):
        plan = plan_one(samples, dp_size=8, teacher_weights=[0.1] * 10, **limit)
        assert max(len(teachers_of(plan, rank)) for rank in range(8)) <= 3, (
            "ten teachers over eight ranks"
        )


@pytest.mark.parametrize("num_teachers", [1, 3, 12])
@pytest.mark.parametrize("dp_size", [1, 2, 4, 8])
@pytest.mark.parametrize("samples_of_a_rank", [16, 64])
def test_packs_of_realistic_lengths_waste_little(
    samples_of_a_rank: int, dp_size: int, num_teachers: int
) -> None:
    """At least 16 samples of each rank and 10 of each teacher; fewer are in the order of teachers
    and little else.
    """
    num_samples = max(samples_of_a_rank * dp_size, 10 * num_teachers)
    for seed in range(5):
        samples = realistic_samples(num_samples, num_teachers, seed)
        shared = {
            "dp_size": dp_size,
            "teacher_weights": [1.0] * num_teachers,
            "seq_length_multiple": 16,
        }
        for times in (2, 8):
            budget = times * max(map(row_length, samples))
            plan = plan_one(samples, **shared, micro_batch_size=None, token_budget=budget)
            assert plan.waste <= 0.05 < plan_one(samples, **shared).waste


def test_more_packs_than_needed_where_they_compute_less() -> None:
    samples = [metadata(k, teacher=k, prompt_len=1, response_len=4) for k in range(3)]
    alike = {"micro_batch_size": None, "token_budget": 11, "teacher_weights": [1.0] * 3}
    plan = plan_one(samples, **alike)
    assert (len(plan.micro_batches[0]), plan.seq_length, plan.waste) == (3, 4, 0.0), (
        "two would be 8 tokens long"
    )
    plan = plan_one(samples, **alike, micro_batch_multiple=2)
    assert (len(plan.micro_batches[0]), plan.seq_length, plan.waste) == (2, 8, 0.25)


def test_a_rank_does_not_get_all_long_samples_of_a_teacher() -> None:
    """Attention over the pairs of a sample's tokens, on the rank with most over the mean."""
    for num_teachers in (1, 3):
        samples = realistic_samples(512, num_teachers, seed=0)
        weights = [1.0] * num_teachers
        plan = plan_one(
            samples, dp_size=8, micro_batch_size=None, token_budget=8192, teacher_weights=weights
        )
        pairs = [
            sum(row_length(samples[s.sample_id]) ** 2 for b in part for s in b.samples)
            for part in plan.micro_batches
        ]
        assert max(pairs) < 1.2 * sum(pairs) / 8, pairs


def realistic_samples(count: int, num_teachers: int, seed: int) -> list[SampleMetadata]:
    rng = random.Random(seed)
    return [
        metadata(
            k,
            k % num_teachers,
            rng.randint(20, 200),
            min(int(rng.lognormvariate(6.0, 1.0)) + 1, 3800),
        )
        for k in range(count)
    ]


def test_an_empty_micro_batch_makes_up_a_group() -> None:
    plan = plan_one([metadata(k) for k in range(3)], micro_batch_size=1, micro_batch_multiple=2)
    assert [len(mb.samples) for mb in plan.micro_batches[0]] == [1, 1, 1, 0]


def test_seed_changes_the_split_into_steps() -> None:
    samples = [metadata(k) for k in range(64)]
    options = {"num_train_steps": 8, "teacher_weights": [1.0], "dp_size": 1, "micro_batch_size": 8}
    plans = [
        plan_train_steps(samples, **options, normalization="token_mean", seed=seed)
        for seed in (0, 0, 1)
    ]
    assert plans[0] == plans[1] != plans[2]
    first_step = {s.sample_id for s in samples_of(plans[0][0])}
    assert first_step != set(range(8)), "the shuffle is over the whole iteration"


@pytest.mark.parametrize(
    ("samples", "changes", "message"),
    [
        ([], {}, "no samples"),
        (
            [metadata(0)],
            {"num_train_steps": 2},
            "2 train steps need at least 2 samples but the iteration has 1",
        ),
        ([metadata(0)], {"dp_size": 0}, "dp_size is 0"),
        ([metadata(0)], {"micro_batch_size": 0}, "micro_batch_size is 0"),
        (
            [metadata(0)],
            {"token_budget": 10},
            "micro_batch_size is 8 and token_budget is 10; give exactly one",
        ),
        (
            [metadata(0)],
            {"micro_batch_size": None},
            "micro_batch_size is None and token_budget is None",
        ),
        (
            [metadata(5)],
            {"micro_batch_size": None, "token_budget": 5},
            "sample 5 has 6 tokens, more than token_budget 5",
        ),
        ([metadata(0)], {"micro_batch_multiple": 0}, "micro_batch_multiple is 0"),
        ([metadata(0)], {"seq_length_multiple": 0}, "seq_length_multiple is 0"),
        ([metadata(0)], {"normalization": "mean"}, "'mean'; use one of teacher_balanced"),
        ([metadata(0)], {"teacher_weights": [float("nan")]}, "weight of teacher 0 is nan"),
        ([metadata(0, teacher=2)], {}, "teacher_index 2 but the run has 2 teachers"),
        ([metadata(0, teacher=-1)], {}, "teacher_index -1"),
        ([metadata(7), metadata(1), metadata(7)], {}, "sample_id 7 is given 2 times"),
        ([metadata(0, prompt_len=0)], {}, "prompt_len 0"),
        ([metadata(0, response_len=0)], {}, "response_len 0"),
        ([metadata(0, response_len=4, loss=5)], {}, "5 loss tokens in a response of 4"),
    ],
)
def test_impossible_inputs_are_refused_with_numbers(samples, changes: dict, message: str) -> None:
    with pytest.raises(MtopdError, match=message):
        plan_one(samples, **changes)
