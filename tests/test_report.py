"""The report's numbers follow from the run directory, whatever killed the run; its page holds data,
never code.
"""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from mtopd import manifest
from mtopd.config import ConsolidateConfig, resolved, to_yaml, validate
from mtopd.files import write_json
from mtopd.metrics import MetricsWriter
from mtopd.metrics_lines import (
    BadStepLine,
    MemoryLine,
    PassMetrics,
    PhaseLine,
    RolloutLine,
    TeacherPassLine,
    TrainStepLine,
    from_values,
)
from mtopd.pipelines import report as pipeline
from mtopd.report import build_report, check_rows, in_bytes, read_run, recovery, result_rows
from mtopd.run_dir import RunDir
from mtopd.types import MtopdError

HOSTILE = "<script>alert(1)</script>"
TEACHERS = ("rot", "rev", "spir")
ROLLOUT = RolloutLine(tokens=100, samples=192, stopped=180)
STORED = {"rot": 1000, "rev": 1100, "spir": 1200}
BASELINES = {
    "models": {
        "base": {"rot": 0.4, "rev": 0.5, "spir": 0.6},
        "rot": {"rot": 1.0, "rev": 0.0, "spir": 0.0},
        "rev": {"rot": 0.0, "rev": 0.9, "spir": 0.0},
        "spir": {"rot": 0.0, "rev": 0.1, "spir": 0.64},
    },
    "weight_average": {"rot": 0.1, "rev": 0.7, "spir": 0.2},
}


def config_of(run_dir: Path, num_iterations: int, **changes) -> ConsolidateConfig:
    values = {
        "run_dir": str(run_dir),
        "student": {"model": "base"},
        "teachers": [
            {"name": name, "store": f"teachers/{name}", "route": {"domain": name}}
            for name in TEACHERS
        ],
        "data": {
            "context_length": 48,
            "max_response": 20,
            "sources": [{"name": name, "path": f"{name}.jsonl"} for name in TEACHERS],
        },
        "rollout": {"prompts_per_iteration": 192},
        "train": {
            "num_iterations": num_iterations,
            "train_steps_per_iteration": 2,
            "micro_batch_size": 48,
            "optimizer": {"lr": 2e-3},
        },
    }
    return validate({**values, **changes}, ConsolidateConfig, "test")


def step_line(step: int, names: tuple[str, ...] = TEACHERS, **changes) -> TrainStepLine:
    """A train step whose reverse KL is 1 / (step + 1) over step + 1 tokens."""
    values = {
        "loss": 1.0,
        "reverse_kl": 1 / (step + 1),
        "reverse_kl_by_teacher": {name: (i + 1) / (step + 1) for i, name in enumerate(names)},
        "tokens": step + 1,
        "teachers_in_step": len(names),
        "head_loads": dict.fromkeys(names, 1),
        "head_bytes_read": dict.fromkeys(names, 64),
        "peak_resident_heads": 1,
        "peak_head_bytes": 64,
        "stall_s": 0.25,
        "wall_s": 1.0,
    }
    return from_values(TrainStepLine, {**values, **changes})


def pass_metrics(name: str, **changes) -> PassMetrics:
    stored = STORED.get(name, 1000)
    values = {
        "bytes_read": stored,
        "bytes_kept": 0,
        "stored_bytes": stored,
        "probe": "transformers",
        "tokens": 10,
        "samples": 5,
        "waves": 1,
        "stall_s": 0.5,
        "peak_device_bytes": stored // 2,
        "peak_host_bytes": stored // 4,
        "relayouts": 0,
    }
    return PassMetrics(**{**values, **changes})


def write_iteration(
    metrics: MetricsWriter, iteration: int, names: tuple[str, ...] = TEACHERS, **changes
) -> None:
    metrics.write(ROLLOUT, iteration)
    metrics.write(PhaseLine("rollout", 2.0), iteration)
    metrics.write(TeacherPassLine({name: pass_metrics(name) for name in names}), iteration)
    metrics.write(PhaseLine("teacher_pass", 3.0), iteration)
    for step in (2 * iteration, 2 * iteration + 1):
        metrics.write(step_line(step, names, **changes), iteration, step=step)
    metrics.write(PhaseLine("train", 4.0), iteration)
    metrics.write(PhaseLine("update_weights", 0.5), iteration)


def start_run(
    run_dir: Path, config: ConsolidateConfig, names: tuple[str, ...] = TEACHERS
) -> RunDir:
    run_dir.mkdir(parents=True, exist_ok=True)
    run = RunDir(run_dir)
    table = [
        {"index": i, "name": n, "fingerprint": f"{i}" * 64, "weight": 1 / len(names)}
        for i, n in enumerate(names)
    ]
    manifest.start_run(run, resolved(config), {"teachers": table}, to_yaml(config))
    (run_dir / "evaluations").mkdir(exist_ok=True)
    return run


