"""The report of a specialist: its loss, its accuracy, what its train steps got through."""

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from mtopd import manifest
from mtopd.config_file import resolved, to_yaml, validate
from mtopd.config_specialist import SpecialistConfig
from mtopd.files import write_json
from mtopd.metrics import MetricsWriter
from mtopd.metrics_lines import EvaluationLine, MemoryLine, SupervisedStepLine
from mtopd.report import write_report
from mtopd.run_dir import RunDir
from tests.report.test_page import HOSTILE, Page


def started(run_dir: Path, num_steps: int, *sources: str) -> RunDir:
    values = {
        "run_dir": str(run_dir),
        "student": {"model": "hf"},
        "data": {
            "sources": [{"name": name, "path": f"{name}.jsonl"} for name in sources or ("rot",)],
            "context_length": 48,
            "max_response": 20,
        },
        "train": {
            "num_steps": num_steps,
            "global_batch_size": 4,
            "micro_batch_size": 4,
            "optimizer": {"lr": 1e-3},
        },
    }
    config = validate(values, SpecialistConfig, "test")
    run_dir.mkdir(parents=True)
    run = RunDir(run_dir)
    manifest.start_run(run, resolved(config), {}, to_yaml(config))
    (run_dir / "evaluations").mkdir()
    return run


def write_steps(metrics: MetricsWriter, count: int) -> None:
    """Train step n has loss 1 / (n + 1) over n + 1 tokens."""
    for step in range(count):
        line = SupervisedStepLine(
            loss=1 / (step + 1),
            grad_norm=1.0,
            lr=1e-3,
            tokens=step + 1,
            tokens_per_s=(step + 1) / 2,
            positions=4 * (step + 1),
            positions_per_s=2 * (step + 1),
            wall_s=2.0,
        )
        metrics.write(line, step, step=step)


def written(run: RunDir) -> tuple[dict, list[str], str]:
    console = Console(file=io.StringIO(), width=200)
    report = write_report(run.path, console)
    return report, console.file.getvalue().splitlines(), (run.path / "report.html").read_text()


def test_a_finished_specialist(tmp_path: Path) -> None:
    run = started(tmp_path / "run", 40, "rot", "rev")
    metrics = MetricsWriter(run.metrics, enabled=True)
    write_steps(metrics, 30)
    metrics.write(EvaluationLine({"rot": 0.5, "rev": 0.25}, {"rot": 1.0, "rev": 1.0}), 20)
    final = {"rot": 0.9375, "rev": 0.5}
    metrics.write(EvaluationLine(final, stopped={"rot": 1.0, "rev": 0.75}), 30)
    metrics.write(MemoryLine(5000), 30)
    metrics.close()
    write_json(run.path / "evaluations" / "final.json", final)
    (run.path / "export" / "final").mkdir(parents=True)
    run.seal(run.path / "export" / "final")

    report, lines, page = written(run)
    assert json.loads((run.path / "report.json").read_text()) == report
    assert report["finished"] and (report["train_steps"], report["planned_steps"]) == (30, 40)
    assert report["accuracy"] == final and report["stopped"] == {"rot": 1.0, "rev": 0.75}
    # Loss times tokens is 1 in every step: ten steps over their tokens.
    ends = {"first": 10 / sum(range(1, 11)), "last": 10 / sum(range(21, 31))}
    assert report["loss"] == pytest.approx(ends)
    tokens = sum(range(1, 31))
    assert (report["train_tokens"], report["positions"]) == (tokens, 4 * tokens)
    assert report["positions_per_s"] == pytest.approx(4 * tokens / 60)
    assert (report["wall_s"], report["peak_host_bytes"]) == ({"train": 60}, 5000)
    assert lines[-1] == (
        "trained, 30 of 40 train steps: accuracy rot 93.8%, rev 50.0%, loss 0.18 -> 0.039 (4.6x), "
        f"report {run.path}/report.html"
    )
    assert any("accuracy" in row and "93.8%" in row and "50.0%" in row for row in lines[:-1])
    assert "answers ended" in page and "75.0%" in page and page.count("<img ") == 3
    assert written(run)[2] == page  # the same run gives the same bytes


@pytest.mark.parametrize(("count", "loss"), [(0, "n/a"), (1, "1"), (2, "1 -> 0.5 (2.0x)")])
def test_an_unfinished_one_is_reported_as_far_as_it_came(
    tmp_path: Path, count: int, loss: str
) -> None:
    run = started(tmp_path / "run", 40)
    metrics = MetricsWriter(run.metrics, enabled=True)
    write_steps(metrics, count)
    metrics.close()
    report, lines, page = written(run)
    assert (report["accuracy"], report["peak_host_bytes"]) == ({}, None)
    assert lines == [
        f"unfinished, {count} of 40 train steps: accuracy not measured, loss {loss}, "
        f"report {run.path}/report.html"
    ]
    assert f"NOT finished: {count} of 40 train steps" in page and page.count("<img ") == 1


def test_hostile_strings_are_text_and_bad_numbers_null(tmp_path: Path) -> None:
    run = started(tmp_path / f"a{HOSTILE.replace('/', '')}", 4)
    metrics = MetricsWriter(run.metrics, enabled=True)
    write_steps(metrics, 2)
    metrics.write(EvaluationLine({f"{HOSTILE}$": 0.5}), 2)
    metrics.close()
    with open(run.metrics, "a") as file:
        file.write('{"kind": "train_step", "iteration": 3, "step": 3, "loss": NaN, "tokens": 2}\n')
    path = run.path / "evaluations" / "final.json"
    path.write_text(json.dumps({f"{HOSTILE}$": math.nan}))
    report, _, source = written(run)
    assert report["accuracy"] == {f"{HOSTILE}$": None} and report["loss"]["last"] is None
    page = Page(source)
    assert page.text.count(HOSTILE) >= 2 and "script" not in page.tags
