"""The report's numbers follow from the run directory."""

import json
from dataclasses import replace

import pytest

from mtopd.metrics import MetricsWriter
from mtopd.metrics_lines import (
    BadStepLine,
    EvaluationLine,
    SequenceFilterLine,
    StalenessLine,
    TeacherPassLine,
    WeightUpdateLine,
    from_values,
)
from mtopd.report import build_report, page, read_run
from mtopd.report.numbers import first_and_last, recovery
from mtopd.report.tables import check_rows, result_rows
from mtopd.run_dir import RunDir
from tests.report.runs import (
    BASELINES,
    ROLLOUT,
    TEACHERS,
    config_of,
    pass_metrics,
    report_of,
    step_line,
    written,
)


def test_totals(run: RunDir) -> None:
    report = report_of(run)
    assert report["schema"] == 1
    assert report["wall_s"] == {
        "baselines": 7,
        "rollout": 30,
        "teacher_pass": 45,
        "train": 60,
        "update_weights": 7.5,
    }
    assert report["stall_s"] == {"teacher_pass": 15 * 3 * 0.5, "train": 30 * 0.25}
    assert (report["train_steps"], report["rollout_tokens"], report["waves"]) == (30, 1500, 1)
    assert (report["continued_tokens"], report["token_log_bytes"]) == (0, 15 * 2000)
    tiles = dict(page._tiles({**report, "continued_tokens": 7}))
    assert tiles["rollout tokens, of them continued after a kill"] == "1,500 / 7"
    assert tiles["token logs of rollouts"] == "29.3 KiB"
    assert (report["finished"], report["iterations"]) == (True, {"done": 15, "planned": 15})
    assert (
        report["peak_resident_heads"],
        report["peak_device_bytes"],
        report["peak_host_bytes"],
    ) == (1, 600, 5000)


def test_teachers(run: RunDir) -> None:
    teachers = report_of(run)["teachers"]
    assert [t["name"] for t in teachers] == list(TEACHERS)
    wanted = {
        "fingerprint": "1" * 64,
        "head_loads": 30,
        "bytes_read": 15 * 1100,
        "stored_bytes": 1100,
        "passes": 15,
    }
    wanted |= {"bytes_kept": 0, "probe": "transformers"}
    assert (
        teachers[1].items()
        >= {**wanted, "head_bytes_read": 30 * 64, "route": {"domain": "rev"}}.items()
    )


def test_visits_of_a_teacher_beside_the_rollout_add_up(run: RunDir) -> None:
    metrics = MetricsWriter(run.metrics, enabled=True)
    for number in range(2):
        visit = pass_metrics("rev", samples=2, hidden_s=0.75)
        part = f"rev, start 1, quarters [{number}]"
        metrics.write(TeacherPassLine({"rev": visit}), 14, part=part)
    metrics.close()
    before, report = 15 * 3 * 0.5, report_of(run)
    teacher = report["teachers"][1]
    assert (teacher["passes"], teacher["bytes_read"]) == (17, 17 * 1100)
    assert report["stall_s"]["teacher_pass"] == before + 2 * 0.5
    assert report["hidden_s"] == {"teacher_pass": 1.5}
    assert report["checks"]["bytes_streamed"]["ok"]


def test_reverse_kl_is_the_token_mean_of_ten_steps(run: RunDir) -> None:
    # KL times tokens is 1 in every step: ten steps over their tokens
    kl = report_of(run)["reverse_kl"]
    assert kl == pytest.approx({"first": 10 / sum(range(1, 11)), "last": 10 / sum(range(21, 31))})


@pytest.mark.parametrize(
    ("num_steps", "at_either_end"), [(0, 0), (1, 1), (2, 1), (3, 1), (19, 9), (20, 10), (21, 10)]
)
def test_first_and_last_kl_never_share_a_train_step(num_steps: int, at_either_end: int) -> None:
    # KL times tokens is 1 in every step, and step n has n tokens.
    found = first_and_last([step_line(step) for step in range(num_steps)], lambda s: s.reverse_kl)
    tokens = [*range(1, num_steps + 1)]

    def mean(part: list[int]) -> float | None:
        return len(part) / sum(part) if part else None

    last = tokens[num_steps - at_either_end :] if num_steps > 1 else []
    assert found == pytest.approx({"first": mean(tokens[:at_either_end]), "last": mean(last)})


def test_positions_stand_beside_answer_tokens(run: RunDir) -> None:
    report = report_of(run)
    tokens = sum(range(1, 31))
    assert (report["train_tokens"], report["positions"]) == (tokens, 3 * tokens)
    assert report["tokens_per_s"] == pytest.approx(tokens / 60)
    assert report["positions_per_s"] == pytest.approx(3 * tokens / 60)


def test_a_run_of_before_positions_were_counted_has_none(run: RunDir) -> None:
    lines = [json.loads(text) for text in run.metrics.read_text().splitlines()]
    for line in lines:
        line.pop("positions", None)
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = report_of(run)
    assert report["positions_per_s"] is None and report["tokens_per_s"] == pytest.approx(465 / 60)


