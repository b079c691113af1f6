"""A run whose responses go on over the ends of iterations, killed in the middle of its second rollout and
started again.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mtopd.files import read_json
from mtopd.rollout.memory_log import OpenResponse
from mtopd.rollout.token_log import logs_before, recover
from mtopd.run_dir import RunDir, is_sealed
from mtopd.trajectories import TokenStore
from tests.conftest import REPOSITORY
from tests.sglang.conftest import Place
from tests.sglang.test_main_loop import lines_of, start, workplace  # noqa: F401 - a fixture
from tests.sglang.test_overlap import check_versions
from tests.support.sglang_servers import RunningServer

pytestmark = pytest.mark.timeout(900)  # minutes of imports where other work goes on
COUNT, OPEN, ITERATIONS = 48, 12, 3
PARTIAL = (
    f"rollout.carry_over={OPEN}",
    "rollout.max_staleness=1",
    "rollout.batch_size=4",
    "rollout.open_per_server=8",  # most wait while some are answered
    f"train.num_iterations={ITERATIONS}",
    "evaluation.every=1",  # by the same servers, between two rollouts
    "evaluation.baselines_at_end=false",
    "checkpoint.every=1",
    "checkpoint.export_every=1",
    "student.parallel={tp: 2}",
)
Known = dict[int, OpenResponse]


def finish(process: subprocess.Popen[str], run: RunDir, kept: Path) -> str:
    """All that the run says; its trajectories are linked before it removes them."""
    is_over = threading.Event()

    def keep() -> None:
        while not is_over.wait(0.05):
            for number in range(ITERATIONS):
                source, target = run.trajectories(number), kept / str(number)
                if is_sealed(source) and not target.exists():
                    shutil.copytree(source, target, copy_function=os.link)

    thread = threading.Thread(target=keep)
    thread.start()
    said, _ = process.communicate(timeout=800)
    time.sleep(0.2)
    is_over.set()
    thread.join()
    return said


def kill_in_the_second_rollout(process: subprocess.Popen[str], run: RunDir) -> Known:
    """SIGKILL once iteration 1 has tokens of its own; what is logged of it then."""
    logs = run.token_logs(1)
    deadline = time.monotonic() + 500
    while sum(p.stat().st_size for p in logs.glob("log-000001-*.bin")) < 3000:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not is_sealed(run.trajectories(1)), "the rollout was through before the kill"
    time.sleep(1)  # its ranks die with it
    samples = range(ITERATIONS * COUNT)
    return recover(logs_before(logs, 99), run=run.id, unsealed=samples).responses


def verb(*arguments: str) -> str:
    """What a verb of the command line says; it must end well."""
    command = [sys.executable, "-m", "mtopd.pipelines.cli", *arguments]
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def test_responses_go_on_in_the_next_iteration_and_after_a_kill(
    workplace: Path,  # noqa: F811
    tmp_path: Path,
    servers: list[RunningServer],
    place: Place,
) -> None:
    run, urls = RunDir(tmp_path / "run"), [server.url for server in servers]
    kept = tmp_path / "kept"
    known = kill_in_the_second_rollout(start(workplace, run.path, urls, *PARTIAL), run)
    shutil.copytree(run.trajectories(0), kept / "0")
    verb("rollout", str(run.path))  # alone; of iteration 1, unless its checkpoint was not there yet
    assert is_sealed(run.trajectories(1)) == is_sealed(run.checkpoint(1))
    process = start(workplace, run.path, urls, *PARTIAL)
    said = finish(process, run, kept)
    assert process.returncode == 0, said

    stores = [TokenStore(kept / str(number)) for number in range(ITERATIONS)]
    assert [len(store.samples) for store in stores] == [COUNT] * ITERATIONS
    ended_in = {i: number for number, store in enumerate(stores) for i in store.samples}
    assert sorted(ended_in) == [*range(ITERATIONS * COUNT)], "dropped, or twice"
    assert any(versions[0][1] == 0 for versions in (r.spans for r in known.values()) if versions)
    for sample_id, response in known.items():
        fields, held = stores[ended_in[sample_id]].tokens(sample_id), response.held()
        count = response.length
        assert fields.response_ids[:count].tolist() == held.response_ids.tolist(), "drawn again"
        assert fields.rollout_log_probs[:count].tolist() == held.log_probs.tolist()

    students = {0: workplace / "student", 1: run.export(1), 2: run.export(2)}
    older = 0
    for number, store in enumerate(stores):
        counted = check_versions(store, place, students)
        assert all(version <= number for version, count in counted.items() if count)
        older += sum(count for version, count in counted.items() if version < number)
    assert older > 0, "nothing went on with other weights"
    rollouts = {line["iteration"]: line for line in lines_of(run.path, "rollout")}
    assert [rollouts[number]["open_samples"] for number in range(ITERATIONS)] == [OPEN, OPEN, 0]
    assert [rollouts[number]["carried_samples"] for number in range(ITERATIONS)] == [0, OPEN, OPEN]
    assert rollouts[1]["carried_tokens"] == rollouts[0]["open_tokens"] > 0
    kl = [line["reverse_kl"] for line in lines_of(run.path, "train_step")]
    assert kl[-1] < 0.9 * kl[0], kl
    verb("report", str(run.path))
    assert read_json(run.path / "report.json")["carried_over"]["samples"] == 2 * OPEN
    assert "batch-00000" in verb("trajectories", "ls", str(run.path))
    assert f"{COUNT} samples are sound" in verb("trajectories", "verify", str(run.path))
