"""A teacher that does not predict what it predicted when it was added stops the run before a token
is trained.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mtopd.convert.teacher import add_teacher
from mtopd.hidden_cache import HiddenCacheReader
from tests.conftest import REPOSITORY
from tests.small_models import save_model, write_prompts

pytestmark = pytest.mark.integration


@pytest.fixture
def root(tmp_path: Path) -> Path:
    save_model(tmp_path / "student", seed=1, layers=2)
    for i in range(2):
        save_model(tmp_path / f"t{i}", seed=2 + i, layers=2)
        # Its own code would do this to its logits.
        head = {"logit_scale": 0.7, "softcap": 8.0} if i == 0 else {}
        add_teacher(f"t{i}", tmp_path / f"t{i}", tmp_path / "stores" / f"t{i}", slices=1, **head)
    write_prompts(tmp_path / "prompts.jsonl", count=16)
    config = {
        "run_dir": str(tmp_path / "run"),
        "student": {"model": str(tmp_path / "student")},
        "teachers": [
            {
                "name": f"t{i}",
                "store": str(tmp_path / "stores" / f"t{i}"),
                "route": {"domain": "ab"[i]},
            }
            for i in range(2)
        ],
        "data": {
            "sources": [{"name": "words", "path": str(tmp_path / "prompts.jsonl")}],
            "context_length": 64,
            "max_response": 8,
        },
        "rollout": {"prompts_per_iteration": 8},
        "train": {"num_iterations": 1, "micro_batch_size": 4, "optimizer": {"lr": 1e-3}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def manifest(root: Path, name: str) -> dict:
    values = json.loads((root / "stores" / name / "teacher.json").read_text())
    assert isinstance(values, dict)
    return values


def consolidate(root: Path) -> tuple[int, str]:
    command = [
        sys.executable,
        "-m",
        "mtopd.pipelines.cli",
        "consolidate",
        str(root / "config.yaml"),
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def test_another_teachers_weights_are_refused_and_nothing_of_them_is_kept(root: Path) -> None:
    values = manifest(root, "t1")
    # As if t1's files were those of another checkpoint.
    values["probe"] = manifest(root, "t0")["probe"]
    (root / "stores" / "t1" / "teacher.json").write_text(json.dumps(values))
    code, output = consolidate(root)
    assert (
        code == 2
        and "teacher 't1' is not the one that was added" in output
        and "transformers" in output
    ), output
    kinds = [
        json.loads(line)["kind"]
        for line in (root / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert "train_step" not in kinds and "teacher_pass" in kinds, "t0 was right, and was read first"
    with HiddenCacheReader(root / "run" / "iterations" / "000000" / "hidden_cache") as reader:
        kept = {entry.layout.teacher_fingerprint for entry in reader.entries()}
    assert kept == {manifest(root, "t0")["fingerprint"]}, "only the right teacher's rows"


def test_a_store_without_a_reference_is_compared_with_itself_and_reported_so(root: Path) -> None:
    values = manifest(root, "t1")
    del values["probe"]
    (root / "stores" / "t1" / "teacher.json").write_text(json.dumps(values))
    code, output = consolidate(root)
    assert code == 0, output
    report = json.loads((root / "run" / "report.json").read_text())
    assert [t["probe"] for t in report["teachers"]] == ["transformers", "self"]
    (noted,) = (root / "run" / "probes").iterdir()
    assert noted.stem == values["fingerprint"] and json.loads(noted.read_text())["by"] == "self"
