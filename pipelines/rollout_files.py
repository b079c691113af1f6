"""What killed starts have left of an iteration's rollout, sealed shards and token logs; this start's log."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Mapping
from pathlib import Path

from mtopd import trajectories
from mtopd.files import remove_tree
from mtopd.megatron.agreement import STALE_WAITS_S, digest_of, gather, see_alike
from mtopd.progress import say
from mtopd.rollout.engine import Engine, student_version
from mtopd.rollout.shards import Counts
from mtopd.rollout.token_log import FormerLogs, TokenLog, log_path, logs_before, samples_in
from mtopd.run_dir import is_sealed

from .iteration import Iteration
from .session import Session


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


def former_logs(session: Session, iteration: Iteration, unsealed: Container[int]) -> FormerLogs:
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
    run = session.run
    log = TokenLog(
        name,
        log_path(iteration.token_logs, run.generation, session.ranks.rank),
        run=run.id,
        engine=session.engine.kind,
        versions=versions(session.engine),
        former=former,
    )
    return contextlib.closing(log)


def versions(engine: Engine) -> dict[int, str]:
    """What a log names the student that samples now."""
    assert engine.version is not None
    return {student_version(engine.version): engine.version}