def finish(run: RunDir, num_iterations: int) -> None:
    run.export(num_iterations).mkdir(parents=True)
    run.seal(run.export(num_iterations))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A finished run of 15 iterations, that is 30 train steps."""
    run = start_run(tmp_path / "run", config_of(tmp_path / "run", 15))
    metrics = MetricsWriter(run.metrics, enabled=True)
    metrics.write(PhaseLine("baselines", 7.0), 0)
    for iteration in range(15):
        write_iteration(metrics, iteration)
    metrics.write(MemoryLine(5000), 15)
    metrics.close()
    write_json(run.path / "evaluations" / "baselines.json", BASELINES)
    write_json(run.evaluation(0), {"rot": 0.4, "rev": 0.5, "spir": 0.6})
    write_json(run.evaluation(15), {"rot": 0.97, "rev": 0.84, "spir": 0.63})
    finish(run, 15)
    return run


def report_of(run: RunDir, num_iterations: int = 15) -> dict:
    return build_report(read_run(run.path, config_of(run.path, num_iterations)))


def written(run: RunDir, width: int = 200) -> tuple[dict, list[str], str]:
    """What ``write`` returns, the lines it prints, the page."""
    console = Console(file=io.StringIO(), width=width)
    report = pipeline.write(run.path, console)
    return report, console.file.getvalue().splitlines(), (run.path / "report.html").read_text()


# -- numbers
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


def test_reverse_kl_is_the_token_mean_of_ten_steps(run: RunDir) -> None:
    # KL times tokens is 1 in every step: ten steps over their tokens
    kl = report_of(run)["reverse_kl"]
    assert kl == pytest.approx({"first": 10 / sum(range(1, 11)), "last": 10 / sum(range(21, 31))})


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


def test_result_rows(run: RunDir) -> None:
    rows = {row[0]: row[1:] for row in result_rows(report_of(run))}
    assert list(rows) == ["base", *TEACHERS, "weight average", "student", "recovery"]
    assert rows["student"] == ["97.0%", "84.0%", "63.0%", "0.85"]
    assert rows["recovery"] == ["0.95", "0.85", "n/a", "0.85"]
    assert rows["weight average"][-1] == "-0.50"


def test_bytes_have_units() -> None:
    assert [in_bytes(n) for n in (0, 1023, 1024, 7 << 19, None)] == [
        "0 B",
        "1023 B",
        "1 KiB",
        "3.5 MiB",
        "n/a",
    ]


# -- checks
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


# -- runs that were killed
def test_a_resumed_run_counts_every_step_once(run: RunDir) -> None:
    before = report_of(run)
    metrics = MetricsWriter(run.metrics, enabled=True)
    for iteration in range(10, 15):
        write_iteration(metrics, iteration, reverse_kl=2.0)
    metrics.close()
    after = report_of(run)
    assert after["reverse_kl"]["last"] == pytest.approx(
        2.0
    )  # the last line of a step is the one that counts
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


# -- files and console
def test_write_leaves_both_files_and_ends_with_the_verdict(run: RunDir) -> None:
    report, lines, page = written(run, width=40)
    assert json.loads((run.path / "report.json").read_text()) == report
    assert {path.name for path in run.path.glob("*report*")} == {"report.json", "report.html"}
    assert lines[-1] == (
        "consolidated: worst recovery 0.85, mean 0.90, reverse KL 0.18 -> 0.039 (5x), report "
        f"{run.path}/report.html"
    )
    assert "head loads: 90, wanted 90: ok" in lines
    assert written(run)[2] == page  # the same run gives the same bytes


def test_what_is_no_consolidation_is_refused(run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(MtopdError, match=r"not a run directory \(no config.yaml\)"):
        pipeline.write(tmp_path / "nowhere", Console(file=io.StringIO()))
    write_json(run.manifest, {"schema": 1})
    with pytest.raises(MtopdError, match="run without teachers"):
        pipeline.write(run.path, Console(file=io.StringIO()))
    run.manifest.unlink()
    with pytest.raises(MtopdError, match=r"not a run directory \(no manifest.json\)"):
        pipeline.write(run.path, Console(file=io.StringIO()))


# -- page
class Page(HTMLParser):
    """What a browser would see: tags, attributes, text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def hostile_run(tmp_path: Path) -> RunDir:
    """Every string that comes from outside holds markup: of HTML, of rich, of matplotlib's
    mathtext.
    """
    name = f'{HOSTILE}"&[bold]$\\frac{{$'
    config = config_of(
        tmp_path / f"a{HOSTILE.replace('/', '')}",
        1,
        student={"model": HOSTILE, "megatron": {HOSTILE: HOSTILE}},
    )
    run = start_run(config.run_dir, config, (name, *TEACHERS))
    metrics = MetricsWriter(run.metrics, enabled=True)
    write_iteration(metrics, 0, (name, *TEACHERS))
    metrics.write(PhaseLine(name, 1.0), 0)
    metrics.write(PhaseLine("$\\frac{$", 1.0), 0)  # short enough to reach a plot whole
    metrics.close()
    write_json(
        run.path / "evaluations" / "baselines.json",
        {"models": {name: {"rot": 0.5}}, "weight_average": None},
    )
    return run


def test_hostile_strings_are_text_and_the_page_loads_nothing(tmp_path: Path) -> None:
    run = hostile_run(tmp_path)
    report, lines, source = written(run)
    page = Page(source)
    assert report["teachers"][0]["name"].startswith(HOSTILE) and "[bold]" in "".join(lines)
    assert page.text.count(HOSTILE) >= 5  # keys, tables, config: shown as they are
    assert set(page.tags).isdisjoint(
        {"script", "link", "iframe", "object", "embed", "base", "form", "svg"}
    )
    assert not any(name.startswith("on") for name, _ in page.attributes)

    assert (
        "content",
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'",
    ) in page.attributes
    sources = [
        value
        for name, value in page.attributes
        if name in ("src", "href", "srcset", "action", "data")
    ]
    assert len(sources) == 6 and all(
        value.startswith("data:image/svg+xml;base64,") for value in sources
    )
    assert not re.search(r"https?:|url\(|@import", re.sub(r"base64,[^\"]*", "", source))
    for value in sources:
        svg = base64.b64decode(value.partition(",")[2]).decode()
        assert "<script" not in svg and not re.search(r'(href|src)="(?!#)', svg)
