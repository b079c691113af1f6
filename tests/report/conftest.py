"""The finished run that most tests of the report look at."""

from pathlib import Path

import pytest

from mtopd.files import write_json
from mtopd.metrics import MetricsWriter
from mtopd.metrics_lines import MemoryLine, PhaseLine
from mtopd.run_dir import RunDir
from tests.report.runs import BASELINES, config_of, finish, start_run, write_iteration


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A finished run of 15 iterations, that is 30 train steps."""
    run = start_run(tmp_path / "run", config_of(tmp_path / "run", 15))
    metrics = MetricsWriter(run.metrics, enabled=True)
    metrics.write(PhaseLine("baselines", 7.0), 0)
    for iteration in range(15):
        write_iteration(metrics, iteration)
    metrics.write(MemoryLine(5000), 15)
    metrics.close()
    write_json(run.path / "evaluations" / "baselines.json", BASELINES)
    write_json(run.evaluation(0), {"rot": 0.4, "rev": 0.5, "spir": 0.6})
    write_json(run.evaluation(15), {"rot": 0.97, "rev": 0.84, "spir": 0.63})
    finish(run, 15)
    return run
