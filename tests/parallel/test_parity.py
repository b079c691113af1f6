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
@pytest.mark.timeout(900)
def test_every_mutant_turns_its_row_red(root: Path) -> None:
    """A mutant that does not run to its end fails here: it would show nothing of the numbers."""
    by_name = {row.name: row for row in parity.rows()}
    mutated = [by_name[name].mutated(mutant) for mutant, name in MUTANTS.items()]
    bases = {row.base: by_name[row.base] for row in mutated if row.base}
    lacking = [row for row in bases.values() if not (row.run(root) / "parity.json").exists()]
    output = parity.run_rows(root, [*mutated, *lacking], timeout=800.0)
    assert output.count("DONE") == len(mutated) + len(lacking)
    verdicts = {row.mutant: parity.judge_mutant(root, row) for row in mutated}
    for mutant, verdict in verdicts.items():
        print(f"{mutant:40} {MUTANTS[mutant]:32} {verdict or 'passed'}")
    assert [mutant for mutant, verdict in verdicts.items() if not verdict] == []
