"""Rollouts that stand still while servers get other weights, and go on with them; a run whose next
rollout goes on while it trains, killed in the middle of that and started again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mtopd.rollout.background import Background
from mtopd.rollout.engine import Sampling
from mtopd.rollout.memory_log import MemoryLog, OpenResponse
from mtopd.rollout.token_log import logs_before, recover
from mtopd.run_dir import RunDir, is_sealed
from mtopd.trajectories import TokenStore
from tests.sglang.answers import requests
from tests.sglang.conftest import EngineUnderTest, Place
from tests.sglang.test_main_loop import lines_of, start, workplace  # noqa: F401 - a fixture
from tests.support.sglang_servers import RunningServer

pytestmark = pytest.mark.timeout(900)  # minutes of imports where other work goes on
COUNT = 48
OVERLAP = (
    "rollout.overlap=one_step",
    "rollout.max_staleness=1",
    "rollout.open_per_server=2",  # a rollout takes longer than a teacher pass and its train steps
    "rollout.batch_size=4",
    "evaluation.every=1",  # by the same servers, while the rollout stands still
    "evaluation.baselines_at_end=false",
    "checkpoint.every=1",
    "checkpoint.export_every=1",
    "student.parallel={tp: 2}",
)
EARLY = (
    "rollout.open_per_server=2",
    "rollout.batch_size=4",
    "evaluation.baselines_at_end=false",
    "student.parallel={tp: 2}",
)
Known = dict[int, OpenResponse]


@pytest.fixture
def narrow(place: Place, servers: list[RunningServer]) -> Iterator[EngineUnderTest]:
    """Most requests wait while some are answered."""
    engine = EngineUnderTest(place, [server.url for server in servers], most_open=4)
    yield engine
    engine.close()


def test_a_rollout_stands_still_while_servers_get_other_weights(
    narrow: EngineUnderTest, place: Place
) -> None:
    """Twice, while it is asked in a thread; between, held-out prompts are answered.  Each token has the
    log-prob of the weights that its span names.
    """
    engine, asked = narrow, requests(place, 48)
    log, found = MemoryLog("rollout"), {}
    sampling = Sampling(40, min_response=40, seed=5)
    engine.give(place.student, "run/1/0")

    def work(thread: Background) -> None:
        while True:
            waiting = [request for request in asked if request.sample_id not in found]
            for response in engine.generate(waiting, log, sampling):
                found[response.sample_id] = response
            if not thread.halt():
                break

    background = Background(work, "rollout")
    for number, folder in enumerate((place.other, place.student), start=1):
        before = len(found)
        deadline = time.monotonic() + 200
        while len(found) == before and time.monotonic() < deadline:
            time.sleep(0.01)
        background.pause(engine.pause)
        engine.resume()
        done = len(found)
        engine.give(folder, f"run/1/{number}")
        held_out = list(engine.generate(asked[:4], MemoryLog("held out"), Sampling(4)))
        assert {span for response in held_out for span in response.version_spans} == {(0, number)}
        assert len(found) == done < len(asked)
        background.resume()
    background.join()
    assert sorted(found) == [*range(len(asked))]
    folders = {0: place.student, 1: place.other, 2: place.student}
    of_student: set[int] = set()
    sequences = [
        [*map(int, r.prompt_ids), *found[r.sample_id].response_ids.tolist()] for r in asked
    ]
    known = {folder: place.log_probs(folder, sequences) for folder in set(folders.values())}
    for request in asked:
        response = found[request.sample_id]
        ends = [first for first, _ in response.version_spans[1:]]
        for (first, version), end in zip(response.version_spans, [*ends, 40], strict=True):
            expected = known[folders[version]][request.sample_id][len(request.prompt_ids) - 1 :]
            difference = np.abs(response.log_probs - expected)[first:end]
            assert difference.max() < 1e-5, (request.sample_id, version)
            of_student.add(version)
    assert of_student == {0, 1, 2}
    assert any(len(response.version_spans) > 1 for response in found.values())


def kill_in_overlap(process: subprocess.Popen[str], run: RunDir) -> Known:
    """SIGKILL once iteration 0 is trained and iteration 1 has tokens; what is logged of the latter."""
    metrics, logs = run.metrics, run.token_logs(1)
    deadline = time.monotonic() + 500
    while not (
        metrics.exists()
        and '"kind": "train_step"' in metrics.read_text()
        and sum(path.stat().st_size for path in logs.glob("*.bin")) > 3000
    ):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not is_sealed(run.trajectories(1)), "the rollout was through before the kill"
    time.sleep(1)  # its ranks die with it
    found = recover(logs_before(logs, 99), run=run.id, unsealed=range(COUNT))
    return found.responses


def test_rollouts_go_on_while_the_run_trains_and_after_a_kill(
    workplace: Path,  # noqa: F811
    tmp_path: Path,
    servers: list[RunningServer],
    place: Place,
) -> None:
    run, urls = RunDir(tmp_path / "run"), [server.url for server in servers]
    known = kill_in_overlap(start(workplace, run.path, urls, *OVERLAP), run)
    shards = {p: p.stat().st_mtime_ns for p in run.trajectories(1).glob("*.sealed.json")}
    process = start(workplace, run.path, urls, *OVERLAP)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said

    store = TokenStore(run.trajectories(1))
    assert sorted(store.samples) == [*range(COUNT)], "lost or twice"
    for path, mtime in shards.items():
        assert path.stat().st_mtime_ns == mtime, "sealed answers were asked for again"
    assert sum(response.length for response in known.values()) > 100
    for sample_id, response in known.items():
        fields, count = store.tokens(sample_id), response.length
        held = response.held()
        assert fields.response_ids[:count].tolist() == held.response_ids.tolist(), "drawn again"
        assert fields.rollout_log_probs[:count].tolist() == held.log_probs.tolist()
        assert set(fields.versions()[:count].tolist()) <= {0}

    counted = check_versions(store, place, {0: workplace / "student", 1: run.export(1)})
    # Sampled before the student's training had ended; whether some were left to the next one is chance.
    assert counted[0] > 0, counted
    line = lines_of(run.path, "staleness")[-1]
    assert (line["iteration"], line["oldest"], line["tokens_masked"]) == (1, 1, 0)
    assert line["tokens"] == {str(1 - version): n for version, n in counted.items() if n}
    kl = [line["reverse_kl"] for line in lines_of(run.path, "train_step")]
    assert len({line["step"] for line in lines_of(run.path, "train_step")}) == 4
    assert kl[-1] < 0.9 * kl[0], kl
    evaluated = sorted(path.stem for path in (run.path / "evaluations").glob("0*.json"))
    assert evaluated == [f"{number:06d}" for number in range(3)]
    assert len([x for x in lines_of(run.path, "rollout") if x["iteration"] == 0]) == 1


def test_teachers_read_while_servers_answer(
    workplace: Path,  # noqa: F811
    tmp_path: Path,
    servers: list[RunningServer],
) -> None:
    """The student comes out bit for bit as it does when teachers wait for the last answer."""
    urls = [server.url for server in servers]
    exports = []
    for overlaps in (True, False):
        run = RunDir(tmp_path / str(overlaps))
        overrides = [*EARLY, f"rollout.overlap_teacher_pass={json.dumps(overlaps)}"]
        process = start(workplace, run.path, urls, *overrides)
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0, said
        exports.append(load_file(run.export(2) / "model.safetensors"))
        passes = lines_of(run.path, "teacher_pass")
        early = [line for line in passes if "quarters" in line["part"]]
        hidden_s = [v.get("hidden_s") or 0 for line in early for v in line["teachers"].values()]
        assert (sum(hidden_s) > 0) is overlaps, passes
        read = [v["samples"] for line in passes for v in line["teachers"].values()]
        assert sum(read) == 2 * COUNT, "each sample once in each of the iterations"
    early_student, late_student = exports
    assert early_student.keys() == late_student.keys()
    for name, tensor in late_student.items():
        assert torch.equal(early_student[name], tensor), name


def check_versions(store: TokenStore, place: Place, students: dict[int, Path]) -> dict[int, int]:
    """Each token's log-prob is that of the student it names, and not the other's; tokens by student."""
    sequences, firsts = [], {}
    for sample_id in store.samples:
        fields = store.tokens(sample_id)
        sequences.append([*fields.prompt_ids.tolist(), *fields.response_ids.tolist()])
        firsts[sample_id] = len(fields.prompt_ids) - 1
    counted, apart = dict.fromkeys(students, 0), 0.0
    for version, folder in students.items():
        known = place.log_probs(folder, sequences)
        for sample_id, log_probs in zip(store.samples, known, strict=True):
            fields, versions = store.tokens(sample_id), store.tokens(sample_id).versions()
            assert set(versions.tolist()) <= {*students}
            difference = np.abs(fields.rollout_log_probs - log_probs[firsts[sample_id] :])
            is_own = versions == version
            assert difference[is_own].max(initial=0) < 1e-5, (sample_id, version)
            apart = max(apart, difference[~is_own].max(initial=0))
            counted[version] += int(is_own.sum())
    assert apart > 1e-3, "the students cannot be told apart"
    return counted
