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

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from mtopd import trajectories
from mtopd.files import remove_tree
from mtopd.megatron.agreement import STALE_WAITS_S, apart, decide, digest_of, gather, see_alike
from mtopd.metrics_lines import RolloutLine
from mtopd.planning import number_samples, select_prompts
from mtopd.progress import say
from mtopd.rollout.engine import Request, Sampling
from mtopd.rollout.shards import Counts, ShardWriter, shard_name
from mtopd.rollout.token_log import FormerLogs, TokenLog, log_path, logs_before, samples_in
from mtopd.rollout.turns import Turns, environments
from mtopd.run_dir import is_sealed
from mtopd.types import Prompt

from .iteration import Iteration
from .session import Session


def run(session: Session, iteration: Iteration) -> None:
    """Write and seal ``trajectories/`` of the iteration, from what killed starts have left of it.
    Collective.
    """
    folder, ranks, config = iteration.trajectories, session.ranks, session.config
    size = config.rollout.batch_size
    if (sealed := decide(ranks, lambda: sealed_before(iteration))) is None:
        return
    session.update_engine(iteration)
    replying = environments(config.data.sources)
    requests = plan_requests(session, iteration)
    waiting = [r for r in requests if shard_name(r[1].sample_id, size) not in sealed]
    shards = ShardWriter(folder, waiting, size, session.run.generation)
    former = former_logs(session, iteration, {request.sample_id for _, request in waiting})
    with apart(ranks) as name, open_log(session, iteration, name, former) as log:
        turns = Turns(
            waiting,
            replying,
            log,
            sampling(session, iteration),
            tokenizer=session.student.tokenizer,
            ending=session.student.ending(config.rollout),
            name=f"{session.run.id}/{iteration.number}",
        )
        for response in turns.answers(session.engine):
            turns.forget(shards.add(response))
    session.engine.release()
    before = sum(sealed.values(), Counts()) if ranks.rank == 0 else Counts()
    of_start = [log.num_continued_tokens, log.num_bytes, former.num_dropped, turns.num_calls]
    sums = torch.tensor(
        [*vars(before + shards.sealed).values(), *of_start, turns.call_s],
        dtype=torch.float64,
        device=ranks.device,
    )
    dist.all_reduce(sums)
    *whole, call_s = sums.tolist()
    samples, tokens, stopped, replied, errors, continued, log_bytes, dropped, calls = map(
        int, whole
    )
    assert samples == len(requests), f"{samples} of {len(requests)} samples are sealed"
    if errors:
        tell_errors(session, iteration, errors, turns.first_error)
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
    if replying:
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
