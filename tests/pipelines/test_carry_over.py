"""Partial rollouts: what is open when an iteration ends goes on in the next one, through kills at every
place; each sample is trained once, each token drawn once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mtopd.config import ConsolidateConfig
from mtopd.metrics_lines import RolloutLine
from mtopd.pipelines import answering, rollout
from mtopd.pipelines.carry_over import check_end, check_import
from mtopd.pipelines.requests import plan_requests
from mtopd.rollout.ending import Ending
from mtopd.rollout.engine import Request, Sampling, student_version
from mtopd.rollout.memory_log import MemoryLog, Response, turn_of
from mtopd.rollout.sglang import draw_seed
from mtopd.rollout.token_log import log_path
from mtopd.run_dir import RunDir, is_sealed, read_seal
from mtopd.tokenizer import encode_prompts, load_tokenizer
from mtopd.trajectories import TokenStore
from mtopd.trajectories.samples import verify_folder
from mtopd.types import MtopdError, Prompt
from tests.environments import calls_in
from tests.pipelines.test_overlap import OverlappingSession
from tests.rollout.engines import VOCAB, Model, small_model
from tests.support.gloo_ranks import on_ranks

SAMPLES, OPEN, BATCH = 12, 5, 4  # of an iteration, left open by it, of a shard
LONGEST = 60
MOST_OPEN = 8  # at once: others wait


class Servers:
    """Rank 0 is the client of servers that draw a token of each open response in turn.  A token follows
    from the response's seed and its position; who drew it with which weights is noted in a file.
    """

    kind, answers_elsewhere, update = "sglang", True, None

    def __init__(self, is_client: bool, notes: Path) -> None:
        self.version: str | None = None
        self.fails_after: int | None = None  # draws
        self._is_client = is_client
        self._notes = notes
        self._is_paused = False

    def taker(self, bucket: int) -> int:
        return 0

    def update_weights(self, buckets: Any, version: str) -> None:
        self.version = version

    def generate(
        self,
        requests: Sequence[Request],
        log: MemoryLog,
        sampling: Sampling,
        follow: Any = None,
    ) -> Iterator[Response]:
        while requests and self._is_client and not self._is_paused:
            held = zip(requests, log.begin(requests), strict=True)
            todo = [[r, len(h.response_ids)] for r, h in held if h.finish_reason is None]
            try:
                yield from log.take()
                while todo and not self._is_paused:
                    self._draw(todo, log, sampling)
                    yield from log.take()
            except GeneratorExit:  # nobody waits for what is under way
                self._draw(todo, MemoryLog("lost"), sampling)
                raise
            if self._is_paused:
                self._draw(todo, log, sampling)  # what was under way: some end by it
                yield from log.take()
                return
            requests = follow(requests) if follow is not None else ()

    def _draw(self, todo: list[Any], log: MemoryLog, sampling: Sampling) -> None:
        assert self.version is not None
        number = student_version(self.version)
        with open(self._notes, "a") as notes:
            for work in todo[:MOST_OPEN]:
                request, position = work
                if self.fails_after is not None:
                    self.fails_after -= 1
                    if self.fails_after < 0:
                        raise MtopdError("killed")
                whole = length_of(request, sampling)
                token, reason = token_of(request, sampling, position), None
                if position + 1 == whole:
                    token, reason = 1, "stop" if whole < sampling.budget(request) else "length"
                if log.name != "lost":
                    log.append(
                        request.sample_id, [token], [-1.0], version=number, finish_reason=reason
                    )
                notes.write(f"{request.sample_id} {request.position + position} {number}\n")
                work[1] += 1
        todo[:] = [work for work in todo if work[1] < length_of(work[0], sampling)]
        log.flush()

    def pause(self) -> None:
        self._is_paused = True

    def resume(self) -> None:
        self._is_paused = False


def length_of(request: Request, sampling: Sampling) -> int:
    """Most turns are short, some far longer than an iteration lasts."""
    seed = draw_seed(sampling, request) + 77 * turn_of(request.sample_id)
    return min(40 + seed % 20 if seed % 5 == 0 else 2 + seed % 9, sampling.budget(request))


def token_of(request: Request, sampling: Sampling, position: int) -> int:
    place = request.position + position
    return 3 + (draw_seed(sampling, request) + 31 * place) % (VOCAB - 3)


class PartialSession(OverlappingSession):
    """Of a run with ``carry_over``."""

    def __init__(self, folder: Path, ranks: Any, num_iterations: int, carry_over: int = OPEN):
        super().__init__(folder, ranks)
        self.config.rollout = SimpleNamespace(
            batch_size=BATCH,
            prompts_per_iteration=SAMPLES // 2,
            samples_per_prompt=2,
            samples_per_iteration=SAMPLES,
            overlap="none",
            max_staleness=1,
            min_response=0,
            carry_over=carry_over,
        )
        self.config.data.max_response = LONGEST
        self.config.train.num_iterations = num_iterations
        self.engine: Any = Servers(ranks.rank == 0, folder.parent / "drawn")


def run_iterations(session: Any, first: int = 0) -> list[RolloutLine]:
    """From ``first`` to the last; what they said."""
    for number in range(first, session.config.train.num_iterations):
        rollout.run(session, session.iteration(number))
    return [line for line in session.lines if isinstance(line, RolloutLine)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.take_generation()
    return run.path


def planned(folder: Path, num_iterations: int) -> dict[int, tuple[Prompt, Request]]:
    """The queue, as iterations without ``carry_over`` plan their own samples."""
    ranks = SimpleNamespace(rank=1, world_size=1)
    session: Any = PartialSession(folder, ranks, num_iterations, carry_over=0)
    found = {}
    for number in range(num_iterations):
        asked = plan_requests(session, session.iteration(number))
        assert [*asked] == [*range(SAMPLES)]
        found |= {number * SAMPLES + place: asked[place] for place in asked}
    return found


def check_queue(folder: Path, num_iterations: int, *lasts: int) -> list[TokenStore]:
    """Each sample of the queue ended in one iteration, each token was drawn once, by the student that
    its trajectory names, from the seed that its own iteration gave it.  ``lasts``: iterations that were
    once the last.
    """
    run, queue = RunDir(folder), planned(folder, num_iterations)
    lines = [map(int, line.split()) for line in (folder.parent / "drawn").read_text().splitlines()]
    drawn = {(sample_id, position): version for sample_id, position, version in lines}
    assert len(drawn) == len(lines), "a token was drawn twice"
    stores = [TokenStore(run.trajectories(number)) for number in range(num_iterations)]
    seen: Counter[int] = Counter()
    for number, store in enumerate(stores):
        verify_folder(
            run.trajectories(number),
            seals=read_seal(run.trajectories(number))["shards"],
            iteration=number,
            vocab_size=VOCAB,
            teacher_vocab_sizes=[VOCAB],
        )
        assert [len(ids) for ids in store.shards.values()] == [BATCH] * (SAMPLES // BATCH)
        seen.update([*store.samples])
        for sample_id in store.samples:
            prompt, request = queue[sample_id]
            trajectory, fields = store.get(sample_id), store.tokens(sample_id)
            assert trajectory.prompt_id == prompt.prompt_id
            sampling = Sampling(LONGEST)
            length = length_of(request, sampling)
            expected = [token_of(request, sampling, place) for place in range(length - 1)]
            assert fields.response_ids.tolist() == [*expected, 1]
            versions = [drawn[sample_id, position] for position in range(length)]
            assert fields.versions().tolist() == versions
        open_samples = read_seal(run.trajectories(number))["open"]
        assert len(open_samples) == (0 if number in (*lasts, num_iterations - 1) else OPEN)
        assert not run.token_logs(number).exists()
    assert seen == Counter(dict.fromkeys(range(num_iterations * SAMPLES), 1)), "dropped or twice"
    return stores


def test_three_iterations_train_each_sample_once_where_it_ends(
    tmp_path: Path, folder: Path
) -> None:
    def body(ranks: Any) -> Any:
        return run_iterations(PartialSession(folder, ranks, 3))

    lines = on_ranks(tmp_path, body)[0]
    stores = check_queue(folder, 3)
    assert [line.samples for line in lines] == [SAMPLES] * 3
    assert [line.continued_tokens for line in lines] == [0, 0, 0], "nobody was killed"
    assert [line.carried_samples for line in lines] == [0, OPEN, OPEN]
    assert [line.open_samples for line in lines] == [OPEN, OPEN, 0]
    assert [line.carried_tokens for line in lines[1:]] == [line.open_tokens for line in lines[:2]]
    assert lines[0].open_tokens and lines[1].open_tokens
    spans = [store.tokens(i).version_spans for store in stores for i in store.samples]
    assert any(len(of_sample) > 1 for of_sample in spans), "none went on with other weights"
    assert any(of_sample[0][1] < 2 and of_sample[-1][1] == 2 for of_sample in spans)
    whole = [
        (sample_id, number)
        for number, store in enumerate(stores)
        for sample_id in store.samples
        if store.tokens(sample_id).versions().max() < number
    ]
    assert whole, "none ended while the servers came to their stop"
    late = [sample_id for sample_id in stores[0].samples if sample_id >= SAMPLES]
    assert late, "none of the next iteration's ended first"


def killed(*args: Any, **kwargs: Any) -> Any:
    raise MtopdError("killed")


def kill_in_the_first_iteration(session: Any) -> None:
    session.engine.fails_after = 60


def kill_before_the_last_shard(session: Any) -> None:
    add = answering.EndedFirst.add

    def dying(shards: Any, response: Response) -> Any:
        return killed() if shards.num_missing == 1 else add(shards, response)

    answering.EndedFirst.add = dying  # type: ignore[method-assign]


def kill_before_the_next_iteration_has_its_log(session: Any) -> None:
    rollout.hand_over = killed


def kill_before_the_seal(session: Any) -> None:
    session.run.seal = killed


def kill_before_the_logs_are_removed(session: Any) -> None:
    rollout.remove_tree = killed


def kill_in_the_second_iteration(session: Any) -> None:
    if session.iteration(0).trajectories.joinpath("SEALED").exists():
        session.engine.fails_after = 40


@pytest.mark.parametrize(
    ("kill", "done"),
    [
        (kill_in_the_first_iteration, 0),
        (kill_before_the_last_shard, 0),
        (kill_before_the_next_iteration_has_its_log, 0),
        (kill_before_the_seal, 0),
        (kill_before_the_logs_are_removed, 1),
        (kill_in_the_second_iteration, 1),
    ],
)
def test_a_kill_anywhere_loses_and_doubles_nothing(
    tmp_path: Path, folder: Path, kill: Callable[[Any], None], done: int
) -> None:
    run = RunDir(folder)

    def dying(ranks: Any) -> None:
        session: Any = PartialSession(folder, ranks, 3)
        if kill is kill_in_the_second_iteration:
            rollout.run(session, session.iteration(0))
        if ranks.rank == 0:
            kill(session)
        run_iterations(session)

    assert "killed" in on_ranks(tmp_path, dying, awaited=1)[0]
    assert is_sealed(run.trajectories(0)) == (done > 0)
    carried = log_path(run.token_logs(1), 0, 0)
    before = carried.read_bytes() if carried.exists() else None
    assert (before is not None) == (done > 0 or kill is kill_before_the_seal)
    run.take_generation()

    def again(ranks: Any) -> Any:
        session: Any = PartialSession(folder, ranks, 3)
        rollout.run(session, session.iteration(0))
        if before is not None and ranks.rank == 0:
            assert carried.read_bytes() == before, "handed over again it is the same"
        return run_iterations(session, 1)

    (tmp_path / "again").mkdir()  # another store of another start's ranks
    lines = on_ranks(tmp_path / "again", again)[0]
    check_queue(folder, 3)
    # Tokens of the killed start, beside those that an iteration was given.
    continued = sum(line.continued_tokens for line in lines)
    assert (continued > 0) == (
        kill
        in (
            kill_in_the_first_iteration,
            kill_before_the_last_shard,
            kill_in_the_second_iteration,
        )
    )


@pytest.mark.parametrize("is_killed", [False, True])
def test_more_iterations_go_on_with_the_queue(
    tmp_path: Path, folder: Path, is_killed: bool
) -> None:
    """From behind the former last iteration, and from the middle of it, which then leaves some open."""

    def first(ranks: Any) -> Any:
        session: Any = PartialSession(folder, ranks, 2)
        rollout.run(session, session.iteration(0))
        if is_killed:
            session.engine.fails_after = 40
        return run_iterations(session, 1)

    on_ranks(tmp_path, first, awaited=1 if is_killed else 3)
    if not is_killed:
        check_queue(folder, 2)
    RunDir(folder).take_generation()
    (tmp_path / "again").mkdir()
    again: Callable[[Any], Any] = lambda ranks: run_iterations(  # noqa: E731
        PartialSession(folder, ranks, 4), 1
    )
    on_ranks(tmp_path / "again", again)
    check_queue(folder, 4, *([] if is_killed else [1]))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return small_model(tmp_path_factory.mktemp("model") / "m")


def test_a_conversation_goes_on_under_its_name_and_asks_once_a_turn(
    tmp_path: Path, folder: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = tmp_path / "calls"
    monkeypatch.setenv("CALLS", str(calls))
    tokenizer = load_tokenizer(model.folder)
    environment = SimpleNamespace(
        python="tests.environments:slow", max_turns=3, timeout_s=30.0, threads=4
    )
    prompts = []
    for i in range(SAMPLES):
        messages = [{"role": "user", "content": f"word {i}"}]
        told = {"environment": "letters", "messages": messages, "tools": None, "answer": "a"}
        (ids,) = encode_prompts(tokenizer, [messages])
        # Where few have one, an iteration ends while environments still think of their replies.
        prompts.append(Prompt(f"letters/{i}", {}, tuple(ids), 0, {}, told if i % 3 == 0 else {}))

    def body(ranks: Any) -> Any:
        session: Any = PartialSession(folder, ranks, 3)
        session.config.data.sources = [SimpleNamespace(name="letters", environment=environment)]
        session.prompts = SimpleNamespace(train=[prompts])
        session.student.tokenizer = tokenizer
        session.student.ending = lambda config: Ending(tokenizer, [1])
        return run_iterations(session)

    lines = on_ranks(tmp_path, body)[0]
    drawn = [line.rsplit(" ", 1)[0] for line in (tmp_path / "drawn").read_text().splitlines()]
    assert len(drawn) == len({*drawn}), "a token was drawn twice"
    run = RunDir(folder)
    stores = [TokenStore(run.trajectories(number)) for number in range(3)]
    assert sorted(i for s in stores for i in s.samples) == [*range(3 * SAMPLES)]
    asked = [call.rsplit(" ", 1) for call in calls_in(calls)]
    assert len(asked) == len({*map(tuple, asked)}), "asked again about a turn"
    names = {name for name, _ in asked}
    homes = {tuple(map(int, name.removeprefix(f"{run.id}/").split("/"))) for name in names}
    assert {home for home, _ in homes} == {0, 1, 2}
    assert all(home == sample_id // SAMPLES for home, sample_id in homes)
    assert sum(line.environment_calls or 0 for line in lines) == len(asked)
    mixed = 0
    for store in stores:
        for sample_id in store.samples:
            fields = store.tokens(sample_id)
            mixed += len(fields.version_spans) > 1 and not fields.loss_mask.all()
            assert fields.loss_mask[-1] == 1
            assert np.isfinite(fields.rollout_log_probs).all()
    assert mixed, "no conversation of several turns went on with other weights"


def test_what_a_later_iteration_goes_on_with_must_be_there(tmp_path: Path, folder: Path) -> None:
    run = RunDir(folder)

    def body(ranks: Any) -> Any:
        session: Any = PartialSession(folder, ranks, 3)
        said = []
        for number in (1, 0):
            try:
                rollout.run(session, session.iteration(number))
            except MtopdError as error:
                said.append(str(error))
            if number == 1 and ranks.rank == 0:
                run.trajectories(1).mkdir(parents=True)
        return said

    (missing, following), *_ = on_ranks(tmp_path, body)
    assert "iteration 1 goes on with what iteration 0 has left open" in missing
    assert "trajectories goes on with what another rollout of iteration 0 has left" in following


def config_of(num_iterations: int, carry_over: int) -> Any:
    return SimpleNamespace(
        rollout=SimpleNamespace(carry_over=carry_over),
        train=SimpleNamespace(num_iterations=num_iterations),
    )


def test_an_iteration_that_has_begun_as_another_does_not_become_the_last(folder: Path) -> None:
    run = RunDir(folder)
    assert check_end(run, config_of(3, OPEN)) is None
    run.manifest.write_text('{"config": {"train": {"num_iterations": 9}}}')
    run.trajectories(4).mkdir(parents=True)
    run.token_logs(5).mkdir(parents=True)  # what iteration 4 has handed over
    for now, carry_over in ((9, OPEN), (6, OPEN), (12, OPEN), (5, 0)):
        check_end(run, config_of(now, carry_over))
    with pytest.raises(
        MtopdError, match=r"is 5, but iteration 4 has begun as one of 9.* give 6 or"
    ):
        check_end(run, config_of(5, OPEN))
    run.trajectories(8).mkdir(parents=True)  # the last, as which it has begun
    check_end(run, config_of(9, OPEN))


def test_rows_of_others_are_not_imported_into_the_queue() -> None:
    config: ConsolidateConfig = config_of(3, OPEN)
    with pytest.raises(MtopdError, match=r"with rollout\.carry_over 5 an iteration goes on"):
        check_import(config)
    check_import(config_of(3, 0))