def test_updates_of_servers_are_summed_by_step(run: RunDir) -> None:
    assert report_of(run)["weight_updates"] is None
    metrics = MetricsWriter(run.metrics, enabled=True)
    for iteration, (out, difference) in enumerate([(0, 1e-6), (1, 4e-6), (0, 2e-6)]):
        line = WeightUpdateLine(
            seconds={"begin": 0.5, "buckets": 2.0, "probe": 1.0 + iteration},
            bytes_sent=1 << 20,
            servers=2 - out,
            servers_out=out,
            probe_difference=difference,
        )
        metrics.write(line, iteration)
    metrics.close()
    assert report_of(run)["weight_updates"] == {
        "updates": 3,
        "seconds": {"begin": 1.5, "buckets": 6.0, "probe": 6.0},
        "bytes": 3 << 20,
        "updates_without_a_server": 1,
        "probe_difference": 4e-6,
    }
    tiles = dict(page._tiles(report_of(run)))
    assert tiles["their steps, s"] == "begin 1.5, buckets 6.0, probe 6.0"


def test_responses_that_iterations_left_open_are_summed_where_they_may_be(run: RunDir) -> None:
    assert report_of(run)["carried_over"] is None
    metrics = MetricsWriter(run.metrics, enabled=True)
    for number, (samples, tokens) in enumerate([(4, 900), (4, 1100), (0, 0)]):
        line = replace(ROLLOUT, open_samples=samples, open_tokens=tokens)
        metrics.write(line, number)
    metrics.close()
    assert report_of(run)["carried_over"] == {"samples": 8, "tokens": 2000}
    tiles = dict(page._tiles(report_of(run)))
    assert tiles["responses open when an iteration ended / their tokens by then"] == "8 / 2,000"


def test_what_environments_did_is_summed_where_there_are_any(run: RunDir) -> None:
    assert report_of(run)["environment"] is None
    metrics = MetricsWriter(run.metrics, enabled=True)
    for number, calls in enumerate((3, 4)):
        line = replace(
            ROLLOUT,
            environment_tokens=50,
            environment_errors=number,
            environment_calls=calls,
            environment_s=0.5,
        )
        metrics.write(line, number)
    metrics.close()
    wanted = {"tokens": 100, "calls": 7, "calls_s": 1.0, "failed_samples": 1}
    assert report_of(run)["environment"] == wanted
    tiles = dict(page._tiles(report_of(run)))
    assert tiles["environment calls / responses that they failed"] == "7 / 1"


def test_mismatch_of_the_first_steps_stands_beside_that_of_all(run: RunDir) -> None:
    wanted = {"first_steps_p99": 15e-6, "p99": 30e-6, "token_mult_prob_error": 1.03}
    assert report_of(run)["log_prob_mismatch"] == pytest.approx(wanted)


def test_filtered_samples_are_added_up(run: RunDir) -> None:
    report, _, html = written(run)
    assert report["samples_filtered"] is None and "left out by train.sequence_filter" not in html
    metrics = MetricsWriter(run.metrics, enabled=True)
    for iteration, count in enumerate((3, 0, 4)):
        line = SequenceFilterLine(
            samples=9, samples_filtered=count, tokens_filtered=count, wall_s=0.5
        )
        metrics.write(line, iteration)
    metrics.close()
    report, _, html = written(run)
    assert report["samples_filtered"] == 7
    assert "<b>7</b><span>samples left out by train.sequence_filter" in html


def test_ages_of_weights_are_added_up_where_there_are_any(run: RunDir) -> None:
    report, _, html = written(run)
    assert report["staleness"] is None and "age of the weights" not in html
    metrics = MetricsWriter(run.metrics, enabled=True)
    for number, tokens in enumerate(({"0": 6, "1": 2}, {"0": 1, "1": 1, "2": 6})):
        masked = tokens.get("2", 0)
        line = StalenessLine(tokens=tokens, mean=0.5, oldest=len(tokens) - 1, tokens_masked=masked)
        metrics.write(line, number)
    metrics.close()
    report, _, html = written(run)
    wanted = {"tokens": {"0": 7, "1": 3, "2": 6}, "mean": 15 / 16, "oldest": 2, "tokens_masked": 6}
    assert report["staleness"] == wanted
    assert "<b>0.94 / 2; 6</b><span>age of the weights" in html


def test_recovery(run: RunDir) -> None:
    report = report_of(run)
    assert report["domains"]["rev"] == pytest.approx(
        {"base": 0.5, "teacher": 0.9, "student": 0.84, "recovery": 0.85}
    )
    assert report["domains"]["spir"]["recovery"] is None  # the teacher is only 0.04 above the base
    assert report["worst_recovery"] == pytest.approx(0.85)
    assert report["mean_recovery"] == pytest.approx(0.9)
    assert report["weight_average_worst_recovery"] == pytest.approx(-0.5)
    assert report["baselines"]["weight_average"] == BASELINES["weight_average"]
    assert report["baselines"]["specialists"].keys() == set(TEACHERS)


