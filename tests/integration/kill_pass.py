"""SIGKILL at random instants of the streaming pass: `python -m tests.integration.kill_pass --kills
20`.

A run directory gets trajectories; ``mtopd teacher-pass`` is started, killed at a random moment of
its work, and started again.  After every kill each committed sample must be intact; the run that is
let through must finish with the rows of an undisturbed one, bit for bit.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil

from mtopd.config import ConsolidateConfig
from mtopd.config_file import validate
from mtopd.convert.teacher import add_teacher
from mtopd.hidden_cache import HiddenCacheReader
from mtopd.pipelines import prepare
from mtopd.run_dir import RunDir, is_sealed
from mtopd.tokenizer import load_tokenizer, vocab_size
from mtopd.trajectories import write_shard
from mtopd.types import Trajectory
from tests.conftest import REPOSITORY
from tests.small_models import save_model, write_prompts
from tests.support import kills as common

SAMPLES = 96
DOMAINS = "abcd"  # of a teacher each: what one has committed must survive a kill in the next


def make_run(folder: Path, name: str) -> RunDir:
    """A run of two ranks and four teachers with sealed trajectories and nothing else."""
    values = {
        "run_dir": str(folder / name),
        "student": {"model": str(folder / "student"), "parallel": {"tp": 2}},
        "teachers": [
            {
                "name": f"t{i}",
                "store": str(folder / "stores" / f"t{i}"),
                "route": {"domain": domain},
            }
            for i, domain in enumerate(DOMAINS)
        ],
        "data": {
            "sources": [{"name": "words", "path": str(folder / "prompts.jsonl")}],
            "context_length": 96,
            "max_response": 48,
        },
        "rollout": {"prompts_per_iteration": SAMPLES},
        "teacher_offload": {
            "host_budget": 8 << 20,
            "activation_budget": 1 << 20,
            "batch_tokens": 128,
        },
        "train": {"num_iterations": 1, "micro_batch_size": 4, "optimizer": {"lr": 1e-3}},
    }
    config = validate(values, ConsolidateConfig, "kill_pass")
    run = RunDir(config.run_dir)
    with run.lock():
        prepare.consolidate(config, run, lambda text: None)
    draw = random.Random(0)
    vocab = vocab_size(load_tokenizer(folder / "student"))
    trajectories = []
    for i in range(SAMPLES):
        prompt, response = (
            tuple(draw.randrange(3, vocab) for _ in range(n)) for n in (8, draw.randrange(8, 40))
        )
        mask, log_probs = (1,) * len(response), (-1.0,) * len(response)
        route, teacher = {"domain": DOMAINS[i % len(DOMAINS)]}, i % len(DOMAINS)
        trajectories.append(
            Trajectory(
                i,
                f"words/{i}",
                route,
                teacher,
                prompt,
                response,
                mask,
                log_probs,
                0,
                "length",
                None,
            )
        )
    run.trajectories(0).mkdir(parents=True)
    write_shard(run.trajectories(0), "given", trajectories, run.generation)
    run.seal(run.trajectories(0))
    return run


def start(run: RunDir) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "mtopd.pipelines.cli",
        "teacher-pass",
        str(run.path),
        "--iteration",
        "0",
    ]
    return subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def committed(run: RunDir) -> dict[bytes, np.ndarray]:
    """Rows of every committed sample by key; raises CacheMiss when one of them cannot be read
    soundly.
    """
    rows = {}
    with HiddenCacheReader(run.hidden_cache(0)) as reader:
        assert not reader.refused, reader.refused
        for request, copies in reader._copies.items():
            out_NE = np.empty(
                (copies[0].n_tokens, copies[0].layout.hidden_size), copies[0].layout.dtype
            )
            reader.read(copies[0], out_NE)
            rows[request.key] = out_NE
    return rows


def wait_for_work(process: subprocess.Popen[bytes], run: RunDir, generation: int) -> None:
    """Until the pass writes: its ranks have taken the generation and the cache's folder exists."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if run.current_generation() > generation and any(run.hidden_cache(0).glob("t/*/seg/*")):
            return
        time.sleep(0.01)


def run(kills: int, folder: Path, seed: int) -> str:
    """Kill ``kills`` times; one line of results.  Raises AssertionError on any violation."""
    draw = random.Random(seed)
    save_model(folder / "student", seed=1, layers=2)
    for i in range(len(DOMAINS)):
        save_model(folder / f"t{i}", seed=2 + i, hidden=512, layers=4)
        add_teacher(f"t{i}", folder / f"t{i}", folder / "stores" / f"t{i}", slices=2)
    write_prompts(folder / "prompts.jsonl", count=SAMPLES, domains=tuple(DOMAINS))
    whole = make_run(folder, "undisturbed")
    process = start(whole)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output[-3000:]
    wanted = committed(whole)
    assert len(wanted) == SAMPLES
    victim = make_run(folder, "victim")
    landed = survived = 0
    for _ in range(kills):
        before = committed(victim)
        if is_sealed(victim.hidden_cache(0)):  # it got through: start over with a new run
            shutil.rmtree(victim.path)
            victim, before = make_run(folder, "victim"), {}
        generation = victim.current_generation()
        process = start(victim)
        if draw.random() < 0.8:
            wait_for_work(process, victim, generation)
            time.sleep(draw.random() * 1.5)
        else:
            time.sleep(draw.random() * 8)  # at start-up, too
        family = (
            psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        )
        landed += process.poll() is None
        if process.poll() is None:
            # The launcher, a rank, or all: ranks die with their launcher, the launcher ends when a
            # rank is gone.
            for doomed in draw.choice(
                [[process.pid], [p.pid for p in family[-1:]] or [process.pid]]
            ):
                os.kill(doomed, signal.SIGKILL)
        process.communicate(timeout=120)
        psutil.wait_procs(family, timeout=30)
        after = committed(victim)
        survived += len(after)
        assert before.keys() <= after.keys(), "a committed sample is gone"
        for key, rows_NE in after.items():
            assert np.array_equal(rows_NE, wanted[key]), (
                "a committed sample is not what its teacher says"
            )
    process = start(victim)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0 and is_sealed(victim.hidden_cache(0)), output[-3000:]
    found = committed(victim)
    assert found.keys() == wanted.keys() and all(
        np.array_equal(found[k], wanted[k]) for k in wanted
    )
    return (
        f"streaming pass: {kills} SIGKILLs ({landed} of running processes), {survived} committed "
        "samples seen after "
        f"kills, all intact; the last run finished with the {SAMPLES} samples of an undisturbed one"
    )


if __name__ == "__main__":
    common.main(__doc__, run, kills=20)
