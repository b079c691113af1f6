"""metrics.jsonl: what is written is read, a resumed step replaces its line, a half-written last
line is no harm.
"""

import json
from pathlib import Path

import pytest

from mtopd.metrics import MetricsWriter, read_metrics
from mtopd.types import MtopdError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def append(path: Path, *lines: tuple[str, int, dict, int | None]) -> None:
    writer = MetricsWriter(path, enabled=True)
    for kind, iteration, values, step in lines:
        writer.write(kind, iteration, values, step=step)
    writer.close()


def test_lines_are_read_as_they_were_written(path: Path) -> None:
    append(
        path, ("rollout", 0, {"tokens": 5}, None), ("train_step", 0, {"head_loads": {"rot": 1}}, 3)
    )
    assert read_metrics(path) == [
        {"kind": "rollout", "iteration": 0, "tokens": 5},
        {"kind": "train_step", "iteration": 0, "step": 3, "head_loads": {"rot": 1}},
    ]


def test_the_last_line_of_a_step_stands_in_the_place_of_the_first(path: Path) -> None:
    append(path, ("train_step", 0, {"loss": 1.0}, 0), ("train_step", 0, {"loss": 2.0}, 1))
    append(path, ("train_step", 0, {"loss": 3.0}, 0), ("phase/train", 0, {"loss": 4.0}, None))
    assert [line["loss"] for line in read_metrics(path)] == [3.0, 2.0, 4.0]


def test_half_a_last_line_is_not_read_and_the_next_start_cuts_it_off(path: Path) -> None:
    append(path, ("train_step", 0, {"loss": 1.0}, 0), ("train_step", 0, {"loss": 2.0}, 1))
    path.write_bytes(
        path.read_bytes()[:-1]
    )  # even a line that lacks only its end may be half a number
    assert [line["loss"] for line in read_metrics(path)] == [1.0]
    append(path, ("train_step", 0, {"loss": 2.5}, 1))
    assert [json.loads(text)["loss"] for text in path.read_text().splitlines()] == [1.0, 2.5]


def test_a_damaged_line_is_refused_by_file_and_number(path: Path) -> None:
    append(path, ("train_step", 0, {"loss": 1.0}, 0))
    whole = path.read_bytes()
    for damage in (b"\0\0\0\n", b"[1]\n", b"{}\n", b'{"kind": "train_step"}\n', b"\xff\n"):
        path.write_bytes(whole + damage + whole)
        with pytest.raises(MtopdError, match=r"metrics\.jsonl, line 2"):
            read_metrics(path)


def test_no_file_is_no_lines_and_other_ranks_write_none(path: Path) -> None:
    writer = MetricsWriter(path, enabled=False)
    writer.write("train_step", 0, {"loss": 1.0}, step=0)
    writer.close()
    assert list(path.parent.iterdir()) == []
    assert read_metrics(path) == []


def test_not_a_number_is_never_written(path: Path) -> None:
    writer = MetricsWriter(path, enabled=True)
    with pytest.raises(ValueError, match="JSON"):
        writer.write("train_step", 0, {"loss": float("nan")}, step=0)
    writer.close()
    assert path.read_text() == ""


def test_numbers_go_to_tensorboard_under_their_kind(path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    append(path, ("train_step", 0, {"kl": {"rot": 0.5}, "sound": True}, 7))
    board = EventAccumulator(str(path.parent / "tensorboard")).Reload()
    assert board.Tags()["scalars"] == ["train_step/kl/rot"]
    assert [(event.step, event.value) for event in board.Scalars("train_step/kl/rot")] == [(7, 0.5)]
