"""A run's report: report.json, report.html, and the result on the console.

record reads the run directory, numbers makes report.json of it, tables its rows as text, plots and
page the HTML.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mtopd.files import write_atomic, write_json
from mtopd.report.numbers import Report, build_report
from mtopd.report.page import render_page
from mtopd.report.record import read_config, read_run
from mtopd.report.tables import check_rows, result_columns, result_rows, verdict

__all__ = ["Report", "build_report", "read_config", "read_run", "write_report"]


def write_report(run_dir: Path, console: Console) -> Report:
    """Write both files into the run directory, print the result table; the last line printed is the
    verdict.
    """
    record = read_run(run_dir, read_config(run_dir))
    report = build_report(record)
    write_json(run_dir / "report.json", report)
    write_atomic(run_dir / "report.html", render_page(record, report, str(run_dir)).encode())
    console.print(_console_table(report))
    checks = [
        f"{name}: {found}, expected {expected}: {result}"
        for name, found, expected, result in check_rows(report)
    ]
    for line in (*checks, f"{verdict(report)}, report {run_dir / 'report.html'}"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return report


def _console_table(report: Report) -> Table:
    table = Table()
    for name in result_columns(report):
        table.add_column(Text(name), justify="right" if name else "left")
    for row in result_rows(report):
        table.add_row(*map(Text, row), style="bold" if row[0] in ("student", "recovery") else None)
    return table
