"""Reading ahead: the right bytes in order, memory within the budget, kept shares read once, errors
in their place.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtopd.convert.teacher import add_teacher
from mtopd.planning import Mesh, Part, plan_parts
from mtopd.teacher_offload import store as store_module
from mtopd.teacher_offload.read_ahead import ReadAhead, _Ring
from mtopd.teacher_offload.store import TeacherStore, open_store
from mtopd.types import MtopdError
from tests.small_models import save_model

ONE_RANK = Mesh(0, 1, 0, 1, 0, 1, 0, 1)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[TeacherStore]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "BLOCK_BYTES", 4096)  # so that small models have many blocks
        root = tmp_path_factory.mktemp("stores")
        for i, layers in enumerate((4, 7)):
            save_model(root / f"hf{i}", seed=i, layers=layers, tied=False)
            add_teacher(f"t{i}", root / f"hf{i}", root / f"t{i}", slices=1)
        yield [open_store(root / f"t{i}") for i in range(2)]


@pytest.fixture
def parts(stores: list[TeacherStore]) -> list[list[Part]]:
    return [plan_parts(store, ONE_RANK) for store in stores]


def visit(
    reads: ReadAhead,
    stores: list[TeacherStore],
    parts: list[list[Part]],
    teachers: list[int],
    budget: int,
) -> None:
    """Take and release everything expected; every byte compared with the file."""
    expected = [(t, p) for t in teachers for p in range(len(parts[t]))]
    reads.expect(expected)
    for key in expected:
        found, shares = reads.take()
        assert found == key
        for r, share in zip(parts[key[0]][key[1]].ranges, shares, strict=True):
            path = Path(stores[key[0]].location) / r.path
            expected_bytes = path.read_bytes()[r.borders[0] : r.borders[-1]]
            assert share.numpy().tobytes() == expected_bytes
        assert reads.counters.peak_host_bytes <= budget
        reads.release()


def open_reads(stores: list[TeacherStore], parts: list[list[Part]], budget: int) -> ReadAhead:
    return ReadAhead(parts, stores=stores, budget=budget, threads=3, pinned=False)


def sizes(parts: list[list[Part]]) -> list[int]:
    return [part.host_bytes for teacher in parts for part in teacher]


def test_shares_that_fit_are_read_once_and_then_kept(
    stores: list[TeacherStore], parts: list[list[Part]]
) -> None:
    total = sum(sizes(parts))
    reads = open_reads(stores, parts, total)
    visit(reads, stores, parts, [0, 1], total)
    assert (reads.counters.bytes_read, reads.counters.bytes_kept) == (total, 0)
    visit(reads, stores, parts, [0, 1, 1], total)  # a second wave of teacher 1
    again = sum(p.host_bytes for t in (0, 1, 1) for p in parts[t])
    assert (reads.counters.bytes_read, reads.counters.bytes_kept) == (total, again)
    reads.close()


@pytest.mark.parametrize("shares", [1, 2, 4, 9, 10])
def test_a_small_budget_is_kept_and_every_byte_is_right(
    stores: list[TeacherStore], parts: list[list[Part]], shares: int
) -> None:
    budget = shares * max(sizes(parts))
    assert budget < sum(sizes(parts))
    reads = open_reads(stores, parts, budget)
    for _ in range(2):
        visit(reads, stores, parts, [0, 1], budget)
    kept = reads.counters.bytes_kept
    assert reads.counters.bytes_read + kept == 2 * sum(sizes(parts))
    assert (kept > 0) == (shares > 8), "beside the window of eight shares the budget keeps some"
    reads.close()


def test_a_budget_below_one_share_is_refused(
    stores: list[TeacherStore], parts: list[list[Part]]
) -> None:
    with pytest.raises(MtopdError, match=r"host_budget is 100 bytes.*'t[01]' takes \d+; raise it"):
        open_reads(stores, parts, 100)


def test_reading_runs_ahead_over_layers_and_teachers(
    stores: list[TeacherStore], parts: list[list[Part]]
) -> None:
    reads = open_reads(stores, parts, sum(sizes(parts)))
    reads.expect([(t, p) for t in (0, 1) for p in range(len(parts[t]))])
    for share in reads._shares:
        for read in share.reads:
            read.result(timeout=30)
    assert [share.key[0] for share in reads._shares] == [0] * 6 + [1] * 9, (
        "nothing but memory bounds the look-ahead"
    )
    reads.close()


def test_a_plan_that_is_dropped_leaves_nothing_behind(
    stores: list[TeacherStore], parts: list[list[Part]]
) -> None:
    for budget in (3 * max(sizes(parts)), sum(sizes(parts))):
        reads = open_reads(stores, parts, budget)
        reads.expect([(1, p) for p in range(len(parts[1]))])
        reads.take()
        reads.release()
        reads.take()  # and not released
        visit(reads, stores, parts, [0, 1], budget)
        reads.close()


def test_a_damaged_block_is_an_error_of_its_own_part_and_can_be_mended(
    stores: list[TeacherStore], parts: list[list[Part]]
) -> None:
    file = stores[0].layer(1)
    path = Path(file.storage.location) / file.path
    whole = path.read_bytes()
    broken = bytearray(whole)
    broken[-100] ^= 1
    path.write_bytes(broken)
    reads = open_reads(stores, parts, sum(sizes(parts)))
    try:
        reads.expect([(0, p) for p in range(len(parts[0]))])
        for _ in range(2):
            reads.take()
            reads.release()
        with pytest.raises(MtopdError, match=r"layers/00001.*do not match their checksum"):
            reads.take()
        path.write_bytes(whole)
        visit(reads, stores, parts, [0], sum(sizes(parts)))  # what failed was not kept
    finally:
        path.write_bytes(whole)
        reads.close()
    assert os.path.getsize(path) == len(whole)


@given(
    st.integers(1, 40), st.lists(st.integers(0, 30), max_size=60), st.randoms(use_true_random=False)
)
def test_the_ring_never_hands_out_memory_twice(
    size: int, requests: list[int], random: object
) -> None:
    ring, live = _Ring(size), []
    for request in requests:
        start = ring.allocate(request)
        if start is None:
            assert live or request > size, "an empty ring takes whatever fits"
            while live and random.random() < 0.7:  # type: ignore[attr-defined]
                ring.free()
                live.pop(0)
        else:
            assert start >= 0 and start + request <= size
            assert all(
                start >= stop or start + request <= first for first, stop in live if stop > first
            ), live
            live.append((start, start + request))
        assert ring.used == sum(stop - first for first, stop in live) <= size


def test_shares_are_plain_bytes(stores: list[TeacherStore], parts: list[list[Part]]) -> None:
    reads = open_reads(stores, parts, sum(sizes(parts)))
    reads.expect([(0, 0)])
    _, shares = reads.take()
    assert all(share.dtype == torch.uint8 for share in shares)
    reads.close()
