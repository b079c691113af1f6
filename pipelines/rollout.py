"""Phase 1: the student answers the iteration's prompts; trajectories are sealed batch by batch.

    mtopd rollout RUN_DIR --iteration N

Differs from the textbook in: a batch is the unit of replay, a killed start answers the unsealed ones
again to the same tokens; sampling is the student's own distribution at temperature 1, unfiltered.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from mtopd import trajectories
from mtopd.megatron.agreement import decide
from mtopd.metrics_lines import RolloutLine
from mtopd.planning import number_samples, plan_batches, select_prompts
from mtopd.rollout.engine import Engine, Request
from mtopd.run_dir import is_sealed
from mtopd.types import Prompt, Trajectory

from .iteration import Iteration
from .session import Session


def run(session: Session, iteration: Iteration) -> None:
    """Write and seal ``trajectories/`` of the iteration.  Batches a killed start had sealed are
    kept.  Collective.
    """
    folder, ranks = iteration.trajectories, session.ranks

    def sealed_before() -> set[str] | None:
        """Batches of a killed start; None: all of them."""
        if is_sealed(folder):
            return None
        folder.mkdir(parents=True, exist_ok=True)
        names = trajectories.sealed_shards(folder)
        return {name for name in names if trajectories.shard_is_sealed(folder, name)}

    if (sealed := decide(ranks, sealed_before)) is None:
        return
    requests = plan_requests(session, iteration)
    engine = session.engine  # on every rank: one without a batch helps to give the others weights
    batch_size = session.config.rollout.batch_size
    counts = torch.zeros(3, dtype=torch.float64, device=ranks.device)
    for batch in plan_batches(len(requests), batch_size, ranks.world_size)[ranks.rank]:
        name = f"batch-{batch.start // batch_size:05d}"
        if name not in sealed:
            answered = answer(engine, session, iteration, requests, batch)
            trajectories.write_shard(folder, name, answered, session.run.generation)
        done = trajectories.read_shard_metadata(folder, name)
        num_tokens = sum(done["response_len"].to_pylist())
        num_stopped = done["finish_reason"].to_pylist().count("stop")
        counts += counts.new_tensor([num_tokens, len(done), num_stopped])
    dist.all_reduce(counts)
    tokens, samples, stopped = (int(n) for n in counts.tolist())
    # The line first: a kill in between writes it twice, the other order would lose it.
    line = RolloutLine(tokens=tokens, samples=samples, stopped=stopped)
    session.metrics.write(line, iteration.number)
    if ranks.rank == 0:
        session.run.seal(folder, {"shards": trajectories.seal_hashes(folder)})
    dist.barrier()


def plan_requests(session: Session, iteration: Iteration) -> list[tuple[Prompt, Request]]:
    """The iteration's requests in the order of their sample ids: a function of config, prompts and
    iteration alone.
    """
    config, sources = session.config.rollout, session.prompts.train
    count = config.prompts_per_iteration // len(sources)
    planned = []
    for number, prompts in enumerate(sources):
        seed = session.config.seed * len(sources) + number
        rows = select_prompts(len(prompts), count, iteration.number, seed)
        for row, sample in number_samples(rows, config.samples_per_prompt):
            prompt = prompts[row]
            planned.append((prompt, Request(prompt.prompt_id, prompt.prompt_ids, sample)))
    return planned


def answer(
    engine: Engine,
    session: Session,
    iteration: Iteration,
    requests: list[tuple[Prompt, Request]],
    batch: range,
) -> list[Trajectory]:
    """Sample one batch: the unit of replay."""
    responses = engine.generate(
        [requests[i][1] for i in batch],
        max_response=session.config.data.max_response,
        seed=session.config.seed,
        iteration=iteration.number,
    )
    return [
        Trajectory(
            sample_id=i,
            prompt_id=prompt.prompt_id,
            route=prompt.route,
            teacher_index=prompt.teacher_index,
            prompt_ids=prompt.prompt_ids,
            response_ids=response.response_ids,
            loss_mask=(1,) * len(response.response_ids),
            rollout_log_probs=response.log_probs,
            student_version=iteration.number,
            finish_reason=response.finish_reason,
        )
        for i, (prompt, _), response in zip(
            batch, [requests[i] for i in batch], responses, strict=True
        )
    ]
