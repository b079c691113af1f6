"""The head slot: one head, measured from live storages; right rows; refuses a second while one is held."""

from __future__ import annotations

import pytest
import torch

from mtopd.convert.teacher import add_teacher
from mtopd.teacher_offload.head_slot import HeadSlot
from mtopd.teacher_offload.store import TeacherStore
from tests.small_models import save_model


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[torch.nn.Module, TeacherStore]]:
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
    slot = HeadSlot([s for _, s in teachers], first_row=first, num_rows=count, device=torch.device("cpu"))
    for index, (model, _) in enumerate(teachers):
        whole = torch.nn.functional.pad(model.lm_head.weight.detach(), (0, 0, 0, 256))
        assert torch.equal(slot.head(index).weight_vE, whole[first : first + count])
    assert slot.counters.peak_resident == 1


def test_a_head_is_loaded_once_until_it_is_dropped(teachers: list[tuple[torch.nn.Module, TeacherStore]]) -> None:
    slot = HeadSlot([s for _, s in teachers], first_row=0, num_rows=64, device=torch.device("cpu"))
    for index in (0, 0, 1, 1):
        slot.head(index)
    assert slot.take_counters().loads == {0: 1, 1: 1}
    slot.drop()
    slot.head(1)
    counters = slot.take_counters()
    assert counters.loads == {1: 1} and counters.bytes_read[1] >= 64 * 96 * 4


def test_a_second_head_is_refused_while_anything_of_the_first_lives(
    teachers: list[tuple[torch.nn.Module, TeacherStore]],
) -> None:
    slot = HeadSlot([s for _, s in teachers], first_row=0, num_rows=64, device=torch.device("cpu"))
    view = slot.head(0).weight_vE[:1]  # a view keeps the storage alive although the head itself is gone
    with pytest.raises(AssertionError, match="still referenced"):
        slot.head(1)
    del view
    assert slot.head(1).weight_vE.shape == (64, 96)
