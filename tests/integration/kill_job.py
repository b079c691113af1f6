"""SIGKILL at random instants of a whole consolidation: `python -m tests.integration.kill_job
--kills 30`.

Four ranks at tp2pp2.  A random rank, now and then the launcher, is killed in a chosen phase or at
any moment; the job must be down within a minute and say which rank it was; then the same command is
given again.  However often: the exported weights are those of the run that was never disturbed, bit
for bit.  Nothing is left behind: no process, no listening port, no lock, no temporary file.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from mtopd.run_dir import SEAL, RunDir, is_sealed
from tests.integration.test_kill_and_resume import (
    NUM_ITERATIONS,
    assert_nothing_left,
    finish,
    make_workplace,
    rank_processes,
    start,
)
from tests.support import kills as common

# In the order of the loop; a line is written when a phase ends.
PHASES = ("rollout", "teacher_pass", "train", "update_weights", "checkpoint", "evaluation")
# What kills aim at, in this order, then any instant; one that comes late hits the phase after.
TARGETS = (
    "rollout",
    "teacher_pass",
    "train",
    "checkpoint",
    "export",
    "update_weights",
    "evaluation",
)
DOWN_S = 60.0
OVERRIDES = ("checkpoint.every=1", "rollout.prompts_per_iteration=96", "evaluation.every=1")


def lines(run: Path, generation: int | None = None) -> list[dict[str, Any]]:
    """Phase lines of a start (all starts: None); half a last line is not there yet."""
    path = run / "metrics.jsonl"
    found = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line["kind"].startswith("phase/") and generation in (
            None,
            int(line["part"].split()[-1]),
        ):
            found.append({**line, "phase": line["kind"].removeprefix("phase/")})
    return found


def phase_now(run: Path, generation: int) -> str:
    """What a start is doing, by the last phase it has finished."""
    done = lines(run, generation)
    if not done:
        return "start-up"
    last = done[-1]
    if last["phase"] == "evaluation":
        return "export" if last["iteration"] == NUM_ITERATIONS else "rollout"
    return PHASES[PHASES.index(last["phase"]) + 1]


def wait_for(process: subprocess.Popen[str], run: RunDir, generation: int, phase: str) -> None:
    """Until the next start after ``generation`` is in the phase, or ends."""
    deadline = time.monotonic() + 180
    while process.poll() is None:
        assert time.monotonic() < deadline, f"phase {phase} was never seen"
        if (
            run.current_generation() > generation
            and phase_now(run.path, run.current_generation()) == phase
        ):
            return
        time.sleep(0.005)


def listening() -> dict[int, int]:
    """Every TCP port somebody listens on, by the inode of its socket, which no later socket shares
    while it lives.
    """
    found = {}
    for table in Path("/proc/net").glob("tcp*"):
        for line in table.read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A":
                found[int(inode)] = int(local.rpartition(":")[2], 16)
    return found


def family_of(launcher: int) -> list[psutil.Process]:
    """The launcher and all its descendants, as far as they live."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(launcher)
        return [process, *process.children(recursive=True)]
    return []


def ports_of(processes: list[psutil.Process]) -> dict[int, int]:
    """The part of ``listening`` that these processes hold open."""
    held = set()
    for process in processes:
        with contextlib.suppress(OSError):  # it may end, and close files, meanwhile
            for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    held.add(os.readlink(descriptor))
    return {inode: port for inode, port in listening().items() if f"socket:[{inode}]" in held}


def kill_once(
    root: Path, run: RunDir, phase: str | None, duration: float, draw: random.Random
) -> str | None:
    """Start, kill, wait; the phase that was hit, or None when the job was through before."""
    generation = run.current_generation() if run.path.exists() else 0
    process = start(root, run.path, *OVERRIDES)
    wait = draw.random() * duration
    if phase is None:
        time.sleep(wait)
        wait = 0.0
    else:
        wait_for(process, run, generation, phase)
    # Before the rest of the waiting: some phases are as short as looking these up.
    everything, family = family_of(process.pid), rank_processes(process.pid)
    ports = ports_of(everything)
    time.sleep(wait)
    hit = phase_now(run.path, run.current_generation()) if len(family) == 4 else "start-up"
    if process.poll() is not None or is_sealed(run.export(NUM_ITERATIONS)):
        code, output = finish(process)
        assert code == 0, output
        return None
    assert ports or hit == "start-up", "a job of four ranks listens for them"
    launcher = not family or draw.random() < 0.15
    doomed = process.pid if launcher else draw.choice(family).pid
    with contextlib.suppress(ProcessLookupError):
        os.kill(doomed, signal.SIGKILL)
    code, output = finish(process, timeout=DOWN_S)  # which fails when the job is not down by then
    if not launcher:
        assert code == 2 and re.search(r"rank \d was killed by SIGKILL", output), output
        assert output.count("error:") == 1, output
    assert_nothing_left(run.path, everything)
    left = ports.keys() & listening().keys()  # whoever holds them now
    assert not left, f"still listened on: {sorted(ports[inode] for inode in left)}"
    return hit


def run(kills: int, folder: Path, seed: int) -> str:
    """Kill ``kills`` times; one line of results.  Raises AssertionError on any violation."""
    draw = random.Random(seed)
    make_workplace(folder)
    whole = RunDir(folder / "undisturbed")
    began = time.monotonic()
    code, output = finish(start(folder, whole.path, *OVERRIDES))
    assert code == 0, output
    wall = time.monotonic() - began
    seconds = {
        phase: [x["wall_s"] for x in lines(whole.path) if x["phase"] == phase] for phase in PHASES
    }
    # The shortest of each, so that a kill seldom comes too late.
    durations: dict[str | None, float] = {phase: min(values) for phase, values in seconds.items()}
    evaluated, exported = whole.evaluation(NUM_ITERATIONS), whole.export(NUM_ITERATIONS) / SEAL
    durations["export"] = exported.stat().st_mtime - evaluated.stat().st_mtime
    durations[None] = wall

    hits: Counter[str] = Counter()
    compared = 0
    victim = RunDir(folder / "victim")
    targets = [*TARGETS, None]
    while hits.total() < kills:
        phase = targets[hits.total() % len(targets)]
        hit = kill_once(folder, victim, phase, durations[phase], draw)
        if hit is not None:
            hits[hit] += 1
            print(f"kill {hits.total()}: {hit}", flush=True)
            continue
        common.check_same_weights(victim, whole, NUM_ITERATIONS)
        compared += 1
        shutil.rmtree(victim.path)
    code, output = finish(start(folder, victim.path, *OVERRIDES))
    assert code == 0, output
    common.check_same_weights(victim, whole, NUM_ITERATIONS)
    compared += 1
    told = ", ".join(f"{count} in {phase}" for phase, count in hits.most_common())
    return (
        f"whole job: {hits.total()} SIGKILLs ({told}); {compared} runs finished, all with the "
        "weights of an "
        "undisturbed one"
    )


if __name__ == "__main__":
    common.main(__doc__, run, kills=30)
