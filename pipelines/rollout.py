"""Phase 1: the student answers the iteration's prompts; trajectories are sealed batch by batch."""

from __future__ import annotations

import torch
import torch.distributed as dist

from mtopd import trajectories
from mtopd.metrics_lines import RolloutLine
from mtopd.planning import plan_batches, select_prompts
from mtopd.rollout.embedded import Request
from mtopd.run_dir import is_sealed
from mtopd.types import Prompt, Trajectory

from .job import Job


def run(job: Job, iteration: int) -> None:
    """Write and seal ``trajectories/`` of the iteration.  Batches a killed start had sealed are
    kept.  Collective.
    """
    folder = job.run.trajectories(iteration)
    if is_sealed(folder):
        return
    if job.ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    requests = plan_requests(job, iteration)
    config = job.config.rollout
    tokens = torch.zeros(3, dtype=torch.float64, device=job.ranks.device)
    for batch in plan_batches(len(requests), config.batch_size, job.ranks.world_size)[
        job.ranks.rank
    ]:
        name = f"batch-{batch.start // config.batch_size:05d}"
        if not trajectories.shard_is_sealed(folder, name):
            trajectories.write_shard(
                folder, name, answer(job, iteration, requests, batch), job.run.generation
            )
        done = trajectories.read_shard_metadata(folder, name)
        tokens += torch.tensor(
            [
                sum(done["response_len"].to_pylist()),
                len(done),
                done["finish_reason"].to_pylist().count("stop"),
            ]
        )
    dist.all_reduce(tokens)
    count, samples, stopped = (int(n) for n in tokens.tolist())
    # The line first: a kill in between writes it twice, the other order would lose it.
    job.metrics.write(RolloutLine(tokens=count, samples=samples, stopped=stopped), iteration)
    if job.ranks.rank == 0:
        job.run.seal(folder)
    dist.barrier()


def plan_requests(job: Job, iteration: int) -> list[tuple[Prompt, Request]]:
    """The iteration's requests in the order of their sample ids: a function of config, prompts and
    iteration alone.
    """
    config, sources = job.config.rollout, job.prompts.train
    planned = []
    for number, prompts in enumerate(sources):
        count = config.prompts_per_iteration // len(sources)
        for row in select_prompts(
            len(prompts), count, iteration, job.config.seed * len(sources) + number
        ):
            prompt = prompts[row]
            for sample in range(config.samples_per_prompt):
                planned.append((prompt, Request(prompt.prompt_id, prompt.prompt_ids, sample)))
    return planned


def answer(
    job: Job, iteration: int, requests: list[tuple[Prompt, Request]], batch: range
) -> list[Trajectory]:
    """Sample one batch: the unit of replay."""
    responses = job.engine.generate(
        [requests[i][1] for i in batch],
        max_response=job.config.data.max_response,
        seed=job.config.seed,
        iteration=iteration,
    )
    return [
        Trajectory(
            sample_id=i,
            prompt_id=requests[i][0].prompt_id,
            route=requests[i][0].route,
            teacher_index=requests[i][0].teacher_index,
            prompt_ids=requests[i][0].prompt_ids,
            response_ids=response.response_ids,
            loss_mask=(1,) * len(response.response_ids),
            rollout_log_probs=response.log_probs,
            student_version=iteration,
            finish_reason=response.finish_reason,
        )
        for i, response in zip(batch, responses, strict=True)
    ]
