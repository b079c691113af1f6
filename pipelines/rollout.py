"""Phase 1: the student answers the iteration's prompts; shards of trajectories are sealed as they are
answered.

    mtopd rollout RUN_DIR --iteration N

Every token is in a log within a tenth of a second (``mtopd.rollout.token_log``): a killed start is
gone on with where it was, finished responses are not sampled again.  Differs from the textbook in:
sampling is the student's own distribution at temperature 1, unfiltered; ranks that are through wait
for the slowest however long it takes.  Where a source has an environment, a response is several
turns (``mtopd.rollout.turns``).  With ``rollout.overlap`` an iteration's rollout is begun while the
one before is trained, with ``rollout.carry_over`` it goes on with responses that were left open
(``pipelines/carry_over.py``): which student sampled a token is written with it
(``pipelines/staleness.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
import torch.distributed as dist

from mtopd import trajectories
from mtopd.files import remove_tree
from mtopd.megatron.agreement import decide, gather
from mtopd.metrics_lines import RolloutLine
from mtopd.progress import say
from mtopd.rollout.shards import Counts

from .answering import Rollout
from .carry_over import carried_into, hand_over, seal_entry
from .iteration import Iteration
from .rollout_files import Sealed, sealed_before
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

    def look() -> tuple[Mapping[int, int], Sealed | None]:
        carried = carried_into(session, iteration)  # before the iteration has a folder
        return carried, sealed_before(iteration)

    carried, sealed = decide(session.ranks, look)
    if sealed is None:
        return None
    session.update_engine(student)
    return Rollout(session, iteration, sealed, carried)


def join(session: Session, rollout: Rollout) -> None:
    """Wait for the answers, count them and seal the iteration's trajectories.  Collective."""
    iteration, ranks = rollout.iteration, session.ranks
    rollout.finish()
    if not session.engine.answers_elsewhere:
        session.engine.release()
    is_partial = session.config.rollout.carry_over > 0
    left_open: Mapping[int, int] = {}
    if is_partial:
        left_open = decide(ranks, lambda: hand_over(session, iteration, rollout.left_open()))
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
    if is_partial:
        line = dataclasses.replace(
            line,
            continued_tokens=max(continued - rollout.carried_tokens, 0),
            carried_samples=len(rollout.carried),
            carried_tokens=sum(rollout.carried.values()),
            open_samples=len(left_open),
            open_tokens=sum(left_open.values()),
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
        contents = {"shards": trajectories.seal_hashes(folder)}
        session.run.seal(folder, contents | seal_entry(left_open) if is_partial else contents)
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
