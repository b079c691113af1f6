"""metrics.jsonl: what is written is read, a resumed step replaces its line, a half-written last
line is no harm.
"""

import contextlib
import json
from pathlib import Path

import pytest

from mtopd.metrics import MetricsWriter, read_metrics
from mtopd.metrics_lines import EvaluationLine, Line, PhaseLine, RolloutLine, SupervisedStepLine
from mtopd.types import MtopdError

TABLE = b'{"kind": "teacher_pass", "iteration": 0, "teachers": [1]}\n'  # that is none


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def append(path: Path, *lines: tuple[Line, int, int | None]) -> None:
    writer = MetricsWriter(path, enabled=True)
    for line, iteration, step in lines:
        writer.write(line, iteration, step=step)
    writer.close()


def step_line(loss: float) -> SupervisedStepLine:
    return SupervisedStepLine(
        loss=loss,
        grad_norm=0.5,
        lr=0.1,
        tokens=5,
        tokens_per_s=5.0,
        positions=9,
        positions_per_s=9.0,
        wall_s=1.0,
    )


def losses(path: Path) -> list[float]:
    return [entry.line.loss for entry in read_metrics(path)]


def test_lines_are_read_as_they_were_written(path: Path) -> None:
    rollout = RolloutLine(tokens=5, samples=2, stopped=1, continued_tokens=0, log_bytes=0)
    append(path, (rollout, 0, None), (step_line(1.0), 0, 3))
    assert [json.loads(text) for text in path.read_text().splitlines()] == [
        {"kind": "rollout", "iteration": 0, "tokens": 5, "samples": 2, "stopped": 1}
        | {"continued_tokens": 0, "log_bytes": 0},
        {
            "kind": "train_step",
            "iteration": 0,
            "step": 3,
            **{"loss": 1.0, "grad_norm": 0.5, "lr": 0.1, "tokens": 5, "wall_s": 1.0},
            **{"tokens_per_s": 5.0, "positions": 9, "positions_per_s": 9.0},
        },
    ]
    first, second = read_metrics(path)
    assert first == (0, None, rollout)
    assert second[:2] == (0, 3) and second.line.loss == 1.0 and second.line.wall_s == 1.0


def test_lines_of_one_step_are_told_apart_by_their_part(path: Path) -> None:
    writer = MetricsWriter(path, enabled=True)
    for seconds, part in ((1.0, "start 1"), (2.0, "start 2"), (3.0, "start 1")):
        writer.write(PhaseLine("train", seconds), 0, part=part)
    writer.close()
    assert [entry.line for entry in read_metrics(path)] == [
        PhaseLine("train", 3.0),
        PhaseLine("train", 2.0),
    ]


def test_lines_of_an_unknown_kind_are_left_out(path: Path) -> None:
    append(path, (step_line(1.0), 0, 0))
    path.write_text('{"kind": "newer", "iteration": 0}\n' + path.read_text())
    assert losses(path) == [1.0]


def test_the_last_line_of_a_step_stands_in_the_place_of_the_first(path: Path) -> None:
    append(path, (step_line(1.0), 0, 0), (step_line(2.0), 0, 1))
    append(path, (step_line(3.0), 0, 0), (step_line(4.0), 1, 0))
    assert losses(path) == [3.0, 2.0, 4.0]


def test_half_a_last_line_is_not_read_and_the_next_start_cuts_it_off(path: Path) -> None:
    append(path, (step_line(1.0), 0, 0), (step_line(2.0), 0, 1))
    # Even a line that lacks only its end may be half a number.
    path.write_bytes(path.read_bytes()[:-1])
    assert losses(path) == [1.0]
    append(path, (step_line(2.5), 0, 1))
    assert [json.loads(text)["loss"] for text in path.read_text().splitlines()] == [1.0, 2.5]


def test_a_damaged_line_is_refused_by_file_and_number(path: Path) -> None:
    append(path, (step_line(1.0), 0, 0))
    whole = path.read_bytes()
    for damage in (b"\0\0\0\n", b"[1]\n", b"{}\n", b'{"kind": "train_step"}\n', b"\xff\n", TABLE):
        path.write_bytes(whole + damage + whole)
        with pytest.raises(MtopdError, match=r"metrics\.jsonl, line 2"):
            read_metrics(path)


def test_no_file_is_no_lines_and_other_ranks_write_none(path: Path) -> None:
    writer = MetricsWriter(path, enabled=False)
    writer.write(step_line(1.0), 0, step=0)
    writer.close()
    assert list(path.parent.iterdir()) == []
    assert read_metrics(path) == []


def test_not_a_number_is_never_written(path: Path) -> None:
    writer = MetricsWriter(path, enabled=True)
    with pytest.raises(ValueError, match="JSON"):
        writer.write(step_line(float("nan")), 0, step=0)
    writer.close()
    assert path.read_text() == ""


def test_numbers_go_to_tensorboard_under_their_kind(path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    append(path, (EvaluationLine({"rot": 0.5}), 3, None), (step_line(2.0), 0, 7))
    board = EventAccumulator(str(path.parent / "tensorboard")).Reload()
    names = (
        "loss",
        "grad_norm",
        "lr",
        "tokens",
        "tokens_per_s",
        "positions",
        "positions_per_s",
        "wall_s",
    )
    assert board.Tags()["scalars"] == [
        "evaluation/accuracy/rot",
        *(f"train_step/{name}" for name in names),
    ]
    for tag, expected in (("evaluation/accuracy/rot", (3, 0.5)), ("train_step/loss", (7, 2.0))):
        assert [(event.step, event.value) for event in board.Scalars(tag)] == [expected]


def test_a_full_disk_names_the_file(path: Path) -> None:
    writer = MetricsWriter(path, enabled=True)
    assert writer._file is not None
    writer._file = open("/dev/full", "a", buffering=1)  # noqa: SIM115
    with pytest.raises(OSError, match="No space left") as caught:
        writer.write(PhaseLine("train", 1.0), 0)
    assert caught.value.filename == str(path)
    with contextlib.suppress(OSError):  # what could not be written is tried once more
        writer._file.close()
