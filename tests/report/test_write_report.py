"""The files a report leaves and the lines it prints."""

import json

from mtopd.run_dir import RunDir
from tests.report.runs import written


def test_write_leaves_both_files_and_ends_with_the_verdict(run: RunDir) -> None:
    report, lines, page = written(run, width=40)
    assert json.loads((run.path / "report.json").read_text()) == report
    assert {path.name for path in run.path.glob("*report*")} == {"report.json", "report.html"}
    assert lines[-1] == (
        "consolidated: worst recovery 0.85, mean 0.90, reverse KL 0.18 -> 0.039 (4.6x), report "
        f"{run.path}/report.html"
    )
    assert "head loads: 90, expected 90: ok" in lines
    assert written(run)[2] == page  # the same run gives the same bytes
