"""Each phase alone from the files the previous one left: same trajectories, same cache, same
student.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from mtopd.hidden_cache import HiddenCacheReader
from mtopd.megatron import checkpoint
from mtopd.run_dir import RunDir, is_sealed
from tests.conftest import REPOSITORY
from tests.integration.test_kill_and_resume import start, workplace  # noqa: F401 - a fixture

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(600),
    # A checkpoint is read by one process.
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]
# What a start of its own has otherwise: seconds, and no small heads in memory yet.
SECONDS = (
    *("wall_s", "tokens_per_s", "positions_per_s", "stall_s", "statistics_s"),
    "head_bytes_read",
)
BASELINES = {"base": "student", "t0": "t0"}  # folder of each in the workplace
LAST = 3  # the iteration whose files a finished run keeps


def mtopd(*arguments: str) -> str:
    command = [sys.executable, "-m", "mtopd.pipelines.cli", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_phases_replay_from_files(
    workplace: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(workplace / "cache"))
    run = RunDir(workplace / "alone")
    folders = ", ".join(f"{n}: {workplace / folder}" for n, folder in BASELINES.items())
    process = start(
        workplace,
        run.path,
        *("--log-json", "checkpoint.every=1", "checkpoint.keep=3"),
        f"evaluation.baselines={{{folders}}}",
        "evaluation.weight_average=[base, t0]",
    )
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    steps = train_steps(output)
    assert len(steps) == len({line["step"] for line in steps}) > LAST
    assert "worst recovery" in errors, "the table of the report is not among the lines"
    states = rows_of(run)
    shards = {p.name: pq.read_table(p) for p in run.trajectories(LAST).glob("*.parquet")}
    check_baselines(run, output, errors)
    read = sum(
        prompt_len + response_len - 1  # the last token is predicted alone
        for table in shards.values()
        for prompt_len, response_len in zip(
            *(table[name].to_pylist() for name in ("prompt_len", "response_len")), strict=True
        )
    )
    assert read == sum(line["positions"] for line in steps if line["iteration"] == LAST)
    final = checkpoint_tensors(run, LAST + 1)
    assert checkpoint.sealed(run) == [2, 3, 4], (
        "the last `keep` of checkpoints 1 to 4, older ones go"
    )
    assert [path.name for path in (run.path / "iterations").iterdir()] == [f"{LAST:06d}"]

    assert is_sealed(run.hidden_cache(LAST))
    shutil.rmtree(run.iteration(LAST))
    shutil.rmtree(run.checkpoint(LAST + 1))
    mtopd("rollout", str(run.path), "--iteration", str(LAST))
    replayed = {p.name: pq.read_table(p) for p in run.trajectories(LAST).glob("*.parquet")}
    assert replayed.keys() == shards.keys() and all(
        replayed[n].equals(t) for n, t in shards.items()
    )

    mtopd("teacher-pass", str(run.path), "--iteration", str(LAST))
    assert all(np.array_equal(a, b) for a, b in zip(states, rows_of(run), strict=True))

    damage_one_entry(run)  # found when the cache is checked, computed again, never read as zeros
    mtopd("teacher-pass", str(run.path), "--iteration", str(LAST))
    again = train_steps(mtopd("train", str(run.path), "--iteration", str(LAST), "--log-json"))
    last = [line for line in steps if line["iteration"] == LAST]
    for line in (*again, *last):
        for name in SECONDS:
            del line[name]
    assert again == last and all(line["kl_noise_floor"] for line in again), (
        "the floors are those of the first start"
    )
    found, before = checkpoint_tensors(run, LAST + 1), checkpoint_tensors(run, LAST)
    assert found.keys() == final.keys()
    for name, tensor in final.items():
        assert torch.equal(found[name], tensor), name
    exported = load_file(run.export(LAST + 1) / "model.safetensors")
    weights = [name for name in final if not name.startswith(("optimizer.", "rng_"))]
    assert sum(final[name].numel() for name in weights) >= sum(
        tensor.numel() for tensor in exported.values()
    )
    for prefix in ("", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq."):
        same = [
            name for name in weights if torch.equal(final[prefix + name], before[prefix + name])
        ]
        assert not same, (
            f"a train step moves every weight and its moments, but not {prefix}{same[0]}"
        )


def check_baselines(run: RunDir, output: str, errors: str) -> None:
    """They come last, are named while they are evaluated, and are known to the verb."""
    lines = [json.loads(text) for text in output.splitlines()]
    kinds = [line["kind"] for line in lines]
    names = [*BASELINES, "weight average"]
    assert [line["part"] for line in lines if line["kind"] == "baseline"] == names
    assert kinds.index("baseline") > max(
        i for i, kind in enumerate(kinds) if kind in ("train_step", "evaluation")
    )
    assert f"baseline t0 (2 of {len(names)}) ..." in errors
    again = mtopd("evaluate", str(run.path), "--baselines", "--log-json")
    known = [line for line in map(json.loads, again.splitlines()) if line["kind"] == "baseline"]
    assert [line["kept"] for line in known] == [True] * len(names)
    before = [line for line in lines if line["kind"] == "baseline"]
    assert [line["accuracy"] for line in known] == [line["accuracy"] for line in before]

    # The student that the run began with is the first baseline: the same draws, the same numbers.
    mtopd("evaluate", str(run.path), "--iteration", "0", "--log-json")
    accuracy = json.loads(run.evaluation(0).read_text())
    assert accuracy == before[0]["accuracy"]


def train_steps(output: str) -> list[dict[str, Any]]:
    """With --log-json there is nothing but lines of JSON on standard output."""
    return [line for line in map(json.loads, output.splitlines()) if line["kind"] == "train_step"]


def rows_of(run: RunDir) -> list[np.ndarray]:
    """All cached rows as zarr-python reads them, in the order of the samples."""
    segments = {
        p.parent.name: zarr.open(p.parent, mode="r")
        for p in run.hidden_cache(LAST).glob("t/*/seg/*/zarr.json")
    }
    assert segments
    with HiddenCacheReader(run.hidden_cache(LAST)) as reader:
        entries = sorted(
            (copies[0] for copies in reader._copies.values()), key=lambda e: e.row_key.sample_id
        )
        return [
            np.asarray(segments[e.sample.segment][e.sample.row : e.sample.row + e.n_tokens])
            for e in entries
        ]


def checkpoint_tensors(run: RunDir, iteration: int) -> dict[str, torch.Tensor]:
    """Weights and optimizer state, whole as Megatron's names have them, and each rank's random
    state.
    """
    folder = run.checkpoint(iteration)
    reader = FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.full(e.size, torch.nan, dtype=e.properties.dtype) for name, e in entries.items()
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    of_ranks = {
        f"{p.stem}.{n}": t
        for p in sorted(folder.glob("rng_*.safetensors"))
        for n, t in load_file(p).items()
    }
    assert len(of_ranks) >= 4
    return {**tensors, **of_ranks}


def damage_one_entry(run: RunDir) -> None:
    shard = sorted(run.hidden_cache(LAST).glob("t/*/seg/*/c/0/0"))[0]
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
