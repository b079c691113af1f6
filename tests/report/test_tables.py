"""The rows of the tables as text."""

import pytest

from mtopd.report.tables import in_bytes, result_rows, reverse_kl
from mtopd.run_dir import RunDir
from tests.report.runs import TEACHERS, report_of


def test_result_rows(run: RunDir) -> None:
    rows = {row[0]: row[1:] for row in result_rows(report_of(run))}
    assert list(rows) == ["base", *TEACHERS, "weight average", "student", "recovery"]
    assert rows["student"] == ["97.0%", "84.0%", "63.0%", "0.85"]
    assert rows["recovery"] == ["0.95", "0.85", "n/a", "0.85"]
    assert rows["weight average"][-1] == "-0.50"


@pytest.mark.parametrize(
    ("num_steps", "first", "last", "said"),
    [
        (0, None, None, "n/a"),
        (1, 0.18, None, "0.18"),
        (2, 0.18, 0.04, "0.18 -> 0.04 (4.5x)"),
        (30, 0.8, 0.02, "0.8 -> 0.02 (40x)"),
        (30, 0.02, 0.8, "0.02 -> 0.8"),  # it rose: no factor
        (30, 0.02, None, "0.02 -> n/a"),  # NaN
    ],
)
def test_one_train_step_has_no_arrow(
    num_steps: int, first: float | None, last: float | None, said: str
) -> None:
    report = {"train_steps": num_steps, "reverse_kl": {"first": first, "last": last}}
    assert reverse_kl(report, "->") == said


def test_bytes_have_units() -> None:
    assert [in_bytes(n) for n in (0, 1023, 1024, 7 << 19, None)] == [
        "0 B",
        "1023 B",
        "1 KiB",
        "3.5 MiB",
        "n/a",
    ]
