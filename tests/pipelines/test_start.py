"""A phase verb under an outer torchrun: it takes part with the ranks there are, and starts none."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from mtopd.config import ConsolidateConfig
from mtopd.config_file import load_config
from mtopd.convert.teacher import add_teacher
from mtopd.files import remove_tree
from mtopd.pipelines import prepare, start
from mtopd.run_dir import RunDir, is_sealed
from tests.conftest import REPOSITORY
from tests.prompt_examples import write_jsonl
from tests.small_models import save_model, write_prompts

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """The run directory of a consolidation on two ranks that was checked and not started."""
    root = tmp_path_factory.mktemp("start")
    save_model(root / "student", seed=1, layers=2)
    save_model(root / "t0", seed=2, layers=2)
    add_teacher("t0", root / "t0", root / "stores" / "t0", slices=1)
    write_prompts(root / "prompts.jsonl")
    write_jsonl(root / "held_out.jsonl", {"prompt": "a", "answer": "b"})
    config = {
        "run_dir": str(root / "run"),
        "student": {"model": str(root / "student"), "parallel": {"dp": 2}},
        "teachers": [{"name": "t0", "store": str(root / "stores" / "t0"), "route": {}}],
        "data": {
            "sources": [
                {
                    "name": "words",
                    "path": str(root / "prompts.jsonl"),
                    "eval_path": str(root / "held_out.jsonl"),
                }
            ],
            "context_length": 64,
            "max_response": 16,
        },
        "rollout": {"prompts_per_iteration": 8, "batch_size": 4},
        "train": {"num_iterations": 1, "micro_batch_size": 4, "optimizer": {"lr": 1e-3}},
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    loaded = load_config(root / "config.yaml", [], ConsolidateConfig)
    run = RunDir(loaded.run_dir)
    start.start_ranks(run, loaded, prepare.consolidate, "none:none", check=True)
    return run


def under_torchrun(
    run: RunDir, *arguments: str, module: tuple[str, ...] = ("mtopd.pipelines.cli",)
) -> tuple[int, str, set[int]]:
    """Exit code of torchrun, its standard error, and the processes of mtopd it had below it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    command += ["-m", *module, arguments[0], str(run.path), *arguments[1:]]
    errors = run.path.parent / "stderr"
    ranks = set()
    with open(errors, "w") as file:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=file, stderr=file)
        while process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                try:
                    if any(module[0] in word for word in child.cmdline()):
                        ranks.add(child.pid)
                except psutil.Error:
                    pass  # it ended while we looked
            time.sleep(0.05)
    return process.returncode, errors.read_text(), ranks


def test_a_phase_verb_runs_on_the_ranks_of_an_outer_torchrun(run: RunDir) -> None:
    code, errors, ranks = under_torchrun(run, "rollout")
    assert code == 0, errors
    assert len(ranks) == 2, f"torchrun started two ranks, there were {len(ranks)} processes"
    assert is_sealed(run.trajectories(0))
    assert len(list(run.trajectories(0).glob("*.sealed.json"))) == 2
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["kind"] for line in lines].count("rollout") == 1
    assert errors.count("prompts") <= 1, "only rank 0 says what it prepares"


@pytest.mark.parametrize("cause", ["iteration", "lock"])
def test_a_user_error_there_is_one_line(run: RunDir, cause: str) -> None:
    """Found by every rank once it runs, or by rank 0 alone before: the other ranks end as well."""
    if cause == "iteration":
        code, errors, ranks = under_torchrun(run, "train", "--iteration", "7")
        said = "has no checkpoint of iteration 7"
    else:
        with run.lock():
            code, errors, ranks = under_torchrun(run, "teacher-pass")
        said = "in use"
    lines = [line for line in errors.splitlines() if "error:" in line]
    assert code != 0 and len(ranks) == 2
    assert len(lines) == 1 and said in lines[0], errors
    assert "exitcode  : 2" in errors and "Traceback" not in lines[0]


def test_a_rank_that_nobody_foresaw_fails_by_its_name(run: RunDir) -> None:
    """One that is not the first was silent: torchrun tells an exit code, no more."""
    (run.path / "failure.0.txt").write_text("of a former start")
    module = ("tests.pipelines.one_rank", "bug")
    code, errors, _ = under_torchrun(run, "rollout", module=module)
    (line,) = [line for line in errors.splitlines() if "error:" in line]
    path = run.path / "failure.1.txt"
    said = f"error: rank 1 on host {socket.gethostname()}: KeyError: 'no such thing' (unforeseen"
    assert code != 0 and said in line and str(path) in line, errors
    assert "Traceback" not in errors.split("torch/distributed")[0]
    trace = path.read_text()
    assert trace.startswith("Traceback") and "no such thing" in trace and "one_rank" in trace
    assert not (run.path / "failure.0.txt").exists()


@pytest.mark.parametrize("verb", ["teacher-pass", "train"])
def test_a_rank_that_sees_other_files_ends_the_run_by_name(run: RunDir, verb: str) -> None:
    """Planned from its own listing it would train something else, and every check would pass."""
    assert is_sealed(run.trajectories(0)), "by the first test of this file"
    cache, module = run.hidden_cache(0), ("tests.pipelines.one_rank", "stale")
    if verb == "train":  # the samples are looked at before the cache is read
        cache.mkdir()
        (cache / "SEALED").write_text(json.dumps({"schema": 1, "generation": 1}))
    code, errors, _ = under_torchrun(run, verb, module=module)
    (line,) = [line for line in errors.splitlines() if "error:" in line]
    assert code != 0 and "exitcode  : 2" in errors, errors
    host = socket.gethostname()
    assert f"rank 1 on host {host} lists 1 sealed shards" in line
    assert f"rank 0 on host {host} lists 2 sealed shards" in line and "stale" in line
    assert is_sealed(cache) == (verb == "train"), "nothing was computed from it"
    remove_tree(cache)
    kinds = [json.loads(text)["kind"] for text in run.metrics.read_text().splitlines()]
    assert "train_step" not in kinds


def test_an_evaluation_says_nothing_of_training(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(start, "launch", lambda *_: None)
    of_training = ("(warmup_steps)", "each rank will hold")
    for name, says_it in (("train", True), ("evaluate", False)):
        start.phase(run.path, name, 0)
        errors = capsys.readouterr().err
        assert "starting 2 ranks" in errors
        assert [text in errors for text in of_training] == [says_it] * 2, errors
