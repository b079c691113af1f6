"""A rollout that is begun ahead: it stands still while weights change, goes on with the new ones, and
what is logged of it outlives a kill.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mtopd.metrics_lines import RolloutLine
from mtopd.pipelines import rollout
from mtopd.pipelines.iteration import Iteration
from mtopd.pipelines.session import Session
from mtopd.rollout.engine import Request, student_version
from mtopd.rollout.memory_log import MemoryLog, Response
from mtopd.rollout.token_log import log_path, read_log
from mtopd.run_dir import RunDir, is_sealed
from mtopd.trajectories import TokenStore
from mtopd.types import MtopdError, Prompt
from tests.support.gloo_ranks import on_ranks

COUNT, LENGTH = 8, 60


class Elsewhere:
    """An engine of other processes: rank 0 is its client, a token takes a millisecond and says which
    start drew it.
    """

    kind, answers_elsewhere, update = "sglang", True, None

    def __init__(self, is_client: bool, generation: int) -> None:
        self.version: str | None = None
        self.fails_with: str | None = None
        self._is_client = is_client
        self._generation = generation
        self._is_paused = self._draws = False

    def taker(self, bucket: int) -> int:
        return 0

    def update_weights(self, buckets: Any, version: str) -> None:
        assert not self._draws, "weights change while tokens are drawn"
        self.version = version

    def generate(
        self, requests: Sequence[Request], log: MemoryLog, sampling: Any, follow: Any = None
    ) -> Iterator[Response]:
        if not self._is_client:
            return
        assert self.version is not None
        self._draws, number = True, student_version(self.version)
        for request, held in zip(requests, log.begin(requests), strict=True):
            for position in range(len(held.response_ids), LENGTH):
                if self._is_paused:
                    self._draws = False
                    return
                if self.fails_with is not None:
                    raise MtopdError(self.fails_with)
                time.sleep(0.001)
                reason = "length" if position + 1 == LENGTH else None
                drawn = 1000 * self._generation + position
                log.append(request.sample_id, [drawn], [-1.0], version=number, finish_reason=reason)
            yield from log.take()
        self._draws = False
        log.flush()
        yield from log.take()

    def pause(self) -> None:
        self._is_paused = True

    def resume(self) -> None:
        self._is_paused = False


class OverlappingSession:
    """What a rollout needs of a session, and a session's own ways with one."""

    update_engine = Session.update_engine
    rollout_paused = Session.rollout_paused
    check_rollout = Session.check_rollout

    def __init__(self, folder: Path, ranks: Any) -> None:
        run = RunDir(folder)
        self.run = RunDir(folder, run.current_generation())
        self.ranks = SimpleNamespace(**vars(ranks), device=torch.device("cpu"))
        sizes = {"batch_size": 2, "prompts_per_iteration": COUNT, "samples_per_prompt": 1}
        sizes |= {"samples_per_iteration": COUNT}
        staleness = {"overlap": "one_step", "max_staleness": 1, "carry_over": 0}
        self.config: Any = SimpleNamespace(
            rollout=SimpleNamespace(**sizes, **staleness, min_response=0),
            data=SimpleNamespace(sources=[], max_response=LENGTH),
            train=SimpleNamespace(num_iterations=2),
            seed=0,
        )
        prompts = [Prompt(f"a/{i}", {}, (1, 2), 0) for i in range(COUNT)]
        self.prompts = SimpleNamespace(train=[prompts])
        self.student = SimpleNamespace(
            weights=lambda taker: (), tokenizer=None, ending=lambda config: None
        )
        self.engine = Elsewhere(ranks.rank == 0, self.run.generation)
        self.rollout: Any = None
        self.lines: list[Any] = []
        self.metrics = SimpleNamespace(write=lambda line, *_, **__: self.lines.append(line))

    def iteration(self, number: int) -> Iteration:
        none: Any = None
        return Iteration(number, self.run, self.config, none, self.ranks)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def logged(session: Any, number: int) -> int:
    """Bytes of this start's log on disk."""
    paths = session.run.token_logs(number).glob(f"log-{session.run.generation:06d}-*.bin")
    return sum(path.stat().st_size for path in paths)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.take_generation()
    return run.path


