"""A rollout under way: what an iteration asks, and this rank's share of the answers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mtopd.megatron.agreement import apart
from mtopd.rollout.background import Background
from mtopd.rollout.shards import Counts, ShardWriter, shard_name
from mtopd.rollout.turns import Turns, environments

from .iteration import Iteration
from .requests import plan_requests, sampling
from .rollout_files import former_logs, open_log, versions
from .session import Session


class Rollout:
    """A rollout under way: what is asked, and this rank's share of the answers.  Each shard is sealed
    as soon as it is whole.  Building it is collective.
    """

    def __init__(
        self, session: Session, iteration: Iteration, sealed: Mapping[str, Counts]
    ) -> None:
        size = session.config.rollout.batch_size
        self.iteration = iteration
        self.before = sum(sealed.values(), Counts())  # sealed by former starts
        self.replying = environments(session.config.data.sources)
        asked = plan_requests(session, iteration)
        self.num_samples = len(asked)
        names = [shard_name(sample_id, size) for sample_id in asked]
        self.shard_names: Sequence[str] = sorted({*names})
        self._session = session
        self._waiting = asked.where(np.array([name not in sealed for name in names]))
        self.shards = ShardWriter(
            iteration.trajectories, self._waiting, size, session.run.generation
        )
        self.former = former_logs(session, iteration, self._waiting)
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
                for response in turns.answers(session.engine):
                    turns.forget(self.shards.add(response))
                if not halt():
                    break
                log.note_versions(versions(session.engine))
        self.continued_tokens, self.log_bytes = log.num_continued_tokens, log.num_bytes
        self.num_calls, self.call_s = turns.num_calls, turns.call_s
        self.first_error = turns.first_error
