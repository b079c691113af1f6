"""A recovery is told for every domain whose numbers exist, and a reason for every other."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from mtopd.files import write_json
from mtopd.prompt_table import Prompts, PromptTable, _batch
from mtopd.report.tables import result_rows
from mtopd.run_dir import RunDir
from mtopd.types import Prompt
from tests.report.runs import config_of, finish, start_run, written

BASE, TEACHERS = {"base": "b"}, {"math": "m", "code": "c"}


def prompt(source: str, number: int, teacher: int) -> Prompt:
    return Prompt(f"{source}/{number}", {}, (1,), teacher, {})


def make_run(
    folder: Path, routed: dict[str, list[int]], baselines: dict[str, str] | None = None
) -> RunDir:
    """A finished run whose held-out prompts go to teachers 0 math, 1 code as ``routed`` says."""
    config = config_of(
        folder,
        1,
        teachers=[{"name": n, "store": n, "route": {"domain": n}} for n in TEACHERS],
        data={
            "context_length": 48,
            "max_response": 20,
            "sources": [{"name": n, "path": "p.jsonl"} for n in routed],
        },
        evaluation={"baselines": BASE | TEACHERS if baselines is None else baselines},
    )
    run = start_run(folder, config, tuple(TEACHERS))
    batches = [
        _batch(number, [prompt(name, i, t) for i, t in enumerate(teachers)], None, True)
        for number, (name, teachers) in enumerate(routed.items())
    ]
    with pa.OSFile(str(run.prompts), "wb") as file, pa.ipc.new_file(file, batches[0].schema) as out:
        for batch in batches:
            out.write_batch(batch)
    finish(run, 1)
    return run


def evaluate(run: RunDir, student: dict, **models: dict) -> None:
    write_json(run.evaluation(1), student)
    if models:
        write_json(
            run.path / "evaluations" / "baselines.json", {"models": models, "weight_average": None}
        )


@pytest.mark.parametrize(
    ("routed", "in_code"),
    [
        # a source is not called as its teacher is
        ({"arithmetic": [0, 0], "code": [1]}, "code"),
        # a source of several teachers has a domain for each
        ({"mine": [0, 1, 0]}, "mine/code"),
    ],
)
def test_a_domain_is_measured_by_the_teacher_that_its_prompts_go_to(
    tmp_path: Path, routed: dict[str, list[int]], in_code: str
) -> None:
    run = make_run(tmp_path / "run", routed)
    in_math = "arithmetic" if in_code == "code" else "mine/math"
    evaluate(
        run,
        {in_math: 0.5, in_code: 0.8},
        base={in_math: 0.2, in_code: 0.3},
        math={in_math: 0.9, in_code: 0.0},
        code={in_math: 0.0, in_code: 1.0},
    )
    report, lines, page = written(run)
    assert {name: domain["recovery"] for name, domain in report["domains"].items()} == {
        in_math: pytest.approx(0.3 / 0.7),
        in_code: pytest.approx(0.5 / 0.7),
    }
    assert report["worst_recovery"] == pytest.approx(0.3 / 0.7)
    assert report["no_recovery"] == {} and not any("none for" in line for line in lines)
    assert in_code in page
    assert "weight average" not in [row[0] for row in result_rows(report)]


def test_held_out_prompts_are_counted_by_domain() -> None:
    held_out = [
        [prompt("mine", 0, 1), prompt("mine", 1, 0), prompt("mine", 2, 1)],
        [prompt("one", 0, 1)],
        [],
    ]
    empty = PromptTable(pa.table({}))
    prompts = Prompts(["mine", "one", "none"], [empty] * 3, held_out)
    found = prompts.held_out_by_domain(["math", "code"])
    assert {name: [p.prompt_id for p in asked] for name, asked in found.items()} == {
        "mine/math": ["mine/1"],
        "mine/code": ["mine/0", "mine/2"],
        "one": ["one/0"],
    }


def test_a_run_of_before_domains_were_counted_apart_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"mine": [0, 1]})
    evaluate(run, {"mine": 0.5}, base={"mine": 0.1}, math={"mine": 0.9}, code={"mine": 0.9})
    report, lines, _ = written(run, width=400)
    assert report["domains"]["mine"]["student"] == 0.5
    assert lines[-2].startswith(
        "recovery of 0 of 1 domains; none for mine: its prompts go to math, code and were counted"
    )


@pytest.mark.parametrize(
    ("baselines", "models", "said"),
    [
        ({}, {}, "evaluation.baselines has no 'base' and no 'math'"),
        (BASE, {"base": 0.1}, "evaluation.baselines has no 'math'"),
        (BASE | TEACHERS, {}, "baselines not evaluated: mtopd evaluate RUN --baselines"),
        (BASE | TEACHERS, {"base": 0.5, "math": 0.52}, "(52.0%) is not 5% above the base (50.0%)"),
    ],
)
def test_no_recovery_has_a_reason(tmp_path: Path, baselines: dict, models: dict, said: str) -> None:
    run = make_run(tmp_path / "run", {"sums": [0]}, baselines)
    evaluate(run, {"sums": 0.5}, **{name: {"sums": value} for name, value in models.items()})
    report, lines, page = written(run, width=400)
    assert report["worst_recovery"] is None
    assert lines[-2].startswith("recovery of 0 of 1 domains; none for sums: ")
    assert lines[-2].endswith(said.replace("RUN", str(run.path)))
    assert "none for sums" in page and json.dumps(report)


def test_a_student_that_was_not_evaluated_has_no_recovery(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"sums": [0]})
    evaluate(run, {}, base={"sums": 0.1}, math={"sums": 0.9})
    assert written(run)[0]["no_recovery"] == {"sums": "the student was not evaluated"}


def test_a_source_that_no_route_fits_is_named_where_no_prompt_table_is_left(
    tmp_path: Path,
) -> None:
    """It was removed, or is of another version: the routes of the config have to do."""
    run = make_run(tmp_path / "run", {"sums": [0], "math": [0]})
    run.prompts.unlink()
    evaluate(run, {"sums": 0.5, "math": 0.5}, base={"math": 0.0}, math={"math": 1.0})
    report = written(run)[0]
    assert report["no_recovery"] == {"sums": "no teacher's route fits it"}
    assert report["domains"]["math"]["recovery"] == 0.5


def test_a_source_without_held_out_prompts_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"sums": [0], "bare": []})
    evaluate(run, {"sums": 0.5}, base={"sums": 0.0}, math={"sums": 1.0})
    report, lines, _ = written(run, width=400)
    assert report["worst_recovery"] == 0.5
    assert lines[-2] == (
        "recovery of 1 of 2 domains; none for bare: it has no held-out prompts (eval_path)"
    )
