"""Greedy accuracy on held-out prompts, scored by each dataset's own verifier."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mtopd.families import model_facts
from mtopd.hf_checkpoint import HFTensors, load_hf_config
from mtopd.megatron.parallel import Ranks
from mtopd.metrics_lines import EvaluationLine
from mtopd.planning import plan_batches
from mtopd.rollout.embedded import EmbeddedEngine, Request
from mtopd.tokenizer import decode_response
from mtopd.types import MtopdError

from .job import Job, write_evaluation
from .prompts import Prompts

_CORRECT = 0.999
_BATCH = 64


def run(job: Job, iteration: int) -> None:
    """Evaluate the student after ``iteration`` train iterations, when it is due.  Collective."""
    every, total = job.config.evaluation.every, job.config.train.num_iterations
    due = iteration in (0, total) or (every and iteration % every == 0)
    if not due or job.run.evaluation(iteration).exists():
        return
    with job.timed("evaluation", iteration):
        found = accuracy(
            job.engine, job.prompts, job.student.tokenizer, job.ranks, job.config.data.max_response
        )
        if job.ranks.rank == 0:
            write_evaluation(job.run, f"{iteration:06d}", found)
    job.metrics.write(EvaluationLine(found), iteration)
    job.progress.note(
        f"iteration {iteration}: "
        + "  ".join(f"{name} {value:.3f}" for name, value in found.items())
    )


def baselines(job: Job) -> None:
    """Evaluate the configured HF checkpoints and their weight average once.  Collective."""
    config = job.config.evaluation
    if not config.baselines or (job.run.path / "evaluations" / "baselines.json").exists():
        return
    with job.timed("baselines", 0):
        engine = job.student.new_engine()
        results, weights = {}, {}
        for name, folder in config.baselines.items():
            weights[name] = read_weights(folder)
            results[name] = _evaluate(job, engine, weights[name])
        average = None
        if config.weight_average:
            chosen = [weights[name] for name in config.weight_average]
            mean = {
                k: torch.stack([w[k].float() for w in chosen]).mean(0).to(chosen[0][k].dtype)
                for k in chosen[0]
            }
            average = _evaluate(job, engine, mean)
        if job.ranks.rank == 0:
            write_evaluation(job.run, "baselines", {"models": results, "weight_average": average})
    for name, found in (*results.items(), ("weight average", average)):
        if found is not None:
            job.progress.note(f"{name}: " + "  ".join(f"{k} {v:.3f}" for k, v in found.items()))


def _evaluate(
    job: Job, engine: EmbeddedEngine, weights: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    engine.update_weights(weights)
    return accuracy(
        engine, job.prompts, job.student.tokenizer, job.ranks, job.config.data.max_response
    )


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of an HF checkpoint that answering takes."""
    stored, facts = HFTensors(folder), model_facts(load_hf_config(folder))
    return {name: stored[name] for name in stored if not facts.is_further_head(name)}


def accuracy(
    engine: EmbeddedEngine, prompts: Prompts, tokenizer: Any, ranks: Ranks, max_response: int
) -> dict[str, float]:
    """Share of each source's held-out prompts that are answered correctly, the same on every rank.
    Collective.
    """
    if not prompts.evaluation:
        raise MtopdError(
            "no source has held-out prompts; give data.sources an eval_path or a reasoning_gym "
            "dataset"
        )
    items = [(s, p) for s, source in enumerate(prompts.evaluation) for p in source]
    correct = torch.zeros(len(prompts.evaluation), dtype=torch.float64, device=ranks.device)
    for batch in plan_batches(len(items), _BATCH, ranks.world_size)[ranks.rank]:
        chosen = [items[i] for i in batch]
        responses = engine.generate(
            [Request(p.prompt_id, p.prompt_ids) for _, p in chosen],
            max_response=max_response,
            greedy=True,
        )
        for (source, prompt), response in zip(chosen, responses, strict=True):
            text = decode_response(tokenizer, response.response_ids)
            correct[source] += (
                response.finish_reason == "stop" and prompts.score(prompt, text) >= _CORRECT
            )
    dist.all_reduce(correct)
    counts = [len(source) for source in prompts.evaluation]
    return {
        name: c / n for name, c, n in zip(prompts.names, correct.tolist(), counts, strict=True) if n
    }
