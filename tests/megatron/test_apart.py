"""Work that takes ranks unlike times ends on the store, and is dealt there."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from mtopd.megatron import agreement
from mtopd.megatron.agreement import apart, deal
from mtopd.types import MtopdError
from tests.support.gloo_ranks import WORLD, on_ranks


def test_numbers_are_dealt_once_and_all_wait_for_the_slowest(tmp_path: Path) -> None:
    def body(ranks: Any) -> tuple[list[int], list[int], float, float]:
        agreement.SILENCE_S = 3.0
        dealt: list[list[int]] = [[], []]
        with apart(ranks) as name:
            for call in range(2):
                while (number := deal(name, call)) < 20:
                    dealt[call].append(number)
                    time.sleep(0.01)
            if ranks.rank == 1:
                time.sleep(6)  # it beats meanwhile
            through = time.monotonic()
        after = time.monotonic()
        with apart(ranks) as other:
            assert deal(other, 0) < WORLD, "another piece of work, other numbers"
        return dealt[0], dealt[1], through, after

    found = on_ranks(tmp_path, body)
    for call in range(2):
        assert sorted(n for result in found for n in result[call]) == list(range(20))
    slowest = max(result[2] for result in found)
    assert all(result[3] >= slowest for result in found)


def test_what_one_rank_raises_all_raise_and_nothing_more_is_dealt(tmp_path: Path) -> None:
    def body(ranks: Any) -> None:
        with apart(ranks) as name:
            if ranks.rank == 2:
                raise OSError(28, "No space left on device", "/log.bin")
            deadline = time.monotonic() + 200
            while deal(name, 0) < 1 << 30:
                assert time.monotonic() < deadline
                time.sleep(0.05)

    found = on_ranks(tmp_path, body)
    assert len({*found}) == 1
    assert found[0].startswith("rank 2 on host ")
    assert found[0].endswith("/log.bin: No space left on device")


def test_a_rank_that_falls_silent_is_named(tmp_path: Path) -> None:
    def body(ranks: Any) -> None:
        agreement.SILENCE_S = 1.0
        if ranks.rank == 1:
            time.sleep(600)  # its host stopped
        with apart(ranks):
            pass

    (said,) = on_ranks(tmp_path, body, awaited=1)
    assert said.startswith("rank 1 has given no sign of life for 1 seconds")


def test_errors_that_are_nobodys_pass_as_they_are(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'one'}", rank=0, world_size=1)
    try:
        ranks: Any = SimpleNamespace(rank=0, world_size=1)
        with pytest.raises(KeyError), apart(ranks):
            raise KeyError("a bug")
        with pytest.raises(MtopdError, match=r"^found nothing$"), apart(ranks):
            raise MtopdError("found nothing")
    finally:
        dist.destroy_process_group()
