"""NaN or inf in a batch: the step is refused before the optimizer touches anything, and the samples
are named.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mtopd.convert.teacher import add_teacher
from tests.conftest import run_ranks
from tests.parallel import parity
from tests.small_models import save_model, write_prompts

WORKER = Path(__file__).with_name("bad_step_ranks.py")


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "pp": 2}])
def test_a_step_with_nan_or_inf_is_refused_and_its_samples_named(
    tmp_path: Path, layout: dict[str, int]
) -> None:
    save_model(tmp_path / "tied", seed=1, vocab=111)
    for i, name in enumerate(parity.FAR):
        save_model(tmp_path / name, seed=2 + i, hidden=64, layers=2)
        add_teacher(name, tmp_path / name, tmp_path / "stores" / name, slices=2)
    write_prompts(tmp_path / "prompts.jsonl", domains=("a", "b", "c"))
    row = parity.Row("bad", None, parallel=layout)
    spec = parity.prepare_run(tmp_path, row)
    output = run_ranks(row.world_size, WORKER, json.dumps(spec))
    assert output.count("PASSED") == 4, output
