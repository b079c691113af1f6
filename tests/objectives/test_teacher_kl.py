"""Which tokens the metrics of both distributions are measured on: every token of a teacher is equally likely."""

from __future__ import annotations

from collections import Counter

import pytest

from mtopd.objectives.teacher_kl import TeacherRun, _draw_runs


def test_a_run_of_each_teacher_is_drawn_by_its_rows() -> None:
    runs = [TeacherRun(0, 0, 10, []), TeacherRun(2, 10, 40, []), TeacherRun(0, 0, 30, []), TeacherRun(2, 30, 40, [])]
    drawn: Counter[TeacherRun] = Counter()
    for seed in range(4000):
        rows_of = _draw_runs(runs, seed)
        assert sorted((run.teacher_index, rows) for run, rows in rows_of.items()) == [(0, 40), (2, 40)]
        drawn.update(rows_of.keys())
    assert [drawn[run] / 4000 for run in runs] == pytest.approx([0.25, 0.75, 0.75, 0.25], abs=0.03)
    assert _draw_runs(runs, 7) == _draw_runs(runs, 7) and _draw_runs([], 0) == {}
