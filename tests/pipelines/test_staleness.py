"""Tokens of students that are too old are left out, and what is left stands where it belongs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mtopd.metrics_lines import StalenessLine
from mtopd.pipelines import micro_batches, staleness
from mtopd.pipelines.iteration import Iteration
from mtopd.planning import plan_train_steps
from mtopd.run_dir import RunDir
from mtopd.trajectories import TokenStore, write_shard
from mtopd.types import MtopdError, Trajectory

NUMBER = 6
SPANS: dict[int, tuple[tuple[int, int], ...]] = {
    0: ((0, 6),),
    1: ((0, 5), (4, 6)),
    2: ((0, 4), (3, 5), (7, 6)),
    3: ((0, 6), (2, 4), (5, 6), (6, 5)),  # a start went on with an older student
    4: ((0, 4),),
}


def trajectory(sample_id: int, spans: tuple[tuple[int, int], ...]) -> Trajectory:
    rng = np.random.default_rng(sample_id)
    length = 9 + sample_id
    mask = rng.integers(0, 2, length)
    mask[[0, -1]] = 1
    return Trajectory(
        sample_id=sample_id,
        prompt_id=f"a/{sample_id}",
        route={},
        teacher_index=sample_id % 2,
        prompt_ids=tuple(range(1, 4 + sample_id)),
        response_ids=rng.integers(0, 100, length),
        loss_mask=mask,
        rollout_log_probs=-rng.random(length),
        student_version=spans[-1][1],
        finish_reason="length",
        version_spans=spans,
    )


@pytest.fixture(autouse=True)
def _one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("ranks") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Case:
    """An iteration with these trajectories, on one rank or one of two cp ranks."""

    def __init__(
        self, folder: Path, max_staleness: int, spans: Any = SPANS, *, cp: tuple[int, int] = (0, 1)
    ) -> None:
        write_shard(folder, "a", [trajectory(i, s) for i, s in spans.items()], generation=1)
        rollout = SimpleNamespace(max_staleness=max_staleness)
        train = SimpleNamespace(micro_batch_size=2)
        config: Any = SimpleNamespace(rollout=rollout, train=train)
        none: Any = None
        self.iteration = Iteration(NUMBER, RunDir(folder), config, none, none)
        self.iteration.__dict__["tokens"] = TokenStore(folder)
        self.iteration._cache_keys = dict.fromkeys(spans, b"key")
        self.lines: list[Any] = []
        ranks = SimpleNamespace(
            rank=0,
            world_size=1,
            dp_rank=0,
            cp_rank=cp[0],
            cp_size=cp[1],
            is_last_stage=True,
            device=torch.device("cpu"),
        )
        metrics = SimpleNamespace(write=lambda line, iteration: self.lines.append(line))
        self.session: Any = SimpleNamespace(ranks=ranks, config=config, metrics=metrics)

    def trained(self) -> dict[int, list[int]]:
        """Places of each response's tokens that are trained."""
        oldest = self.iteration.oldest_trained
        found = {}
        for sample_id in self.iteration.tokens.samples:
            fields = self.iteration.tokens.tokens(sample_id)
            versions = np.zeros(len(fields.response_ids), int)
            for start, version in fields.version_spans:
                versions[start:] = version
            found[sample_id] = np.flatnonzero(fields.loss_mask * (versions >= oldest)).tolist()
        return found


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
def test_what_is_too_old_is_no_loss_token_and_is_counted(
    tmp_path: Path, max_staleness: int
) -> None:
    case = Case(tmp_path, max_staleness)
    fresh = staleness.fresh_samples(case.session, case.iteration)
    trained = case.trained()
    assert {s.sample_id: s.num_loss_tokens for s in fresh} == {
        i: len(places) for i, places in trained.items()
    }
    assert [s.sample_id for s in fresh] == [*SPANS], "every response stays"
    (line,) = case.lines
    assert isinstance(line, StalenessLine)
    whole = sum(s.num_loss_tokens for s in case.iteration.samples)
    ages = {int(age): count for age, count in line.tokens.items()}
    assert sum(ages.values()) == whole and set(ages) == {0, 1, 2} and line.oldest == 2
    assert line.mean == pytest.approx(sum(a * n for a, n in ages.items()) / whole)
    masked = sum(count for age, count in ages.items() if age > max_staleness)
    assert line.tokens_masked == masked == whole - sum(map(len, trained.values()))
    assert (masked > 0) == (max_staleness < 2)


def test_of_the_newest_student_alone_nothing_is_said_or_looked_at(tmp_path: Path) -> None:
    case = Case(tmp_path, 0, dict.fromkeys(range(3), ((0, NUMBER),)))
    assert staleness.fresh_samples(case.session, case.iteration) == case.iteration.samples
    assert case.lines == [] and case.iteration.tokens._fields == {}


def test_where_no_token_is_left_it_is_an_error(tmp_path: Path) -> None:
    case = Case(tmp_path, 1, dict.fromkeys(range(3), ((0, 3), (2, 4))))
    said = r"max_staleness 1 leaves none of \d+ tokens .* iteration 6: students before 5 sampled"
    with pytest.raises(MtopdError, match=said):
        staleness.fresh_samples(case.session, case.iteration)


@pytest.mark.parametrize("cp_size", [1, 2])
def test_loss_rows_meet_the_cached_rows_of_their_own_tokens(tmp_path: Path, cp_size: int) -> None:
    """The cache has the rows of all loss tokens; each loss row takes that of its own, and its label."""
    found: dict[int, list[int]] = {i: [] for i in SPANS}
    for cp_rank in range(cp_size):
        folder = tmp_path / f"{cp_rank}"
        case = Case(folder, 1, cp=(cp_rank, cp_size))
        session, iteration = case.session, case.iteration
        (plan,) = plan_train_steps(
            staleness.fresh_samples(session, iteration),
            num_train_steps=1,
            teacher_weights=[1.0, 1.0],
            dp_size=1,
            micro_batch_size=2,
            seq_length_multiple=2 * cp_size,
            normalization="teacher_balanced",
            seed=0,
        )
        runs = micro_batches.teacher_runs(session, iteration, plan)
        packs = micro_batches.pack(session, iteration, plan, runs)
        weights = {0: 0.0, 1: 0.0}
        for of_batch, packed in zip(runs, packs, strict=True):
            rows = [rows for run in of_batch for rows in run.samples]
            labels, teachers = [], []
            for r in rows:
                fields = iteration.tokens.tokens(r.sample_id)
                places = np.flatnonzero(fields.loss_mask)[r.first : r.stop].tolist()
                found[r.sample_id] += places
                labels += fields.response_ids[places].tolist()
                teachers += [r.teacher_index] * len(places)
                if cp_size == 1:  # positions of the whole sample
                    first = len(fields.prompt_ids) - 1
                    at = slice(len(labels) - len(places), len(labels))
                    assert packed.position_T[at].tolist() == [first + place for place in places]
            assert packed.payload.sampled.id_T.tolist() == labels
            assert len(packed.token_weight_T) == len(labels)
            for teacher, weight in zip(teachers, packed.token_weight_T.tolist(), strict=True):
                weights[teacher] += weight
        if cp_size == 1:
            assert weights == pytest.approx({0: 1.0, 1: 1.0}), "1/N of what is trained"
    assert {i: sorted(places) for i, places in found.items()} == case.trained()
