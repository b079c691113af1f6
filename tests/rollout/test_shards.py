"""Shards of trajectories are sealed as soon as they are whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mtopd.rollout.engine import Request
from mtopd.rollout.memory_log import Response
from mtopd.rollout.shards import Counts, EndedFirst, ShardWriter
from mtopd.trajectories import TokenStore, sealed_shards
from mtopd.types import Prompt
from tests.rollout.test_token_log import count_calls


def planned(count: int) -> dict[int, tuple[Prompt, Request]]:
    prompts = [Prompt(f"p/{i}", {"domain": "a"}, (5, 6, i % 90), i % 3) for i in range(count)]
    return {i: (p, Request(i, p.prompt_id, p.prompt_ids)) for i, p in enumerate(prompts)}


def response(sample_id: int, tokens: int = 4) -> Response:
    ids = (np.arange(tokens) + sample_id % 50).astype(np.int32)
    reason = "stop" if sample_id % 2 else "length"
    return Response(sample_id, ids, -ids.astype(np.float32) / 8, ((0, 3), (2, 4)), reason)


def test_a_shard_is_sealed_by_its_last_response(tmp_path: Path) -> None:
    shards = ShardWriter(tmp_path, planned(10), 4, generation=1)
    order = [0, 5, 1, 9, 3, 2, 8, 4, 7, 6]
    sealed = [sorted(shards.add(response(i))) for i in order]
    assert [ids for ids in sealed if ids] == [[0, 1, 2, 3], [8, 9], [4, 5, 6, 7]]
    assert sealed[order.index(2)] == [0, 1, 2, 3], "not before"
    assert sealed_shards(tmp_path) == ["batch-00000", "batch-00001", "batch-00002"]
    assert shards.sealed == Counts(samples=10, tokens=40, stopped=5)
    found = TokenStore(tmp_path).get(7)
    assert found.prompt_ids == (5, 6, 7) and found.response_ids == (7, 8, 9, 10)
    assert found.loss_mask == (1,) * 4 and found.version_spans == ((0, 3), (2, 4))
    assert (found.student_version, found.finish_reason) == (4, "stop")
    again = ShardWriter(tmp_path, planned(4), 4, 1)
    again.add(response(0))
    with pytest.raises(AssertionError, match="sample 0 came twice"):
        again.add(response(0))


def test_the_first_to_end_fill_shards_in_their_order(tmp_path: Path) -> None:
    """Of 12 that are asked for 10 are an iteration's.  A start was killed behind its second shard."""
    first = EndedFirst(tmp_path, planned(12), 4, generation=1, count=10, sealed=())
    order = [11, 3, 7, 0, 5, 9, 1, 2, 8, 4]
    sealed = [sorted(first.add(response(i))) for i in order[:9]]
    assert [ids for ids in sealed if ids] == [[0, 3, 7, 11], [1, 2, 5, 9]]
    assert first.num_missing == 1 and first.sealed.samples == 8
    left = {i: asked for i, asked in planned(12).items() if i in (4, 6, 8, 10)}
    names = sealed_shards(tmp_path)
    second = EndedFirst(tmp_path, left, 4, generation=2, count=2, sealed=names)
    assert [sorted(second.add(response(i))) for i in (6, 4)] == [[], [4, 6]]
    assert second.num_missing == 0
    assert TokenStore(tmp_path).shards == {
        "batch-00000": [0, 3, 7, 11],
        "batch-00001": [1, 2, 5, 9],
        "batch-00002": [4, 6],
    }


def test_sealing_and_reading_are_linear_in_samples_and_free_of_tokens(tmp_path: Path) -> None:
    def work(name: str, samples: int, tokens: int) -> int:
        items, folder = planned(samples), tmp_path / name

        def seal_and_read() -> None:
            shards = ShardWriter(folder, items, 50, generation=1)
            for i in range(samples):
                shards.add(response(i, tokens))
            store = TokenStore(folder)
            assert len(store.samples) == samples
            for i in range(samples):
                assert len(store.tokens(i).response_ids) == tokens

        return count_calls(seal_and_read)

    few, many, long = work("few", 200, 4), work("many", 800, 4), work("long", 200, 400)
    assert many < 4.2 * few
    assert long < 1.02 * few
