"""Phase 1: the student answers the iteration's prompts; shards of trajectories are sealed as they are
answered.

    mtopd rollout RUN_DIR --iteration N

Every token is in a log within a tenth of a second (``mtopd.rollout.token_log``): a killed start is
gone on with where it was, finished responses are not sampled again.  Differs from the textbook in:
sampling is the student's own distribution at temperature 1, unfiltered; ranks that are through wait
for the slowest however long it takes.  Where a source has an environment, a response is several
turns (``mtopd.rollout.turns``).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from mtopd import trajectories
from mtopd.files import remove_tree
from mtopd.megatron.agreement import apart, decide, gather
from mtopd.metrics_lines import RolloutLine
from mtopd.planning import number_samples, select_prompts
from mtopd.progress import say
from mtopd.rollout.background import Background
from mtopd.rollout.engine import Request, Sampling
from mtopd.rollout.shards import Counts, ShardWriter, shard_name
from mtopd.rollout.turns import Turns, environments
from mtopd.run_dir import is_sealed
from mtopd.types import Prompt

from .iteration import Iteration
from .rollout_logs import former_logs, open_log
from .session import Session


def run(session: Session, iteration: Iteration) -> None:
    """Write and seal ``trajectories/`` of the iteration, from what killed starts have left of it.
    Collective.
    """
    if (rollout := begin(session, iteration)) is not None:
        join(session, rollout)


def begin(session: Session, iteration: Iteration) -> Rollout | None:
    """Begin the iteration's rollout, unless it is sealed.  An engine that answers elsewhere is asked in
    a thread from here on, the others in ``join``.  Collective.
    """
    sealed = decide(session.ranks, lambda: sealed_before(iteration))
    if sealed is None:
        return None
    session.update_engine(iteration)
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
        requests = plan_requests(session, iteration)
        self.num_samples = len(requests)
        self._waiting = [r for r in requests if shard_name(r[1].sample_id, size) not in sealed]
        self.shards = ShardWriter(
            iteration.trajectories, self._waiting, size, session.run.generation
        )
        asked = {request.sample_id for _, request in self._waiting}
        self.former = former_logs(session, iteration, asked)
        self.continued_tokens = self.log_bytes = self.num_calls = 0  # of this rank in this start
        self.call_s = 0.0
        self.first_error: str | None = None  # of an environment
        self._background: Background | None = None
        if session.engine.answers_elsewhere:
            name = f"rollout {iteration.number}"
            self._background = Background(lambda: self._answer(session, name), name)

    def finish(self, session: Session) -> None:
        """Until every answer is there, however long it takes; raises what has failed, on every rank.
        Collective.
        """
        with apart(session.ranks) as name:
            if self._background is None:
                self._answer(session, name)
            else:
                self._background.join()

    def _answer(self, session: Session, name: str) -> None:
        """This rank's share.  Takes part in no collective, and asks the engine alone."""
        iteration, student = self.iteration, session.student
        with open_log(session, iteration, name, self.former) as log:
            turns = Turns(
                self._waiting,
                self.replying,
                log,
                sampling(session, iteration),
                tokenizer=student.tokenizer,
                ending=student.ending(session.config.rollout),
                name=f"{session.run.id}/{iteration.number}",
            )
            for response in turns.answers(session.engine):
                turns.forget(self.shards.add(response))
        self.continued_tokens, self.log_bytes = log.num_continued_tokens, log.num_bytes
        self.num_calls, self.call_s = turns.num_calls, turns.call_s
        self.first_error = turns.first_error


def join(session: Session, rollout: Rollout) -> None:
    """Wait for the answers, count them and seal the iteration's trajectories.  Collective."""
    iteration, ranks = rollout.iteration, session.ranks
    rollout.finish(session)
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


def sealed_before(iteration: Iteration) -> Mapping[str, Counts] | None:
    """Shards that killed starts have sealed, by name; None: all of them."""
    folder = iteration.trajectories
    if is_sealed(folder):
        remove_tree(iteration.token_logs)  # a kill came between
        return None
    folder.mkdir(parents=True, exist_ok=True)
    names = trajectories.sealed_shards(folder)
    return {n: count(folder, n) for n in names if trajectories.shard_is_sealed(folder, n)}


def count(folder: Path, name: str) -> Counts:
    metadata = trajectories.read_shard_metadata(folder, name)
    columns = ("response_len", "num_loss_tokens", "finish_reason")
    return Counts.of(*(metadata[column].to_pylist() for column in columns))


def plan_requests(session: Session, iteration: Iteration) -> list[tuple[Prompt, Request]]:
    """The iteration's requests in the order of their sample ids: a function of config, prompts and
    iteration alone.
    """
    config, sources = session.config.rollout, session.prompts.train
    per_source = config.prompts_per_iteration // len(sources)
    planned: list[tuple[Prompt, Request]] = []
    for number, prompts in enumerate(sources):
        seed = session.config.seed * len(sources) + number
        rows = select_prompts(len(prompts), per_source, iteration.number, seed)
        prompt_of = functools.cache(prompts.__getitem__)  # one object for all samples of a row
        for row, sample in number_samples(rows, config.samples_per_prompt):
            prompt = prompt_of(row)
            request = Request(len(planned), prompt.prompt_id, prompt.prompt_ids, sample)
            planned.append((prompt, request))
    return planned


def sampling(session: Session, iteration: Iteration) -> Sampling:
    """The student's own distribution, as it is."""
    return Sampling(
        session.config.data.max_response,
        min_response=session.config.rollout.min_response,
        seed=session.config.seed,
        iteration=iteration.number,
    )
