"""The rows of the tables as text."""

from mtopd.report.tables import in_bytes, result_rows
from mtopd.run_dir import RunDir
from tests.report.runs import TEACHERS, report_of


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
