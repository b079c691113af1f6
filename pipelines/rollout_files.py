"""What killed starts have left of an iteration's rollout, sealed shards and token logs; this start's log."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

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


@dataclass(frozen=True)
class Sealed:
    """Sealed shards of an iteration."""

    names: Set[str]
    sample_ids: npt.NDArray[np.int64]
    counts: Counts


def sealed_before(iteration: Iteration) -> Sealed | None:
    """Shards that killed starts have sealed; None: all of them."""
    if is_sealed(iteration.trajectories):
        remove_tree(iteration.token_logs)  # a kill came between
        return None
    iteration.trajectories.mkdir(parents=True, exist_ok=True)
    return look_at_shards(iteration.trajectories)


def look_at_shards(folder: Path) -> Sealed:
    names = trajectories.sealed_shards(folder)
    names = [name for name in names if trajectories.shard_is_sealed(folder, name)]
    tables = [trajectories.read_shard_metadata(folder, name) for name in names]
    ids = [np.empty(0, np.int64), *(table["sample_id"].to_numpy() for table in tables)]
    return Sealed({*names}, np.concatenate(ids), sum(map(count, tables), Counts()))


def count(metadata: pa.Table) -> Counts:
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
