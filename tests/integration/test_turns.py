"""Rollouts of several turns from the command line: config, environment, kill, resume, report."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from mtopd.convert.teacher import add_teacher
from mtopd.rollout.memory_log import sample_of, turn_of
from mtopd.rollout.token_log import read_log
from mtopd.run_dir import RunDir, is_sealed
from mtopd.trajectories import TokenStore
from tests.conftest import REPOSITORY
from tests.environments import calls_in
from tests.integration.test_kill_and_resume import (
    assert_nothing_left,
    finish,
    kill_when,
    save_ending_model,
    start,
)
from tests.small_models import write_prompts

pytestmark = pytest.mark.integration
SAMPLES = 48


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two ranks, each answers batches of 16; a source with an environment and one without."""
    save_ending_model(tmp_path / "student", seed=1)
    save_ending_model(tmp_path / "teacher", seed=2)
    add_teacher("t", tmp_path / "teacher", tmp_path / "store", slices=1)
    prompts = str(write_prompts(tmp_path / "prompts.jsonl", count=40))
    environment = {"python": "tests.environments:slow", "max_turns": 4, "threads": 2}
    config = {
        "student": {"model": str(tmp_path / "student"), "parallel": {"dp": 2}},
        "teachers": [{"name": "t", "store": str(tmp_path / "store"), "route": {}}],
        "data": {
            "sources": [
                {
                    "name": "letters",
                    "path": prompts,
                    "eval_path": prompts,
                    "environment": environment,
                },
                {"name": "plain", "path": prompts},
            ],
            "context_length": 104,
            "max_response": 72,
        },
        "rollout": {"prompts_per_iteration": SAMPLES, "batch_size": 16},
        "train": {"num_iterations": 2, "micro_batch_size": 8, "optimizer": {"lr": 1e-3}},
        "checkpoint": {"every": 2},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    # An environment is an installed one: ranks do not look into the folder they start in.
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    return tmp_path


def replied(run: RunDir) -> set[str]:
    """Turns whose replies are in the logs of iteration 0, as the environment names them."""
    return {
        f"{run.id}/0/{sample_of(record.sample_id)} {turn_of(record.sample_id)}"
        for path in run.token_logs(0).glob("log-*.bin")
        for record in read_log(path).records
        if record.reply
    }


def rollout_lines(run: RunDir) -> list[dict[str, Any]]:
    lines = map(json.loads, run.metrics.read_text().splitlines())
    return [line for line in lines if line["kind"] == "rollout"]


@pytest.mark.timeout(900)
def test_a_killed_rollout_asks_once_a_turn_and_ends_with_the_same_weights(workplace: Path) -> None:
    calls = workplace / "calls"
    whole = RunDir(workplace / "undisturbed")
    code, output = finish(start(workplace, whole.path), timeout=400)
    assert code == 0, output
    undisturbed = [name for name in calls_in(calls) if not name.startswith("evaluation")]
    assert len({*undisturbed}) == len(undisturbed), "once a turn"
    check_trajectories(whole)
    first, second = rollout_lines(whole)
    assert first["environment_calls"] + second["environment_calls"] == len(undisturbed)
    assert first["environment_s"] >= 0.05 * first["environment_calls"]
    assert first["environment_tokens"] > 0 and first["environment_errors"] > 0
    assert (
        f"iteration 0: {first['environment_errors']} responses ended because an environment"
        in output
    )
    assert "letters are too many" in output

    victim, known = RunDir(workplace / "victim"), set[str]()
    for _ in range(2):
        calls.unlink()
        process = start(workplace, victim.path)
        at_least = len(known) + 8

        def inside(at_least: int = at_least) -> bool:
            return victim.manifest.exists() and len(replied(victim)) >= at_least

        ranks = kill_when(process, inside)
        assert finish(process)[0] == 2
        assert_nothing_left(victim.path, ranks)
        assert not is_sealed(victim.trajectories(0))
        assert not known & {*calls_in(calls)}, "a reply in a log is not asked for again"
        known = replied(victim)
    calls.unlink()
    code, output = finish(start(workplace, victim.path), timeout=400)
    assert code == 0, output
    again = Counter(calls_in(calls))
    assert not known & again.keys() and max(again.values()) == 1
    wanted = load_file(whole.export(2) / "model.safetensors")
    found = load_file(victim.export(2) / "model.safetensors")
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), f"{name} differs from the undisturbed run"
    assert rollout_lines(victim)[0]["tokens"] == first["tokens"]
    assert rollout_lines(victim)[0]["environment_tokens"] == first["environment_tokens"]


def check_trajectories(run: RunDir) -> None:
    """Of the last iteration: its files stay."""
    store = TokenStore(run.trajectories(1))
    columns = ("sample_id", "prompt_id", "num_loss_tokens", "response_len", "finish_reason")
    rows = store.metadata.select(columns).to_pylist()
    assert len(rows) == SAMPLES
    for row in rows:
        mask, ids = (
            store.tokens(row["sample_id"]).loss_mask,
            store.tokens(row["sample_id"]).response_ids,
        )
        assert mask[0] == mask[-1] == 1 and len(ids) <= 72
        if row["prompt_id"].startswith("plain"):
            assert mask.all()
        # A turn ends with <eos>, what follows it up to <sep> is the environment's.
        ends = np.flatnonzero(np.diff(mask.astype(np.int8)) == -1)
        begins = np.flatnonzero(np.diff(mask.astype(np.int8)) == 1)
        assert (ids[ends] == 1).all() and (ids[begins] == 2).all()
        assert store.tokens(row["sample_id"]).rollout_log_probs[mask == 0].tolist() == [0.0] * int(
            (mask == 0).sum()
        )
    several = [row for row in rows if row["num_loss_tokens"] < row["response_len"]]
    assert len(several) > SAMPLES // 8
    assert {row["finish_reason"] for row in rows} == {"stop", "length", "environment_error"}