@pytest.mark.parametrize(
    ("base", "teacher", "student", "expected"),
    [
        (0.0, 0.5, 0.25, 0.5),
        (0.5, 0.75, 0.25, -1.0),
        (0.5, 0.5, 0.5, None),
        (None, 1.0, 1.0, None),
        (0.0, 1.0, None, None),
    ],
)
def test_recovery_of_numbers(base: float, teacher: float, student: float, expected: float) -> None:
    assert recovery(base, teacher, student) == expected


def test_the_teacher_of_a_domain_is_the_one_its_prompts_are_routed_to(run: RunDir) -> None:
    sources = [
        {"name": "rot", "path": "a.jsonl", "fields": {"domain": "rev"}},
        {"name": "rev", "path": "b.jsonl", "fields": {"domain": "nobody's"}},
    ]
    data = {"context_length": 48, "max_response": 20, "sources": sources}
    domains = build_report(read_run(run.path, config_of(run.path, 15, data=data)))["domains"]
    assert domains["rot"]["teacher"] == BASELINES["models"]["rev"]["rot"]
    assert domains["rev"]["teacher"] is None


def test_without_baselines_recovery_is_null(run: RunDir) -> None:
    (run.path / "evaluations" / "baselines.json").unlink()
    report = report_of(run)
    assert report["domains"]["rot"] == {
        "base": None,
        "teacher": None,
        "student": 0.97,
        "recovery": None,
    }
    assert (
        report["worst_recovery"]
        is report["mean_recovery"]
        is report["weight_average_worst_recovery"]
        is None
    )
    assert report["baselines"] == {"weight_average": {}, "specialists": {}}


def test_the_share_of_answers_that_ended_is_the_newest(run: RunDir) -> None:
    assert report_of(run)["student_stopped"] == {}, "an older run did not note it"
    metrics = MetricsWriter(run.metrics, enabled=True)
    for iteration, share in ((15, 0.75), (0, 0.25)):
        line = EvaluationLine({"rot": 0.5}, stopped={"rot": share})
        metrics.write(line, iteration)
    metrics.close()
    report = report_of(run)
    assert report["student_stopped"] == {"rot": 0.75}
    assert result_rows(report)[-1] == ["student's answers ended", "75.0%", "n/a", "n/a", ""]


def test_checks_hold(run: RunDir) -> None:
    checks = report_of(run)["checks"]
    assert checks["head_loads"] == {"found": 90, "expected": 90, "ok": True}
    assert checks["bytes_streamed"] == {"found": 15 * 3300, "expected": 15 * 3300, "ok": True}
    assert checks["peak_resident_heads"] == {"found": 1, "at_most": 1, "ok": True}


@pytest.mark.parametrize(
    ("check", "changes"),
    [
        ("head_loads", {"head_loads": {"rot": 2, "rev": 1, "spir": 1}}),
        ("head_loads", {"teachers_in_step": 2}),
        ("peak_resident_heads", {"peak_resident_heads": 2}),
    ],
)
def test_a_broken_promise_of_training_shows(run: RunDir, check: str, changes: dict) -> None:
    metrics = MetricsWriter(run.metrics, enabled=True)
    metrics.write(step_line(8, **changes), 4, step=8)
    metrics.close()
    report = report_of(run)
    assert [name for name, found in report["checks"].items() if not found["ok"]] == [check]
    assert [row[0] for row in check_rows(report) if row[-1] != "ok"] == [check.replace("_", " ")]


def test_a_train_step_that_was_left_out_and_never_taken_shows(run: RunDir) -> None:
    metrics = MetricsWriter(run.metrics, enabled=True)
    for iteration, step in ((4, 8), (14, 30)):  # the first is taken by another start
        metrics.write(
            from_values(BadStepLine, {"refused": "the loss is nan"}), iteration, step=step
        )
    metrics.close()
    report = report_of(run)
    assert report["checks"]["train_steps_left_out"] == {"found": 1, "at_most": 0, "ok": False}
    assert check_rows(report)[-1] == ["train steps left out", "1", "at most 0", "WRONG"]


@pytest.mark.parametrize(
    ("changes", "ok"),
    [
        ({"bytes_read": 1001}, False),
        ({"bytes_read": 2000, "waves": 2}, True),
        ({"bytes_read": 400, "bytes_kept": 600}, True),
        ({"bytes_read": 400, "bytes_kept": 500}, False),
    ],
)
def test_every_byte_is_read_once_a_wave(run: RunDir, changes: dict, ok: bool) -> None:
    metrics = MetricsWriter(run.metrics, enabled=True)
    metrics.write(TeacherPassLine({"rot": pass_metrics("rot", **changes)}), 3)
    metrics.close()
    report = report_of(run)
    assert report["checks"]["bytes_streamed"]["ok"] is ok
    assert report["waves"] == changes.get("waves", 1)
    assert [t["passes"] for t in report["teachers"]] == [15, 14, 14]
