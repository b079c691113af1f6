"""The parity matrix as a test, and what turns it red: a mutant for each kind of row."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parallel import parity
from tests.parallel.mutants import MUTANTS


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parity")
    parity.build_workplace(root)
    return root


@pytest.mark.timeout(900)
def test_every_layout_gives_the_numbers_of_one_process(root: Path) -> None:
    output = parity.run_rows(root, parity.rows())
    verdicts = parity.judge(root, parity.rows())
    print(parity.table(verdicts))
    assert output.count("DONE") == len(parity.rows()) and len(verdicts) == len(parity.rows()) - 1
    assert [v.row.name for v in verdicts if v.failed] == [], parity.table(verdicts)


@pytest.mark.integration
@pytest.mark.timeout(1500)
def test_every_mutant_turns_its_row_red(root: Path) -> None:
    by_name = {row.name: row for row in parity.rows()}
    bases = [
        row
        for row in parity.rows()
        if row.base is None and row.teachers == parity.FAR and row.dtype == "float32"
    ]
    if not all((root / "runs" / row.name / "parity.json").exists() for row in bases):
        parity.run_rows(root, bases)
    survivors = []
    for mutant, name in MUTANTS.items():
        verdict = parity.judge_mutant(root, by_name[name], mutant)
        print(f"{mutant:40} {name:32} {verdict or 'passed'}")
        if not verdict:
            survivors.append(mutant)
    assert survivors == []
