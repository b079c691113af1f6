"""Greedy accuracy on held-out prompts, scored by each dataset's own verifier: of the student between
iterations, of baselines once.

Runs inside ``mtopd consolidate`` and ``mtopd specialist``.  Differs from the textbook in: a response
that does not end by itself is wrong, whatever it says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from mtopd.data import CORRECT_SCORE
from mtopd.files import write_json
from mtopd.hf_checkpoint import average_weights, read_weights
from mtopd.megatron.parallel import Ranks
from mtopd.metrics_lines import EvaluationLine
from mtopd.planning import plan_batches
from mtopd.prompt_table import Prompts
from mtopd.rollout.engine import Engine, Request
from mtopd.run_dir import RunDir
from mtopd.tokenizer import decode_response
from mtopd.types import MtopdError

from .engines import ENGINES
from .iteration import Iteration
from .session import Session
from .student import Student

_BATCH = 64
Accuracy = dict[str, float]  # by source


def run(session: Session, iteration: Iteration) -> None:
    """Evaluate the student that ``iteration`` begins with, when it is due.  Collective."""
    every = session.config.evaluation.every
    num_done, num_iterations = iteration.number, session.config.train.num_iterations
    is_due = num_done in (0, num_iterations) or (every and num_done % every == 0)
    if not is_due or iteration.evaluation.exists():
        return
    with session.timed("evaluation", iteration):
        found = accuracy(
            session.engine,
            session.prompts,
            session.student,
            session.config.data.max_response,
        )
        if session.ranks.rank == 0:
            write(session.run, iteration.evaluation.stem, found)
    session.metrics.write(EvaluationLine(found), num_done)
    session.progress.note(f"iteration {num_done}: {format_accuracy(found)}")


def baselines(session: Session) -> None:
    """Evaluate the configured HF checkpoints and their weight average once, one model in memory at
    a time.  Collective.
    """
    config = session.config.evaluation
    if not config.baselines or (session.run.path / "evaluations" / "baselines.json").exists():
        return
    student, max_response = session.student, session.config.data.max_response
    with session.timed("baselines", session.iteration(0)):
        engine = ENGINES[session.config.rollout.engine](student)

        def evaluate(weights: Mapping[str, torch.Tensor]) -> Accuracy:
            engine.update_weights(weights)
            return accuracy(engine, session.prompts, student, max_response)

        results = {name: evaluate(read_weights(f)) for name, f in config.baselines.items()}
        average = None
        if config.weight_average:
            folders = [config.baselines[name] for name in config.weight_average]
            average = evaluate(average_weights(folders))
        if session.ranks.rank == 0:
            write(session.run, "baselines", {"models": results, "weight_average": average})
    for name, found in (*results.items(), ("weight average", average)):
        if found is not None:
            session.progress.note(f"{name}: {format_accuracy(found)}")


def accuracy(engine: Engine, prompts: Prompts, student: Student, max_response: int) -> Accuracy:
    """Share of each source's held-out prompts that ``engine`` answers correctly, the same on every
    rank.  Collective.
    """
    if not prompts.evaluation:
        raise MtopdError(
            "no source has held-out prompts; give data.sources an eval_path or a "
            "reasoning_gym dataset"
        )
    ranks: Ranks = student.ranks
    items = [(s, p) for s, source in enumerate(prompts.evaluation) for p in source]
    correct = torch.zeros(len(prompts.evaluation), dtype=torch.float64, device=ranks.device)
    for batch in plan_batches(len(items), _BATCH, ranks.world_size)[ranks.rank]:
        chosen = [items[i] for i in batch]
        requests = [Request(p.prompt_id, p.prompt_ids) for _, p in chosen]
        responses = engine.generate(requests, max_response=max_response, greedy=True)
        for (source, prompt), response in zip(chosen, responses, strict=True):
            if response.finish_reason == "stop":
                text = decode_response(student.tokenizer, response.response_ids)
                correct[source] += prompts.score(prompt, text) >= CORRECT_SCORE
    dist.all_reduce(correct)
    counts = [len(source) for source in prompts.evaluation]
    return {
        name: num_correct / count
        for name, num_correct, count in zip(prompts.names, correct.tolist(), counts, strict=True)
        if count
    }


def format_accuracy(found: Accuracy) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in found.items())


def write(run: RunDir, name: str, found: Mapping[str, Any]) -> None:
    path = run.path / "evaluations" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    write_json(path, found)
