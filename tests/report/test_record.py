"""Runs that were killed, are not finished or hold damaged numbers are read as far as they came."""

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from mtopd.files import read_json, write_json
from mtopd.metrics import MetricsWriter
from mtopd.report import write_report
from mtopd.run_dir import RunDir
from mtopd.types import MtopdError
from tests.report.runs import (
    BASELINES,
    ROLLOUT,
    config_of,
    report_of,
    start_run,
    step_line,
    write_iteration,
    written,
)


def test_a_resumed_run_counts_every_step_once(run: RunDir) -> None:
    before = report_of(run)
    metrics = MetricsWriter(run.metrics, enabled=True)
    for iteration in range(10, 15):
        write_iteration(metrics, iteration, reverse_kl=2.0)
    metrics.close()
    after = report_of(run)
    # The last line of a step is the one that counts.
    assert after["reverse_kl"]["last"] == pytest.approx(2.0)
    assert after["reverse_kl"]["first"] == before["reverse_kl"]["first"]
    assert {**after, "reverse_kl": None} == {**before, "reverse_kl": None}


def test_steps_are_taken_in_order_of_their_number(run: RunDir) -> None:
    lines = run.metrics.read_text().splitlines(keepends=True)
    before = report_of(run)["reverse_kl"]
    run.metrics.write_text("".join(reversed(lines)))
    assert report_of(run)["reverse_kl"] == pytest.approx(before)


def test_half_a_last_line_is_left_out(run: RunDir) -> None:
    before = report_of(run)
    with open(run.metrics, "a") as file:
        file.write('{"kind": "train_step", "iteration": 15, "step": 30, "tok')
    assert report_of(run) == before


MISMATCH = ("log_prob_difference", "log_prob_difference_p99", "token_mult_prob_error")


def test_what_an_older_run_did_not_measure_counts_as_nothing(run: RunDir) -> None:
    lines = [json.loads(text) for text in run.metrics.read_text().splitlines()]
    for line in lines:
        for key in ("head_bytes_read", "peak_head_bytes", "stall_s", *MISMATCH):
            line.pop(key, None)
        for values in line.get("teachers", {}).values():
            for key in ("bytes_kept", "probe", "peak_host_bytes"):
                values.pop(key)
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report, _, page = written(run)
    assert set(report["log_prob_mismatch"].values()) == {None}
    assert "Log-probs of trainer and rollout" not in page
    assert (report["peak_head_bytes"], report["stall_s"]["train"]) == (0, 0)
    teacher = report["teachers"][0]
    assert (teacher["bytes_kept"], teacher["probe"], teacher["head_bytes_read"]) == (0, None, 0)
    assert teacher["peak_host_bytes"] == 0 and teacher["bytes_read"] == 15 * 1000
    assert all(check["ok"] for check in report["checks"].values())


def test_an_unfinished_run_is_reported_as_far_as_it_came(tmp_path: Path) -> None:
    run = start_run(tmp_path / "run", config_of(tmp_path / "run", 8))
    metrics = MetricsWriter(run.metrics, enabled=True)
    for iteration in range(3):
        write_iteration(metrics, iteration)
    metrics.write(ROLLOUT, 3)
    metrics.close()
    report, lines, page = written(run)
    assert (report["finished"], report["iterations"]) == (False, {"done": 3, "planned": 8})
    assert (report["train_steps"], report["rollout_tokens"], report["peak_host_bytes"]) == (
        6,
        400,
        None,
    )
    assert (
        lines[-1].startswith("unfinished, 3 of 8 iterations: ")
        and "NOT finished: 3 of 8 iterations" in page
    )


def test_a_run_that_began_with_anothers_checkpoint_says_so(run: RunDir) -> None:
    """Its student was trained before its first iteration."""
    report, lines, page = written(run)
    assert report["began_with"] is None
    assert not any("began with" in text for text in (*lines, page))
    origin = {"run": "/runs/first", "iteration": 40, "seal": "c3" * 32}
    write_json(run.manifest, {**read_json(run.manifest), "from": origin})
    report, lines, page = written(run)
    assert report["began_with"] == "/runs/first@40"
    assert "began with /runs/first@40" in lines
    assert "iterations. It began with /runs/first@40." in page


def test_a_run_that_did_nothing_yet(tmp_path: Path) -> None:
    run = start_run(tmp_path / "run", config_of(tmp_path / "run", 8))
    report, _, page = written(run)
    assert report["reverse_kl"] == {"first": None, "last": None}
    assert (
        report["wall_s"],
        report["train_steps"],
        report["waves"],
        report["peak_device_bytes"],
    ) == ({}, 0, 0, 0)
    assert report["teachers"][0]["stored_bytes"] is None
    assert page.count("<img ") == 6


def test_a_number_that_is_not_finite_becomes_null(run: RunDir) -> None:
    with open(run.metrics, "a") as file:
        file.write(
            json.dumps(
                {
                    "kind": "train_step",
                    "iteration": 15,
                    "step": 30,
                    **step_line(30, reverse_kl=math.nan).values(),
                }
            )
        )
        file.write('\n{"kind": "phase/train", "iteration": 15, "wall_s": Infinity}\n')
    run.evaluation(15).write_text('{"rot": NaN, "rev": 0.86, "spir": 0.63}')
    baselines = json.dumps(BASELINES).replace("0.1,", "Infinity,")
    (run.path / "evaluations" / "baselines.json").write_text(baselines)
    report, lines, _ = written(run)
    assert report["reverse_kl"]["last"] is report["domains"]["rot"]["student"] is None
    assert report["baselines"]["weight_average"]["rot"] is None
    assert report["wall_s"]["train"] == 60
    assert "-> n/a, report" in lines[-1]

    def refuse(constant: str) -> None:
        raise AssertionError(f"report.json holds {constant}")

    json.loads((run.path / "report.json").read_text(), parse_constant=refuse)


def test_what_is_no_run_is_refused(run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(MtopdError, match=r"not a run directory \(no config.yaml\)"):
        write_report(tmp_path / "nowhere", Console(file=io.StringIO()))
    write_json(run.manifest, {"schema": 1})
    with pytest.raises(MtopdError, match="run without teachers"):
        write_report(run.path, Console(file=io.StringIO()))
    run.manifest.unlink()
    with pytest.raises(MtopdError, match=r"not a run directory \(no manifest.json\)"):
        write_report(run.path, Console(file=io.StringIO()))