def test_what_is_open_when_weights_change_goes_on_with_the_new_ones(
    tmp_path: Path, folder: Path
) -> None:
    def body(ranks: Any) -> Any:
        session: Any = OverlappingSession(folder, ranks)
        first = session.iteration(0)
        session.update_engine(first)
        rollout.begin_next(session, first)
        assert not is_sealed(session.run.trajectories(1))
        if ranks.rank == 0:
            wait_until(lambda: logged(session, 1) > 1500)
        session.update_engine(first.next)  # asserts that nothing is drawn meanwhile
        with session.rollout_paused(), session.rollout_paused():
            session.engine.update_weights((), "an evaluation's")
            session.engine.update_weights((), f"{session.run.id}/1/1")
        session.check_rollout()
        if ranks.rank == 0:
            path = log_path(session.run.token_logs(1), session.run.generation, 0)
            wait_until(lambda: read_log(path).about["versions"].keys() == {"0", "1"})
        rollout.run(session, first.next)
        assert session.rollout is None
        rollout.begin_next(session, first.next)
        assert session.rollout is None, "nothing comes behind the last iteration"
        return [line for line in session.lines if isinstance(line, RolloutLine)]

    lines = on_ranks(tmp_path, body)[0]
    assert [(line.samples, line.tokens) for line in lines] == [(COUNT, COUNT * LENGTH)]
    trajectories = RunDir(folder).trajectories(1)
    assert is_sealed(trajectories) and not RunDir(folder).token_logs(1).exists()
    store = TokenStore(trajectories)
    spans = [store.tokens(i).version_spans for i in range(COUNT)]
    for i in range(COUNT):
        drawn = store.tokens(i).response_ids.tolist()
        assert drawn == [1000 + position for position in range(LENGTH)], "none twice, none lost"
    assert spans[0] == ((0, 0),) and spans[-1] == ((0, 1),)
    mixed = [span for span in spans if len(span) == 2]
    assert len(mixed) == 1 and [version for _, version in mixed[0]] == [0, 1]


def test_after_a_kill_it_goes_on_behind_what_is_logged(tmp_path: Path, folder: Path) -> None:
    def killed(ranks: Any) -> None:
        session: Any = OverlappingSession(folder, ranks)
        session.update_engine(session.iteration(0))
        rollout.begin_next(session, session.iteration(0))
        if ranks.rank == 0:
            wait_until(lambda: logged(session, 1) > 1500)

    on_ranks(tmp_path, killed)
    run = RunDir(folder)
    records = read_log(log_path(run.token_logs(1), 1, 0)).records
    known = {r.sample_id: r.start + len(r.ids) // 4 for r in records}
    run.take_generation()

    def again(ranks: Any) -> Any:
        session: Any = OverlappingSession(folder, ranks)
        rollout.run(session, session.iteration(1))  # as from the checkpoint behind iteration 0
        return session.lines

    (tmp_path / "again").mkdir()  # another store of another start's ranks
    (line,) = on_ranks(tmp_path / "again", again)[0]
    store = TokenStore(run.trajectories(1))
    assert line.tokens == COUNT * LENGTH and 0 < line.continued_tokens <= sum(known.values())
    for i in range(COUNT):
        count = known.get(i, 0)
        expected = [1000 + p if p < count else 2000 + p for p in range(LENGTH)]
        assert store.tokens(i).response_ids.tolist() == expected, i
        versions = store.tokens(i).versions().tolist()
        assert versions == [0] * count + [1] * (LENGTH - count), "each token keeps its student"


def test_what_fails_in_the_thread_is_noticed_on_the_way_and_ends_all_ranks(
    tmp_path: Path, folder: Path
) -> None:
    def body(ranks: Any) -> str:
        session: Any = OverlappingSession(folder, ranks)
        session.update_engine(session.iteration(0))
        session.engine.fails_with = "all SGLang servers are out"
        rollout.begin_next(session, session.iteration(0))
        if ranks.rank == 0:
            noticed = []

            def look() -> bool:
                try:
                    session.check_rollout()
                except MtopdError as error:
                    noticed.append(str(error))
                return bool(noticed)

            wait_until(look)
            assert noticed == ["all SGLang servers are out"]
        session.update_engine(session.iteration(1))
        return "went on"

    found = on_ranks(tmp_path, body)
    assert len({*found}) == 1 and "all SGLang servers are out" in found[0]
