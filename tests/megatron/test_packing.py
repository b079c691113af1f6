"""Rows of a micro-batch: every trained token stands once, at the place that predicts it, on exactly
one cp rank.
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtopd.data import SupervisedExample
from mtopd.megatron.packing import loss_rows_of_rank, pack_rows
from mtopd.pipelines import supervised


def ranks(cp_rank: int = 0, cp_size: int = 1) -> Any:
    return SimpleNamespace(cp_rank=cp_rank, cp_size=cp_size, device=torch.device("cpu"))


def samples_of(lengths: list[tuple[int, int]], seed: int) -> list[Any]:
    """Samples whose token ids are unique over all of them, with masks that have holes."""
    rng, at, samples = np.random.default_rng(seed), 1, []
    for prompt_len, response_len in lengths:
        ids = np.arange(at, at + prompt_len + response_len)
        at += len(ids)
        mask = (rng.random(response_len) < 0.7).astype(np.uint8)
        samples.append(
            SimpleNamespace(
                prompt_ids=ids[:prompt_len], response_ids=ids[prompt_len:], loss_mask=mask
            )
        )
    return samples


LENGTHS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=6)


@given(LENGTHS, st.integers(0, 99), st.sampled_from([1, 2, 3]), st.booleans())
def test_every_trained_token_is_predicted_once_from_the_token_before_it(
    lengths: list[tuple[int, int]], seed: int, cp_size: int, packed: bool
) -> None:
    samples = samples_of(lengths, seed)
    sizes = [len(s.prompt_ids) + len(s.response_ids) - 1 for s in samples]
    cp_size = 1 if packed else cp_size
    needed = sum(sizes) if packed else max(sizes)
    shape = (1 if packed else len(samples), -(-needed // (2 * cp_size)) * 2 * cp_size)
    trained = [int(t) for s in samples for t in s.response_ids[s.loss_mask.astype(bool)]]
    seen: list[tuple[int, int]] = []  # (row of the cached states, token)
    for cp_rank in range(cp_size):
        batch = pack_rows(
            samples,
            [float(i + 1) for i in range(len(samples))],
            shape=shape,
            packed=packed,
            ranks=ranks(cp_rank, cp_size),
            payload=None,
        )
        assert (
            batch.input_ids_BS.shape
            == batch.position_ids_BS.shape
            == (shape[0], shape[1] // cp_size)
        )
        before = batch.input_ids_BS[batch.row_T, batch.position_T].tolist()
        cached = [
            (owner, row)
            for owner, s in enumerate(samples)
            for rows in loss_rows_of_rank(s, shape[1], ranks(cp_rank, cp_size))
            for row in rows
        ]
        assert len(before) == len(cached)
        for token, (owner, row), weight in zip(
            before, cached, batch.token_weight_T.tolist(), strict=True
        ):
            s = samples[owner]
            assert token + 1 == s.response_ids[s.loss_mask.astype(bool)][row], (
                "the state that predicts the token"
            )
            assert weight == owner + 1
        seen += [(owner, row) for owner, row in cached]
        assert bool((batch.position_ids_BS[batch.row_T, batch.position_T] < max(sizes)).all())
    assert len(seen) == len(set(seen)) == len(trained)


@given(LENGTHS, st.integers(0, 5))
def test_a_packed_row_is_cut_into_its_samples_and_the_padding(
    lengths: list[tuple[int, int]], padding: int
) -> None:
    samples = samples_of(lengths, 0)
    sizes = [len(s.prompt_ids) + len(s.response_ids) - 1 for s in samples]
    total = sum(sizes) + padding
    batch = pack_rows(
        samples, [1.0] * len(samples), shape=(1, total), packed=True, ranks=ranks(), payload=None
    )
    assert batch.cu_seqlens is not None
    cuts = batch.cu_seqlens.tolist()
    assert np.diff(cuts).tolist() == ([*sizes, padding] if padding else sizes)
    assert batch.max_seqlen == max(np.diff(cuts))
    for start, stop in pairwise(cuts):
        assert batch.position_ids_BS[0, start:stop].tolist() == list(range(stop - start)), (
            "positions begin anew"
        )


def test_labels_of_a_cp_rank_without_any_are_token_ids_all_the_same() -> None:
    """Positions 5 to 8 of 16 are the other rank's; an empty tensor of no stated kind would be
    float32.
    """
    example = SupervisedExample((1, 2, 3, 4, 5, 6), (7, 8, 9, 10))
    config: Any = SimpleNamespace(train=SimpleNamespace(micro_batch_size=1))
    labels = []
    for cp_rank in range(2):
        here = SimpleNamespace(**vars(ranks(cp_rank, 2)), dp_rank=0, dp_size=1)
        student: Any = SimpleNamespace(ranks=here, trainer=SimpleNamespace(seq_length_multiple=16))
        (micro_batch,), num_tokens = supervised.pack([example], config, student)
        assert num_tokens == 4 and micro_batch.payload.dtype == torch.long
        labels.append(micro_batch.payload.tolist())
    assert labels == [[], [7, 8, 9, 10]]


def test_a_mini_batch_is_dealt_by_shares_and_named_by_source_and_row() -> None:
    prompts: Any = SimpleNamespace(names=["words", "sums"], train=[range(5), range(3)])
    drawn = supervised.draw(prompts, {"words": 3.0, "sums": 1.0}, 8, seed=1)
    assert [source for source, _ in drawn] == [0] * 6 + [1] * 2 and all(
        row < len(prompts.train[s]) for s, row in drawn
    )
    assert drawn == supervised.draw(prompts, {"words": 3.0, "sums": 1.0}, 8, seed=1)
    assert (
        supervised.describe_rows([(0, 4), (1, 2), (0, 1), (0, 4)], prompts.names)
        == "words 1, 4; sums 2"
    )
