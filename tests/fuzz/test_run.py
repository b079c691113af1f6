"""Which cases a fuzz makes."""

from __future__ import annotations

import pytest

from tests.fuzz.run import make_cases


@pytest.mark.parametrize(("whole", "found"), [(0, 0), (1, 1), (4, 4), (20, 20), (100, 20)])
def test_as_many_cases_run_to_the_end_as_were_asked_for(whole: int, found: int) -> None:
    cases = make_cases(["config.json", "prompts.jsonl"], 10, whole)
    assert len(cases) == 20 and sum(case.whole for case in cases) == found
