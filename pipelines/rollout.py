"""Phase 1: the student answers the iteration's prompts; shards of trajectories are sealed as they are
answered.

    mtopd rollout RUN_DIR --iteration N

Every token is in a log within a tenth of a second (``mtopd.rollout.token_log``): a killed start is
gone on with where it was, finished responses are not sampled again.  Differs from the textbook in:
sampling is the student's own distribution at temperature 1, unfiltered; ranks that are through wait
for the slowest however long it takes.  Where a source has an environment, a response is several
turns (``mtopd.rollout.turns``).  With ``rollout.overlap`` an iteration's rollout is begun while the
one before is trained: which student sampled a token is written with it (``pipelines/staleness.py``).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist

from mtopd import trajectories
from mtopd.files import remove_tree
from mtopd.megatron.agreement import apart, decide, gather
from mtopd.metrics_lines import RolloutLine
from mtopd.progress import say
from mtopd.rollout.background import Background
from mtopd.rollout.shards import Counts, ShardWriter, shard_name
from mtopd.rollout.turns import Turns, environments

from .iteration import Iteration
from .requests import plan_requests, sampling
from .rollout_files import former_logs, open_log, sealed_before, versions
from .session import Session


def run(session: Session, iteration: Iteration) -> None:
    """Write and seal ``trajectories/`` of the iteration, from what was begun ahead and what killed
    starts have left of it.  Collective.
    """
    start(session, iteration)
    finish(session, iteration)


def start(session: Session, iteration: Iteration) -> None:
    """Begin the iteration's rollout, unless it was begun ahead, or is sealed.  Collective."""
    if session.rollout is None:
        session.rollout = begin(session, iteration, iteration)


def finish(session: Session, iteration: Iteration) -> None:
    """Wait for the answers, and seal the iteration's trajectories.  Collective."""
    if (rollout := session.rollout) is not None:
        assert isinstance(rollout, Rollout) and rollout.iteration.number == iteration.number
        join(session, rollout)
        session.rollout = None


def begin_next(session: Session, iteration: Iteration) -> None:
    """With ``rollout.overlap``, begin the rollout of the next iteration with this one's weights: it goes
    on during all other phases, and with the new weights once there are any.  Collective.
    """
    if session.config.rollout.overlap == "one_step" and not iteration.is_last:
        session.rollout = begin(session, iteration.next, iteration)


def begin(session: Session, iteration: Iteration, student: Iteration) -> Rollout | None:
    """Begin the iteration's rollout with the weights that ``student`` begins with, unless it is sealed.
    An engine that answers elsewhere is asked in a thread from here on, others in ``join``.  Collective.
    """
    sealed = decide(session.ranks, lambda: sealed_before(iteration))
    if sealed is None:
        return None
    session.update_engine(student)
    return Rollout(session, iteration, sealed)


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


def join(session: Session, rollout: Rollout) -> None:
    """Wait for the answers, count them and seal the iteration's trajectories.  Collective."""
    iteration, ranks = rollout.iteration, session.ranks
    rollout.finish()
    if not session.engine.answers_elsewhere:
        session.engine.release()
    before = rollout.before if ranks.rank == 0 else Counts()
    sums = torch.tensor(
        [
            *vars(before + rollout.shards.sealed).values(),
            rollout.continued_tokens,
            rollout.log_bytes,
            rollout.former.num_dropped,
            rollout.num_calls,
            rollout.call_s,
        ],
        dtype=torch.float64,
        device=ranks.device,
    )
    dist.all_reduce(sums)
    *whole, call_s = sums.tolist()
    samples, tokens, stopped, replied, errors, continued, log_bytes, dropped, calls = map(
        int, whole
    )
    assert samples == rollout.num_samples, f"{samples} of {rollout.num_samples} samples are sealed"
    if errors:
        tell_errors(session, iteration, errors, rollout.first_error)
    if dropped:
        say(
            f"token logs of iteration {iteration.number}: {dropped} tokens behind gaps were lost with "
            "a kill and were sampled again"
        )
    line = RolloutLine(
        tokens=tokens,
        samples=samples,
        stopped=stopped,
        continued_tokens=continued,
        log_bytes=log_bytes,
    )
    if rollout.replying:
        line = dataclasses.replace(
            line,
            environment_tokens=replied,
            environment_errors=errors,
            environment_calls=calls,
            environment_s=call_s,
        )
    # The line first: a kill in between writes it twice, the other order would lose it.
    session.metrics.write(line, iteration.number)
    if ranks.rank == 0:
        folder = iteration.trajectories
        session.run.seal(folder, {"shards": trajectories.seal_hashes(folder)})
        remove_tree(iteration.token_logs)
    dist.barrier()


def tell_errors(session: Session, iteration: Iteration, errors: int, first: str | None) -> None:
    """Say how many responses an environment has failed, and how it did first.  Collective."""
    said = [error for error in gather(session.ranks, lambda: first) if error is not None]
    how = said[0] if said else "in a former start"
    say(
        f"iteration {iteration.number}: {errors} responses ended because an environment failed; they "
        f"are trained up to there ({how})"
    )
