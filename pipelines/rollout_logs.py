"""The token logs of an iteration's rollout: this start's is opened, those of killed starts are found."""

from __future__ import annotations

import contextlib

from mtopd.megatron.agreement import STALE_WAITS_S, digest_of, gather, see_alike
from mtopd.progress import say
from mtopd.rollout.token_log import FormerLogs, TokenLog, log_path, logs_before, samples_in

from .iteration import Iteration
from .session import Session


def former_logs(session: Session, iteration: Iteration, unsealed: set[int]) -> FormerLogs:
    """What killed starts had logged of samples that are in no sealed shard.  Collective: each rank
    looks through a share of the logs, and tells which samples they hold.  Which rank goes on with a
    response is open; that one reads it.
    """
    folder, run, ranks = iteration.token_logs, session.run, session.ranks
    paths = see_alike(
        ranks,
        lambda: logs_before(folder, run.generation),
        lambda paths: (
            digest_of([(path.name, path.stat().st_size) for path in paths]),
            f"lists {len(paths)} token logs in {folder}",
        ),
        waits_s=STALE_WAITS_S,
    )
    if not paths:
        return FormerLogs({}, run.id)
    shares = [paths[rank :: ranks.world_size] for rank in range(ranks.world_size)]
    found = gather(
        ranks,
        lambda: [samples_in(path, run=run.id, unsealed=unsealed) for path in shares[ranks.rank]],
    )
    if num_torn := sum(torn for share in found for _, torn in share):
        say(
            f"token logs of iteration {iteration.number}: {num_torn} bytes at their ends were lost "
            "with a kill; what they held is sampled again"
        )
    files = {
        path: sample_ids
        for share, told in zip(shares, found, strict=True)
        for path, (sample_ids, _) in zip(share, told, strict=True)
    }
    return FormerLogs(files, run.id)


def open_log(
    session: Session, iteration: Iteration, name: str, former: FormerLogs
) -> contextlib.closing[TokenLog]:
    """This rank's token log of this start."""
    run, version = session.run, session.engine.version
    assert version is not None
    log = TokenLog(
        name,
        log_path(iteration.token_logs, run.generation, session.ranks.rank),
        run=run.id,
        engine=session.engine.kind,
        versions={iteration.number: version},
        former=former,
    )
    return contextlib.closing(log)
