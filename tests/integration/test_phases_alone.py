"""Each phase alone from the files the previous one left: same trajectories, same cache, same student."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from safetensors.torch import load_file

from mtopd.hidden_cache import HiddenCacheReader
from mtopd.run_dir import RunDir, is_sealed
from tests.conftest import REPOSITORY
from tests.integration.test_kill_and_resume import finish, start, workplace  # noqa: F401 - a fixture

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
LAST = 3  # the iteration whose files a finished run keeps


def mtopd(*arguments: str) -> str:
    command = [sys.executable, "-m", "mtopd.pipelines.cli", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_phases_replay_from_files(workplace: Path) -> None:  # noqa: F811
    run = RunDir(workplace / "alone")
    code, output = finish(start(workplace, run.path, "checkpoint.every=1", "checkpoint.keep=3"))
    assert code == 0, output
    states = rows_of(run)
    shards = {p.name: pq.read_table(p) for p in run.trajectories(LAST).glob("*.parquet")}
    final = checkpoint_tensors(run, LAST + 1)

    assert is_sealed(run.hidden_cache(LAST))
    shutil.rmtree(run.iteration(LAST))
    shutil.rmtree(run.checkpoint(LAST + 1))
    mtopd("rollout", str(run.path), "--iteration", str(LAST))
    again = {p.name: pq.read_table(p) for p in run.trajectories(LAST).glob("*.parquet")}
    assert again.keys() == shards.keys() and all(again[n].equals(t) for n, t in shards.items())

    mtopd("teacher-pass", str(run.path), "--iteration", str(LAST))
    assert all(np.array_equal(a, b) for a, b in zip(states, rows_of(run), strict=True))

    damage_one_entry(run)  # found when the cache is checked, computed again, never read as zeros
    mtopd("teacher-pass", str(run.path), "--iteration", str(LAST))
    mtopd("train", str(run.path), "--iteration", str(LAST))
    for name, tensor in checkpoint_tensors(run, LAST + 1).items():
        assert torch.equal(tensor, final[name]), name


def rows_of(run: RunDir) -> list[np.ndarray]:
    """All cached rows as zarr-python reads them, in the order of the samples."""
    segments = {
        p.parent.name: zarr.open(p.parent, mode="r") for p in run.hidden_cache(LAST).glob("t/*/seg/*/zarr.json")
    }
    assert segments
    with HiddenCacheReader(run.hidden_cache(LAST)) as reader:
        entries = sorted((copies[0] for copies in reader._copies.values()), key=lambda e: e.request.sample_id)
        return [np.asarray(segments[e.sample.segment][e.sample.row : e.sample.row + e.n_tokens]) for e in entries]


def checkpoint_tensors(run: RunDir, iteration: int) -> dict[str, torch.Tensor]:
    return {
        f"{p.name}:{n}": t for p in run.checkpoint(iteration).glob("*.safetensors") for n, t in load_file(p).items()
    }


def damage_one_entry(run: RunDir) -> None:
    shard = sorted(run.hidden_cache(LAST).glob("t/*/seg/*/c/0/0"))[0]
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
