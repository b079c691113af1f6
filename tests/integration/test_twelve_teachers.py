"""Twelve teachers cost no more memory than two: whole runs of the command line, memory measured by
the kernel.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mtopd.convert.teacher import add_teacher
from mtopd.teacher_offload.store import open_store
from tests.conftest import REPOSITORY
from tests.small_models import save_model, write_prompts

pytestmark = pytest.mark.integration
MIB = 1 << 20
DOMAINS = tuple("abcdefghijkl")
VOCAB = 4096  # rows of every table: the tokenizer's ids and padding, as in released checkpoints


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("twelve")
    save_model(root / "student", seed=1, layers=2, tied=False, vocab=VOCAB)
    for i in range(len(DOMAINS)):
        save_model(root / "hf", seed=2 + i, hidden=1024, layers=2, tied=False, vocab=VOCAB)
        store = add_teacher(f"t{i}", root / "hf", root / "stores" / f"t{i}", slices=1)
        shutil.rmtree(root / "hf")
        assert store.pass_bytes() >= 64 * MIB
        head = store.head.slices(0, 1)
        assert head[-1].stop - head[0].start >= 16 * MIB
    return root


def consolidate(root: Path, num_teachers: int, *, num_stores: int) -> dict:
    """Two iterations with teachers on the first stores, which are not called as the stores are; the
    same number of prompts however many teachers there are.
    """
    domains = DOMAINS[:num_teachers]
    write_prompts(root / f"prompts{num_teachers}.jsonl", count=48, domains=domains)
    run = root / f"run{num_teachers}"
    config = {
        "run_dir": str(run),
        "student": {"model": str(root / "student")},
        "teachers": [
            {
                "name": f"teacher-{domain}",
                "store": str(root / "stores" / f"t{i % num_stores}"),
                "route": {"domain": domain},
            }
            for i, domain in enumerate(domains)
        ],
        "data": {
            "sources": [{"name": "words", "path": str(root / f"prompts{num_teachers}.jsonl")}],
            "context_length": 64,
            "max_response": 16,
        },
        "rollout": {"prompts_per_iteration": 24},
        "teacher_offload": {"host_budget": 64 * MIB},
        "train": {
            "num_iterations": 2,
            "train_steps_per_iteration": 2,
            "micro_batch_size": 4,
            "optimizer": {"lr": 1e-4},
        },
    }
    path = root / f"config{num_teachers}.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "mtopd.pipelines.cli", "consolidate", str(path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((run / "report.json").read_text())
    assert isinstance(report, dict)
    return report


def test_twelve_teachers_take_the_memory_of_two(workplace: Path) -> None:
    few = consolidate(workplace, 2, num_stores=1)
    many = consolidate(workplace, 12, num_stores=12)
    growth = many["peak_host_bytes"] / few["peak_host_bytes"]
    print(
        f"peak resident memory: 2 teachers {few['peak_host_bytes'] / MIB:.0f} MiB, 12 teachers x "
        f"{growth:.3f}"
    )
    assert growth <= 1.05
    stored = sum(open_store(workplace / "stores" / f"t{i}").pass_bytes() for i in range(12))
    for report in (few, many):
        assert report["finished"] and report["peak_resident_heads"] == 1
        assert all(check["ok"] for check in report["checks"].values()), report["checks"]
    for report, count in ((few, 2), (many, 12)):
        teachers = report["teachers"]
        assert [t["name"] for t in teachers] == [f"teacher-{d}" for d in DOMAINS[:count]]
        assert all(t["head_loads"] and t["passes"] and t["tokens"] for t in teachers), (
            "the config's names throughout; two names on one store are two teachers"
        )
    loads = many["checks"]["head_loads"]
    assert loads["found"] == loads["expected"] > 12, (
        "as many head loads in a step as distinct teachers are in it"
    )
    assert many["peak_device_bytes"] < stored / 4, (
        "never more than two layers and an embedding of one teacher"
    )
