"""A run's report, of a consolidation or a specialist: report.json, report.html, and the result on
the console.

record reads the run directory, numbers makes report.json of it, tables its rows as text, plots and
page the HTML.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mtopd.config_specialist import SpecialistConfig
from mtopd.files import write_atomic, write_json
from mtopd.report.numbers import Report, build_report, build_specialist_report
from mtopd.report.page import render_page, render_specialist_page
from mtopd.report.record import read_config, read_run, read_specialist
from mtopd.report.tables import (
    accuracy_columns,
    accuracy_rows,
    check_rows,
    origin_rows,
    recovery_lines,
    result_columns,
    result_rows,
    specialist_verdict,
    verdict,
)

__all__ = ["Report", "build_report", "read_config", "read_run", "write_report"]


def write_report(run_dir: Path, console: Console) -> Report:
    """Write both files into the run directory, print the result table; the last line printed is the
    verdict.
    """
    config = read_config(run_dir)
    checks: list[str] = []
    if isinstance(config, SpecialistConfig):
        training = read_specialist(run_dir, config)
        report = build_specialist_report(training)
        page = render_specialist_page(training, report, str(run_dir))
        columns, rows = accuracy_columns(report), accuracy_rows(report)
        result = specialist_verdict(report)
    else:
        record = read_run(run_dir, config)
        report = build_report(record)
        page = render_page(record, report, str(run_dir))
        columns, rows = result_columns(report), result_rows(report)
        for line in origin_rows(report):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        checks = [
            f"{name}: {found}, expected {expected}: {result}"
            for name, found, expected, result in check_rows(report)
        ]
        checks += recovery_lines(report)
        result = verdict(report)
    write_json(run_dir / "report.json", report)
    write_atomic(run_dir / "report.html", page.encode())
    if len(columns) > 1:
        console.print(_console_table(columns, rows))
    for line in (*checks, f"{result}, report {run_dir / 'report.html'}"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return report


def _console_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table()
    for name in columns:
        table.add_column(Text(name), justify="right" if name else "left")
    for row in rows:
        table.add_row(*map(Text, row), style="bold" if row[0] in ("student", "recovery") else None)
    return table
