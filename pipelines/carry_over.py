"""Partial rollouts (``rollout.carry_over``): responses that are open when an iteration ends go on in the
next one, with its weights.

The samples of all iterations are one queue: those of iteration 0, then those of iteration 1 and so on,
S each, numbered through.  Iteration k asks for the first (k + 1) S + ``carry_over`` of the queue, less
what has ended in iterations before, and is over once S of them have ended: each iteration trains S
samples, every sample is trained in the iteration in which it ends, none is dropped.  The last
iteration asks for nothing beyond its S, and leaves none open.

What a kill may not break: the seal of an iteration says which samples it left open, and what the next
one asks follows from it alone.  Their tokens, turns and replies are the first of the next iteration's
token logs before that seal is written; until it is, the logs that they are taken from stay.  So either
the iteration goes on, or all of it is over.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mtopd.config import ConsolidateConfig
from mtopd.files import read_json
from mtopd.progress import say
from mtopd.rollout.token_log import carry_over, log_path, logs_before
from mtopd.run_dir import RunDir, is_sealed, numbered, read_seal
from mtopd.types import MtopdError

if TYPE_CHECKING:
    from .iteration import Iteration
    from .session import Session

OPEN = "open"  # of the seal of an iteration's trajectories: tokens by sample id


def carried_into(session: Session, iteration: Iteration) -> dict[int, int]:
    """The samples that the iteration before has left open, and how many tokens they had."""
    number, run = iteration.number, session.run
    if not session.config.rollout.carry_over or is_sealed(iteration.trajectories):
        return {}
    if (following := run.trajectories(number + 1)).exists():
        raise MtopdError(
            f"{following} goes on with what another rollout of iteration {number} has left open: "
            f"remove {following.parent} and all iterations after it, then start again"
        )
    if not number:
        return {}
    before = run.trajectories(number - 1)
    if not is_sealed(before):
        raise MtopdError(
            f"iteration {number} goes on with what iteration {number - 1} has left open "
            f"(rollout.carry_over), but {before} is gone or not complete: go on from a checkpoint "
            "before it, or from the newest one"
        )
    found = {int(name): count for name, count in read_seal(before)[OPEN].items()}
    if any(found.values()) and not first_log(iteration).exists():
        say(
            f"iteration {number}: the tokens of what iteration {number - 1} has left open are gone; "
            "these responses are sampled from their beginning"
        )
        return dict.fromkeys(found, 0)
    return found


def hand_over(session: Session, iteration: Iteration, samples: Collection[int]) -> dict[int, int]:
    """Give the next iteration what the logs hold of ``samples``; returns their tokens.  Done again after
    a kill it comes to the same.
    """
    if not samples:
        return {}
    run = session.run
    tokens = carry_over(
        logs_before(iteration.token_logs, run.generation + 1),
        first_log(iteration.next),
        run=run.id,
        engine=session.engine.kind,
        samples={*samples},
    )
    return {sample_id: tokens[sample_id] for sample_id in sorted(samples)}


def first_log(iteration: Iteration) -> Path:
    """Of its token logs: what the iteration before has left open."""
    return log_path(iteration.token_logs, 0, 0)


def seal_entry(left_open: Mapping[int, int]) -> dict[str, dict[str, int]]:
    """What the seal of an iteration says of the samples that it leaves open."""
    return {OPEN: {str(sample_id): count for sample_id, count in left_open.items()}}


# -- refusals --------------------------------------------------------------------------------------
def check_end(run: RunDir, config: ConsolidateConfig) -> None:
    """Raise MtopdError where an iteration becomes the last one that has begun as another: what it leaves
    open would be dropped.
    """
    if not config.rollout.carry_over or not run.manifest.exists():
        return
    before = read_json(run.manifest).get("config", {}).get("train", {}).get("num_iterations")
    numbers = numbered(run.path / "iterations")
    begun = max((n for n in numbers if run.trajectories(n).exists()), default=-1)
    if before is not None and config.train.num_iterations < min(before, begun + 2):
        raise MtopdError(
            f"train.num_iterations is {config.train.num_iterations}, but iteration {begun} has begun as "
            f"one of {before}: the responses that it leaves open (rollout.carry_over) would be dropped; "
            f"give {begun + 2} or more, or choose another run_dir"
        )


def check_import(config: ConsolidateConfig) -> None:
    """Raise MtopdError: rows of others do not stand in the queue."""
    if config.rollout.carry_over:
        raise MtopdError(
            f"with rollout.carry_over {config.rollout.carry_over} an iteration goes on with what the one "
            "before has left open, which imported trajectories would cut off; import into a run with "
            "carry_over 0"
        )
