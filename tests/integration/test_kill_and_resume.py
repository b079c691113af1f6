"""SIGKILL at any phase, the same command again: the run finishes, sealed work stays, nothing is
left behind.

The killed runs must end with exactly the student of the run that was never disturbed: invariant 8
with ``deterministic: true``.  Phases are recognised by the files they write, so the kill lands
inside the phase.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from mtopd.convert.teacher import add_teacher
from mtopd.run_dir import RunDir, is_sealed
from tests.conftest import REPOSITORY
from tests.small_models import save_model, write_prompts

pytestmark = pytest.mark.integration
NUM_ITERATIONS = 4  # checkpoints at 2 and 4
KILLED = 2  # iteration in which the run is killed: the first after a checkpoint


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kill")
    make_workplace(root)
    return root


def make_workplace(root: Path) -> None:
    """A student, two teachers, prompts and the config of a job of four ranks."""
    save_ending_model(root / "student", seed=1)
    for i in range(2):
        save_ending_model(root / f"t{i}", seed=2 + i)
        add_teacher(f"t{i}", root / f"t{i}", root / "stores" / f"t{i}", slices=2)
    write_prompts(root / "prompts.jsonl", count=400)
    config = {
        "run_dir": "set per run",
        "student": {"model": str(root / "student"), "parallel": {"tp": 2, "pp": 2}},
        "teachers": [
            {"name": f"t{i}", "store": str(root / "stores" / f"t{i}"), "route": {"domain": "ab"[i]}}
            for i in range(2)
        ],
        "data": {
            "sources": [
                {
                    "name": "words",
                    "path": str(root / "prompts.jsonl"),
                    "eval_path": str(root / "prompts.jsonl"),
                }
            ],
            "context_length": 64,
            "max_response": 24,
        },
        "rollout": {"prompts_per_iteration": 256, "batch_size": 16},
        "teacher_offload": {"batch_tokens": 128},  # many batches of a pass, of many widths
        "train": {
            "num_iterations": NUM_ITERATIONS,
            "train_steps_per_iteration": 4,
            "micro_batch_size": 16,
            "optimizer": {"lr": 1e-3},
        },
        "checkpoint": {"every": 2, "keep": 2},
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config))


def save_ending_model(folder: Path, seed: int) -> None:
    """A random model that answers at every length: its embeddings have a direction in common, EOS
    more of it.
    """
    model = save_model(folder, seed=seed, layers=2)
    with torch.no_grad():
        embedding_VD = model.get_input_embeddings().weight
        embedding_VD[:, 0] = 2.0
        embedding_VD[model.config.eos_token_id, 0] = 4.0
    model.save_pretrained(folder)


def start(root: Path, run: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "mtopd.pipelines.cli",
        "consolidate",
        str(root / "config.yaml"),
        f"run_dir={run}",
    ]
    command += overrides
    return subprocess.Popen(
        command, cwd=REPOSITORY, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str], timeout: float = 200.0) -> tuple[int, str]:
    try:
        output, error = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail("the run did not end")
    return process.returncode, output + error


def rank_processes(launcher: int) -> list[psutil.Process]:
    try:
        children = psutil.Process(launcher).children(recursive=True)
        return [p for p in children if "mtopd.pipelines.own_ranks" in " ".join(p.cmdline())]
    except psutil.NoSuchProcess:
        return []


def kill_when(
    process: subprocess.Popen[str], inside: Callable[[], bool], *, launcher: bool = False
) -> list[psutil.Process]:
    """Wait until ``inside`` holds, then SIGKILL rank 1 (or the launcher); returns all ranks there
    were.
    """
    deadline = time.monotonic() + 180
    ranks: list[psutil.Process] = []
    while not (ranks and inside()):
        assert process.poll() is None, "the run ended before the phase was seen"
        assert time.monotonic() < deadline, "the phase was never seen"
        if len(ranks) < 4:
            ranks = rank_processes(process.pid)
        time.sleep(0.002)
    os.kill(process.pid if launcher else ranks[1].pid, signal.SIGKILL)
    return ranks


def assert_nothing_left(run: Path, ranks: list[psutil.Process]) -> None:
    """No rank alive (the kernel and the launcher end them), and the lock is free."""
    psutil.wait_procs(ranks, timeout=20)
    assert [p for p in ranks if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    with open(run / "lock", "rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def lines(run: Path, kind: str) -> list[int]:
    """Iterations of all lines of a kind ever written, repeated ones too."""
    parsed = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["iteration"] for line in parsed if line["kind"] == kind]


def student(run: Path) -> dict[str, torch.Tensor]:
    return load_file(RunDir(run).export(NUM_ITERATIONS) / "model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(workplace: Path) -> dict[str, torch.Tensor]:
    run = workplace / "undisturbed"
    code, output = finish(start(workplace, run))
    assert code == 0, output
    return student(run)


def inside_phase(run: Path, phase: str) -> Callable[[], bool]:
    names = RunDir(run)
    trajectories, cache = names.trajectories(KILLED), names.hidden_cache(KILLED)
    return {
        "rollout": lambda: any(trajectories.glob("*.sealed.json")) and not is_sealed(trajectories),
        "teacher_pass": lambda: any(cache.glob("t/*/seg/*")) and not is_sealed(cache),
        "train": lambda: is_sealed(cache) and KILLED in lines(run, "train_step"),
        "checkpoint": lambda: any((run / "checkpoints").glob(f".{KILLED + 2:06d}.tmp/*")),
    }[phase]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("phase", ["rollout", "teacher_pass", "train", "checkpoint"])
def test_a_killed_rank_loses_no_sealed_work(
    workplace: Path, undisturbed: dict[str, torch.Tensor], phase: str
) -> None:
    run = workplace / phase
    process = start(workplace, run)
    ranks = kill_when(process, inside_phase(run, phase))
    code, output = finish(process)
    assert code == 2 and "SIGKILL" in output and output.count("error:") == 1, output
    assert_nothing_left(run, ranks)

    shards = {
        p: p.stat().st_mtime_ns for p in RunDir(run).trajectories(KILLED).glob("*.sealed.json")
    }
    index = {
        p: p.stat().st_mtime_ns for p in RunDir(run).hidden_cache(KILLED).glob("t/*/index/*.arrow")
    }
    process = start(workplace, run)
    redone = watch_rewrites(process, {**shards, **index})
    code, output = finish(process)
    assert code == 0, output
    assert redone == [], "sealed work was written again"
    assert lines(run, "rollout").count(0) == 1, "an iteration before the checkpoint was run again"
    if phase in ("teacher_pass", "train", "checkpoint"):
        assert lines(run, "rollout").count(KILLED) == 1, "sealed trajectories were sampled again"
    if phase in ("train", "checkpoint"):
        assert lines(run, "train_step").count(KILLED - 1) == 4, (
            "the checkpoint was not published when it was written"
        )
        # one line for each of the two teachers
        assert lines(run, "teacher_pass").count(KILLED) == 2, "a sealed cache was computed again"
    assert not list(run.rglob("*.tmp")) and not list(run.rglob("*.removed"))
    final = student(run)
    assert final.keys() == undisturbed.keys()
    for name, tensor in undisturbed.items():
        assert torch.equal(final[name], tensor), f"{name} differs from the undisturbed run"


def watch_rewrites(process: subprocess.Popen[str], files: dict[Path, int]) -> list[str]:
    """Files whose modification time changed while the run went on; that they go at the end is
    right.
    """
    changed = set()
    while process.poll() is None:
        for path, mtime in files.items():
            try:
                if path.stat().st_mtime_ns != mtime:
                    changed.add(path.name)
            except FileNotFoundError:
                pass
        time.sleep(0.05)
    return sorted(changed)


def train_steps(run: Path) -> dict[int, dict]:
    """The last line of every train step of the iteration in which runs are killed."""
    parsed = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        line["step"]: line
        for line in parsed
        if line["kind"] == "train_step" and line["iteration"] == KILLED
    }


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("undisturbed")
def test_four_processes_die_and_two_go_on(workplace: Path) -> None:
    run = workplace / "fewer"
    process = start(workplace, run)
    ranks = kill_when(process, inside_phase(run, "train"))
    code, output = finish(process)
    assert code == 2 and "SIGKILL" in output, output
    assert_nothing_left(run, ranks)

    index = {
        p: p.stat().st_mtime_ns for p in RunDir(run).hidden_cache(KILLED).glob("t/*/index/*.arrow")
    }
    assert index
    layout = [
        f"student.parallel.{name}={size}" for name, size in {"tp": 1, "pp": 1, "dp": 2}.items()
    ]
    process = start(workplace, run, *layout, "train.micro_batch_size=8")
    redone = watch_rewrites(process, index)
    code, output = finish(process)
    assert code == 0, output
    assert redone == [] and lines(run, "rollout").count(KILLED) == 1
    assert lines(run, "teacher_pass").count(KILLED) == 2, "a sealed cache was computed again"
    assert lines(run, "train_step").count(KILLED - 1) == 4, (
        "the run went on from an earlier checkpoint"
    )
    found, wanted = train_steps(run), train_steps(workplace / "undisturbed")
    first = sorted(wanted)[:3]
    assert sorted(found) == sorted(wanted) and len(first) == 3
    errors = [
        abs(found[step]["loss"] - wanted[step]["loss"]) / wanted[step]["loss"] for step in first
    ]
    print(f"worst loss {max(errors):.1e}")
    assert max(errors) <= 2e-6, errors


@pytest.mark.timeout(300)
def test_ranks_die_with_their_launcher(workplace: Path) -> None:
    run = workplace / "launcher"
    process = start(workplace, run)
    ranks = kill_when(process, lambda: (run / "metrics.jsonl").exists(), launcher=True)
    process.wait(timeout=30)
    for stream in (process.stdout, process.stderr):
        assert stream is not None
        stream.close()
    assert_nothing_left(run, ranks)
