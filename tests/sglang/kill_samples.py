"""What `kill_rollouts` compares: the samples of a run, and what its logs and shards hold of them."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass

import numpy as np

from mtopd.rollout.engine import Request, Sampling
from mtopd.rollout.sglang import draw_seed
from mtopd.rollout.token_log import read_log
from mtopd.run_dir import RunDir, is_sealed
from mtopd.trajectories import TokenStore

NUM_ITERATIONS, SAMPLES, MAX_RESPONSE = 3, 48, 48


@dataclass(frozen=True)
class Sample:
    """One of the undisturbed run."""

    prompt_ids: list[int]
    response_ids: list[int]
    log_probs: np.ndarray  # [T]
    finish_reason: str


Samples = dict[tuple[int, int], Sample]  # by iteration and sample id


class Kept:
    """A run's trajectories, linked before the run removes them."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self._folder = run.path.with_name(run.path.name + "-kept")
        self._folder.mkdir()

    def keep(self) -> None:
        for number in range(NUM_ITERATIONS):
            source, target = self.run.trajectories(number), self._folder / str(number)
            if is_sealed(source) and not target.exists():
                shutil.copytree(source, target, copy_function=os.link)

    def samples(self) -> Samples:
        """All, each once."""
        found: Samples = {}
        for number in range(NUM_ITERATIONS):
            store = TokenStore(self._folder / str(number))
            ids = store.metadata.column("sample_id").to_pylist()
            assert sorted(ids) == list(range(SAMPLES)), f"iteration {number} has samples {ids}"
            reasons = store.metadata.column("finish_reason").to_pylist()
            for sample_id, reason in zip(ids, reasons, strict=True):
                tokens = store.tokens(sample_id)
                found[number, sample_id] = Sample(
                    tokens.prompt_ids.tolist(),
                    tokens.response_ids.tolist(),
                    np.array(tokens.rollout_log_probs),
                    reason,
                )
        return found


def check_same_samples(found: Samples, wanted: Samples) -> None:
    for name, sample in wanted.items():
        other = found[name]
        assert other.prompt_ids == sample.prompt_ids, name
        assert other.response_ids == sample.response_ids, name
        assert other.finish_reason == sample.finish_reason, name
        assert np.abs(other.log_probs - sample.log_probs).max() < 1e-5, name


def seeds_of(run: RunDir, samples: Samples) -> dict[int, tuple[int, int]]:
    """Which sample is drawn from a seed, as servers are told."""
    found = {}
    for number in range(NUM_ITERATIONS):
        store = TokenStore(run.path.with_name(run.path.name + "-kept") / str(number))
        columns = store.metadata.select(["sample_id", "prompt_id"]).to_pylist()
        assert len({row["prompt_id"] for row in columns}) == SAMPLES, "one sample a prompt"
        for row in columns:
            request = Request(row["sample_id"], row["prompt_id"], (), iteration=number)
            seed = draw_seed(Sampling(MAX_RESPONSE, seed=0), request)
            found[seed] = (number, row["sample_id"])
    assert len(found) == len(samples)
    return found


def tokens_kept(run: RunDir, wanted: Samples) -> dict[tuple[int, int], int]:
    """How many tokens of each sample logs and sealed shards hold.  Each is the undisturbed run's, and in
    one log.
    """
    held: dict[tuple[int, int], int] = {}
    for number in range(NUM_ITERATIONS):
        folder = run.trajectories(number)
        if is_sealed(folder):  # whose logs are removed
            held |= {name: len(s.response_ids) for name, s in wanted.items() if name[0] == number}
            continue
        logged: dict[int, int] = {}
        for path in sorted(run.token_logs(number).glob("log-*.bin")):
            for record in read_log(path).records:
                sample = wanted[number, record.sample_id]
                assert record.start == logged.get(record.sample_id, 0), (
                    f"{path.name}: tokens {record.start} on of sample {record.sample_id}, of which "
                    f"{logged.get(record.sample_id, 0)} were logged"
                )
                ids = np.frombuffer(record.ids, "<i4").tolist()
                stop = record.start + len(ids)
                assert ids == sample.response_ids[record.start : stop], (path, record.sample_id)
                is_over = stop == len(sample.response_ids)
                assert record.finish_reason in (sample.finish_reason if is_over else None, None)
                logged[record.sample_id] = stop
        held |= {(number, sample_id): count for sample_id, count in logged.items()}
        if any(folder.glob("*.sealed.json")):
            for sample_id in TokenStore(folder).metadata.column("sample_id").to_pylist():
                held[number, sample_id] = len(wanted[number, sample_id].response_ids)
    return held
