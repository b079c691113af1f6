"""The command line on real servers: rollouts, teacher pass, train steps, weights by broadcast, held-out
prompts, baselines.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.integration.test_kill_and_resume import make_workplace
from tests.sglang.conftest import Place
from tests.small_models import write_prompts
from tests.support.sglang_servers import RunningServer, Zygote

pytestmark = pytest.mark.timeout(600)  # minutes of imports where other work goes on
SMALL = (
    "rollout.prompts_per_iteration=48",
    "train.num_iterations=2",
    "train.train_steps_per_iteration=2",
    "train.micro_batch_size=8",
    "train.optimizer.warmup_steps=0",
    "train.optimizer.lr=3e-3",
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("loop")
    make_workplace(root)
    write_prompts(root / "eval.jsonl", count=16)
    return root


def start(root: Path, run: Path, urls: list[str], *overrides: str) -> subprocess.Popen[str]:
    """A run on these servers."""
    command = [sys.executable, "-m", "mtopd.pipelines.cli", "consolidate"]
    command += [str(root / "config.yaml"), f"run_dir={run}"]
    command += ["rollout.engine=sglang", f"rollout.servers={json.dumps(urls)}"]
    command += [f"data.sources.0.eval_path={root / 'eval.jsonl'}"]
    settings = dict(setting.split("=", 1) for setting in (*SMALL, *overrides))
    command += [f"{key}={value}" for key, value in settings.items()]
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "XDG_CACHE_HOME": str(root / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def consolidate(root: Path, run: Path, urls: list[str], *overrides: str) -> tuple[int, str]:
    """Exit code and all that is said of a run on these servers."""
    process = start(root, run, urls, *overrides)
    said, _ = process.communicate(timeout=560)
    return process.returncode, said


def lines_of(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def check_learns(run: Path) -> None:
    """Two iterations of two train steps.  In the first of each the trainer gives the tokens of the rollout
    the servers' log-probs.
    """
    lines = lines_of(run, "train_step")
    kl = [line["reverse_kl"] for line in lines]
    assert len(kl) == 4 and kl[-1] < 0.9 * kl[0], kl
    assert all(0 < line["log_prob_difference_p99"] < 1e-5 for line in lines[::2]), lines


def test_two_iterations_at_tp2pp2_on_two_servers(
    workplace: Path, tmp_path: Path, servers: list[RunningServer]
) -> None:
    """Each update was proven at 1e-5; the base, a baseline, answers as the student did that was the
    same model, and another one does not.
    """
    run, urls = tmp_path / "run", [server.url for server in servers]
    baselines = {"base": str(workplace / "student"), "t0": str(workplace / "t0")}
    code, said = consolidate(
        workplace,
        run,
        urls,
        "student.bucket_bytes=32768",
        f"evaluation.baselines={json.dumps(baselines)}",
        "evaluation.temperature=1",  # responses of many lengths
    )
    assert code == 0, said
    assert (run / "serving" / "config.json").is_file() and f"--model-path {run}" in said
    check_learns(run)
    first, last = lines_of(run, "evaluation")
    found = {line["part"]: line["stopped"] for line in lines_of(run, "baseline")}
    assert found["base"] == first["stopped"] != found["t0"]
    assert last["stopped"] != first["stopped"]


@pytest.fixture
def wide(zygote: Zygote, place: Place) -> Iterator[RunningServer]:
    server = zygote.start(place.serving, tp=2)
    server.wait_ready()
    yield server
    server.kill()


def test_one_server_at_tp_2(workplace: Path, tmp_path: Path, wide: RunningServer) -> None:
    run = tmp_path / "run"
    code, said = consolidate(workplace, run, [wide.url])
    assert code == 0, said
    check_learns(run)


def test_a_server_that_does_not_fit_or_answer_is_named_before_ranks_start(
    workplace: Path, tmp_path: Path, servers: list[RunningServer]
) -> None:
    url, run = servers[0].url, tmp_path / "run"
    code, said = consolidate(workplace, run, [url], "data.context_length=127")
    assert code == 2 and f"{url}: its longest input is 121 tokens" in said, said
    nobody = "http://127.0.0.1:9"
    code, said = consolidate(workplace, run, [url, nobody], "rollout.patience_s=1")
    assert code == 2 and f"SGLang server {nobody} does not answer" in said, said
    assert "starting" not in said and "Traceback" not in said
