"""A rollout under way: what an iteration asks, and this rank's share of the answers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mtopd.megatron.agreement import apart
from mtopd.rollout.background import Background
from mtopd.rollout.memory_log import Response
from mtopd.rollout.shards import EndedFirst, ShardWriter, shard_name
from mtopd.rollout.token_log import TokenLog
from mtopd.rollout.turns import Turns, environments

from .iteration import Iteration
from .requests import plan_requests, sampling
from .rollout_files import Sealed, former_logs, look_at_shards, open_log, versions
from .session import Session


class Rollout:
    """A rollout under way: what is asked, and this rank's share of the answers.  Each shard is sealed
    as soon as it is whole.  ``carried``: samples that the iteration before has left open, and their
    tokens.  Building it is collective.
    """

    def __init__(
        self, session: Session, iteration: Iteration, sealed: Sealed, carried: Mapping[int, int]
    ) -> None:
        config, size = session.config.rollout, session.config.rollout.batch_size
        self.iteration = iteration
        self.before = sealed.counts  # by former starts
        self.replying = environments(session.config.data.sources)
        self.asked = plan_requests(session, iteration, carried)
        self.num_samples = config.samples_per_iteration
        firsts = range(0, self.num_samples, size)
        self.shard_names: Sequence[str] = sorted(shard_name(first, size) for first in firsts)
        self._session = session
        count = self.num_samples - sealed.counts.samples
        asked_N = np.fromiter(self.asked, np.int64, len(self.asked))
        # Where as many have ended as are trained, nothing more is drawn: a kill came behind them.
        self._waiting = self.asked.where(~np.isin(asked_N, sealed.sample_ids) & (count > 0))
        self._leaves_open = len(self._waiting) > count
        place = iteration.trajectories, self._waiting, size, session.run.generation
        self.shards = (
            EndedFirst(*place, count=count, sealed=sealed.names)
            if config.carry_over
            else ShardWriter(*place)
        )
        self.former = former_logs(session, iteration, self._waiting)
        self.carried = carried
        # Of them, what this start goes on from
        self.carried_tokens = sum(
            n for sample_id, n in carried.items() if sample_id in self._waiting
        )
        self.continued_tokens = self.log_bytes = self.num_calls = 0  # of this rank in this start
        self.call_s = 0.0
        self.first_error: str | None = None  # of an environment
        self.background: Background | None = None
        if session.engine.answers_elsewhere:
            name = f"rollout {iteration.number}"
            self.background = Background(lambda thread: self._answer(name, thread.halt), name)

    def pause(self) -> None:
        engine = self._session.engine
        assert self.background is not None, "an engine of these ranks answers in `join` alone"
        self.background.pause(engine.pause)
        engine.resume()  # for others: this rollout stands still

    def resume(self) -> None:
        assert self.background is not None
        self.background.resume()

    def finish(self) -> None:
        """Until every answer is there, however long it takes; raises what has failed, on every rank.
        Collective.
        """
        with apart(self._session.ranks) as name:
            if self.background is None:
                self._answer(name, lambda: False)
            else:
                self.background.join()

    def _answer(self, name: str, halt: Callable[[], bool]) -> None:
        """This rank's share.  Takes part in no collective.  ``halt`` stands still in a pause, and says
        whether there was one.
        """
        session, iteration = self._session, self.iteration
        with (
            open_log(session, iteration, name, self.former) as log,
            contextlib.closing(
                Turns(
                    self._waiting,
                    self.replying,
                    log,
                    sampling(session),
                    tokenizer=session.student.tokenizer,
                    ending=session.student.ending(session.config.rollout),
                    name=session.run.id,
                )
            ) as turns,
        ):
            while True:
                self._take(turns, log)
                if not halt():
                    break
                log.note_versions(versions(session.engine))
        self.continued_tokens, self.log_bytes = log.num_continued_tokens, log.num_bytes
        self.num_calls, self.call_s = turns.num_calls, turns.call_s
        self.first_error = turns.first_error

    def _take(self, turns: Turns, log: TokenLog) -> None:
        """Put answers into shards, until all are there or as many as are trained."""
        engine = self._session.engine
        last: Response | None = None
        for response in turns.answers(engine):
            if self.shards.num_missing > 1 or not self._leaves_open:
                turns.forget(self.shards.add(response))
            elif last is None:
                last = response
                engine.pause()  # what still ends meanwhile is of the next iteration
        if last is not None:
            # The last shard is sealed when all that was drawn is logged: a start after a kill before
            # that goes on with the same weights, one after a kill behind it draws nothing.
            turns.settle()
            log.flush()
            turns.forget(self.shards.add(last))
            engine.resume()

    def left_open(self) -> list[int]:
        """Samples that are asked for and are in no shard."""
        sealed = {*look_at_shards(self.iteration.trajectories).sample_ids.tolist()}
        return [sample_id for sample_id in self.asked if sample_id not in sealed]
