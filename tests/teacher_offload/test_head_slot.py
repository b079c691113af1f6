"""The head slot: one head, measured from live storages; right rows; refuses a second while one is
held.
"""

from __future__ import annotations

import pytest
import torch

from mtopd.convert.teacher import add_teacher
from mtopd.teacher_offload import head_slot
from mtopd.teacher_offload.head_slot import HeadSlot
from mtopd.teacher_offload.store import TeacherStore
from tests.small_models import save_model


@pytest.fixture(scope="module")
def teachers(
    tmp_path_factory: pytest.TempPathFactory,
) -> list[tuple[torch.nn.Module, TeacherStore]]:
    root = tmp_path_factory.mktemp("teachers")
    made = []
    for i, (hidden, tied, vocab) in enumerate(((64, True, 109), (96, False, 111))):
        model = save_model(root / f"hf{i}", seed=i, hidden=hidden, layers=2, tied=tied, vocab=vocab)
        made.append((model, add_teacher(f"t{i}", root / f"hf{i}", root / f"t{i}", slices=2)))
    return made


@pytest.mark.parametrize(("first", "count"), [(0, 128), (0, 64), (64, 64), (37, 30), (128, 64)])
def test_a_head_is_the_students_vocabulary_rows(
    teachers: list[tuple[torch.nn.Module, TeacherStore]], first: int, count: int
) -> None:
    slot = HeadSlot(
        [s for _, s in teachers], first_row=first, num_rows=count, device=torch.device("cpu")
    )
    for index, (model, _) in enumerate(teachers):
        whole = torch.nn.functional.pad(model.lm_head.weight.detach(), (0, 0, 0, 256))
        with slot.lease(index) as head:
            assert torch.equal(head.weight_vE, whole[first : first + count])
        del head
    assert slot.counters.peak_resident == 1


def open_slot(teachers: list[tuple[torch.nn.Module, TeacherStore]]) -> HeadSlot:
    return HeadSlot([s for _, s in teachers], first_row=0, num_rows=64, device=torch.device("cpu"))


def use(slot: HeadSlot, index: int) -> torch.Size:
    with slot.lease(index) as head:
        return head.weight_vE.shape


# Small rows stay in host memory, large ones are read again.
@pytest.mark.parametrize("kept_bytes", [1 << 20, 0])
def test_a_head_is_loaded_once_until_it_is_dropped(
    teachers: list[tuple[torch.nn.Module, TeacherStore]],
    kept_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(head_slot, "_KEPT_BYTES", kept_bytes)
    slot = open_slot(teachers)
    for index in (0, 0, 1, 1):
        use(slot, index)
    counters = slot.take_counters()
    assert counters.loads == {0: 1, 1: 1} and counters.bytes_read[1] >= 64 * 96 * 4
    slot.drop()
    use(slot, 1)
    again = slot.take_counters()
    assert again.loads == {1: 1}
    assert again.bytes_read == ({} if kept_bytes else {1: counters.bytes_read[1]})


@pytest.mark.parametrize("kept_bytes", [1 << 20, 0])
def test_the_next_expected_head_waits_in_host_memory(
    teachers: list[tuple[torch.nn.Module, TeacherStore]],
    kept_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(head_slot, "_KEPT_BYTES", kept_bytes)
    slot = open_slot(teachers)
    slot.expect([0, 1, 0])
    for index, coming in ((0, 1), (1, 0), (0, None)):
        with slot.lease(index) as head:
            assert torch.equal(head.weight_vE, teachers[index][0].lm_head.weight.detach()[:64])
        del head
        staged = slot._staged
        assert (staged.teacher if staged else None) == coming
        if staged:
            staged.read.result(timeout=30)  # it is read although nobody has asked yet
    counters = slot.take_counters()
    assert counters.loads == {0: 2, 1: 1} and counters.peak_resident == 1
    assert counters.peak_device_bytes == 64 * 96 * 4, "one head, not the staged one beside it"


def test_an_order_that_was_not_announced_still_gives_the_right_head(
    teachers: list[tuple[torch.nn.Module, TeacherStore]],
) -> None:
    slot = open_slot(teachers)
    slot.expect([0, 0, 0])
    with slot.lease(1) as head:
        assert torch.equal(head.weight_vE, teachers[1][0].lm_head.weight.detach()[:64])


def test_a_second_head_is_refused_while_one_is_leased(
    teachers: list[tuple[torch.nn.Module, TeacherStore]],
) -> None:
    slot = open_slot(teachers)
    with (
        slot.lease(0),
        pytest.raises(AssertionError, match="a head is leased while teacher 1's is asked for"),
    ):
        use(slot, 1)
    assert use(slot, 1) == (64, 96)


def test_a_second_head_is_refused_while_anything_of_the_first_lives(
    teachers: list[tuple[torch.nn.Module, TeacherStore]],
) -> None:
    slot = open_slot(teachers)
    with slot.lease(0) as head:
        view = head.weight_vE[:1]  # a view keeps the storage alive although the head itself is gone
    del head
    with pytest.raises(AssertionError, match="still referenced"):
        use(slot, 1)
    del view
    assert use(slot, 1) == (64, 96)
