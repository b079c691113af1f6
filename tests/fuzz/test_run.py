"""Which cases a fuzz makes, and what it lets pass."""

from __future__ import annotations

import pytest

from tests.fuzz.run import make_cases, wrong_again


@pytest.mark.parametrize(("whole", "found"), [(0, 0), (1, 1), (4, 4), (20, 20), (100, 20)])
def test_as_many_cases_run_to_the_end_as_were_asked_for(whole: int, found: int) -> None:
    cases = make_cases(["config.json", "prompts.jsonl"], 10, whole)
    assert len(cases) == 20 and sum(case.whole for case in cases) == found


@pytest.mark.parametrize(
    ("is_taken", "refused", "wrong"),
    [
        (True, "", None),
        (False, "", None),
        (
            True,
            "error: /p (path of source words) is new; put it back, or choose another run_dir",
            None,
        ),
        (True, "error: stores/mine exists and holds another teacher", None),
        (True, "error: no space left", "for another reason"),
        (False, "error: put it back, or choose another run_dir", "though nothing was made"),
    ],
)
def test_the_sound_input_is_refused_only_where_the_damaged_one_was_used(
    is_taken: bool, refused: str, wrong: str | None
) -> None:
    found = wrong_again(is_taken, refused)
    assert (found is None) == (wrong is None) and (wrong or "") in (found or "")
