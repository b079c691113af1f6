"""Accuracy on held-out prompts, scored by each source's own verifier: of the student between
iterations, of baselines once.

    mtopd evaluate RUN_DIR --iteration N

Runs inside ``mtopd consolidate`` and ``mtopd specialist``, too.  Differs from the textbook in: a response
that does not end by itself is wrong, whatever it says.  Of a response in several turns the last is
scored.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from mtopd.config import ConsolidateConfig
from mtopd.config_rollout import RolloutConfig
from mtopd.config_specialist import SpecialistConfig
from mtopd.data import CORRECT_SCORE, compared
from mtopd.files import write_atomic, write_json
from mtopd.megatron.agreement import apart, decide
from mtopd.megatron.parallel import Ranks
from mtopd.metrics_lines import EvaluationLine
from mtopd.progress import say
from mtopd.prompt_table import Prompts
from mtopd.rollout.engine import Engine, Request, Sampling
from mtopd.rollout.memory_log import MemoryLog
from mtopd.rollout.turns import Turns, environments
from mtopd.run_dir import RunDir, numbered

from .iteration import Iteration
from .session import Session
from .student import Student

Accuracy = dict[str, float]  # by domain: source, or source/teacher where it has several


def run(session: Session, iteration: Iteration) -> None:
    """Evaluate the student that ``iteration`` begins with, when it is due.  Collective."""
    every = session.config.evaluation.every
    num_done, num_iterations = iteration.number, session.config.train.num_iterations
    is_due = num_done in (0, num_iterations) or (every and num_done % every == 0)
    is_due = is_due and session.prompts.num_held_out > 0
    if is_due and not decide(session.ranks, iteration.evaluation.exists):
        evaluate_student(session, iteration)


def evaluate_student(session: Session, iteration: Iteration) -> None:
    """Evaluate the student that ``iteration`` begins with, whether it is due or not.  Collective."""
    with session.timed("evaluation", iteration):
        answers: list[Answer] = []
        with session.rollout_paused():  # of the next iteration: the same servers answer
            session.update_engine(iteration)
            found = measure(
                session.engine, session.prompts, session.student, session.config, answers=answers
            )
        write_answers(session.run, session.ranks, iteration.number, answers)
        if session.ranks.rank == 0:
            write(session.run, iteration.evaluation.stem, found.accuracy)
    session.metrics.write(EvaluationLine(found.accuracy, stopped=found.stopped), iteration.number)
    session.progress.note(f"iteration {iteration.number}: {format_accuracy(found.accuracy)}")
    if iteration.number == 0:
        for line in explain_zeros(found):
            say(line)


@dataclass(frozen=True)
class Result:
    """How one model answered the held-out prompts, by domain."""

    accuracy: Accuracy
    stopped: Mapping[str, float]  # share of its answers that ended by themselves
    counts: Mapping[str, int]  # of held-out prompts


@dataclass(frozen=True)
class Answer:
    """One answer to a held-out prompt, as it was scored."""

    prompt_id: str
    domain: str
    prompt: str  # as the model read it, special tokens included
    response: str  # of its last turn
    finish_reason: str  # one that does not end by itself scores 0
    found: str  # the part of the response that counts
    expected: str | None
    score: float


def measure(
    engine: Engine,
    prompts: Prompts,
    student: Student,
    config: ConsolidateConfig | SpecialistConfig,
    *,
    answers: list[Answer] | None = None,
) -> Result:
    """Answer every held-out prompt with ``engine`` and score it; the same on every rank, but for
    ``answers``, to which each adds those that it saw.

    The draws are the same for every model and iteration, so that two models differ by their weights
    alone.  Collective.
    """
    ranks, ending = student.ranks, student.ending(rollout_of(config))
    by_domain = prompts.held_out_by_domain(teachers_of(config))
    domains = [*by_domain]
    items = [(d, p) for d, asked in enumerate(by_domain.values()) for p in asked]
    asked = {i: (p, Request(i, p.prompt_id, p.prompt_ids)) for i, (_, p) in enumerate(items)}
    sums = torch.zeros(3, len(by_domain), dtype=torch.float64, device=ranks.device)
    answered, correct, stopped = sums
    with (
        apart(ranks) as name,
        contextlib.closing(
            Turns(
                asked,
                environments(config.data.sources),
                MemoryLog(name),
                sampling_of(config),
                tokenizer=student.tokenizer,
                ending=ending,
                name=f"evaluation {uuid.uuid4().hex}",
            )
        ) as turns,
    ):
        for response in turns.answers(engine):
            domain, prompt = items[response.sample_id]
            ended = response.finish_reason == "stop"
            text = ending.text(response.last_turn.tolist())
            score = prompts.score(prompt, text) if ended else 0.0
            answered[domain] += 1
            correct[domain] += score >= CORRECT_SCORE
            stopped[domain] += ended
            if answers is not None:
                counted, expected = compared(prompt, text)
                answers.append(
                    Answer(
                        prompt_id=prompt.prompt_id,
                        domain=domains[domain],
                        prompt=str(student.tokenizer.decode(list(prompt.prompt_ids))),
                        response=text,
                        finish_reason=response.finish_reason,
                        found=counted,
                        expected=expected,
                        score=score,
                    )
                )
    dist.all_reduce(sums)
    assert answered.sum() == len(items), f"{answered.tolist()} of {len(items)} answered"
    counts = {name: len(asked) for name, asked in by_domain.items()}

    def shares(found: torch.Tensor) -> dict[str, float]:
        numbers = zip(counts.items(), found.tolist(), strict=True)
        return {name: number / count for (name, count), number in numbers}

    return Result(shares(correct), shares(stopped), counts)


def teachers_of(config: ConsolidateConfig | SpecialistConfig) -> Sequence[str]:
    return [t.name for t in config.teachers] if isinstance(config, ConsolidateConfig) else ()


def rollout_of(config: ConsolidateConfig | SpecialistConfig) -> RolloutConfig | None:
    """A specialist has no rollouts: its answers end with an end token."""
    return config.rollout if isinstance(config, ConsolidateConfig) else None


def sampling_of(config: ConsolidateConfig | SpecialistConfig) -> Sampling:
    return Sampling(
        config.data.max_response,
        temperature=config.evaluation.temperature,
        top_p=config.evaluation.top_p,
    )


def explain_zeros(found: Result) -> list[str]:
    """A line for each domain of which no answer is right: it may be a matter of form."""
    return [
        f"{name}: 0 of {count} answers are right, {round(found.stopped[name] * count)} of them "
        "ended by themselves (others count as wrong); how an answer is found in a response: "
        'docs/data.md, "Answers"'
        for name, count in found.counts.items()
        if found.accuracy[name] == 0
    ]


def format_accuracy(found: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in found.items())


def write_answers(run: RunDir, ranks: Ranks, number: int, answers: Sequence[Answer]) -> None:
    """Keep this rank's answers of the evaluation after ``number`` iterations (of a specialist, train
    steps) in place of those of the one before.
    """
    path = run.answers(ranks.rank)
    if answers:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"after": number, **asdict(answer)}) for answer in answers]
        write_atomic(path, "".join(f"{line}\n" for line in lines).encode())
    else:
        path.unlink(missing_ok=True)
    if ranks.rank == 0:  # of a start with more ranks
        for rank, former in numbered(path.parent, ".jsonl").items():
            if rank >= ranks.world_size:
                former.unlink()


def write(run: RunDir, name: str, found: Mapping[str, Any]) -> None:
    path = run.path / "evaluations" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    write_json(path, found)
