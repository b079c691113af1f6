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


def test_a_source_has_the_teacher_that_its_prompts_go_to(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"arithmetic": [0, 0], "code": [1]})
    evaluate(
        run,
        {"arithmetic": 0.5, "code": 0.8},
        base={"arithmetic": 0.2, "code": 0.3},
        math={"arithmetic": 0.9, "code": 0.0},
        code={"arithmetic": 0.0, "code": 1.0},
    )
    report, lines, _ = written(run)
    assert report["domains"]["arithmetic"]["recovery"] == pytest.approx(0.3 / 0.7)
    assert report["worst_recovery"] == pytest.approx(0.3 / 0.7)
    assert report["no_recovery"] == {} and not any("none for" in line for line in lines)
    assert "weight average" not in [row[0] for row in result_rows(report)]


def test_a_source_of_several_teachers_has_a_domain_for_each(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"mine": [0, 1, 0]})
    evaluate(
        run,
        {"mine/math": 0.5, "mine/code": 0.8},
        base={"mine/math": 0.25, "mine/code": 0.0},
        math={"mine/math": 0.75, "mine/code": 0.0},
        code={"mine/math": 0.0, "mine/code": 1.0},
    )
    report, _, page = written(run)
    assert {n: d["recovery"] for n, d in report["domains"].items()} == {
        "mine/math": 0.5,
        "mine/code": 0.8,
    }
    assert "mine/math" in page


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


def test_a_source_without_held_out_prompts_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"sums": [0], "bare": []})
    evaluate(run, {"sums": 0.5}, base={"sums": 0.0}, math={"sums": 1.0})
    report, lines, _ = written(run, width=400)
    assert report["worst_recovery"] == 0.5
    assert lines[-2] == (
        "recovery of 1 of 2 domains; none for bare: it has no held-out prompts (eval_path)"
    )
