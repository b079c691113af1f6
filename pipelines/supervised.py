"""Supervised training of one model on the student's trainer: the base, and each specialist before
it teaches.

    mtopd specialist CONFIG

Differs from the textbook in: a mini-batch is dealt to the sources by shares, and 1/N (N: tokens of
the whole mini-batch) stands in the token weights.  Ends as an HF checkpoint ``run/export/final``
and, where the config names one, as a teacher store.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from mtopd.config_file import load_config
from mtopd.config_specialist import SpecialistConfig, StopConfig
from mtopd.data import SupervisedExample
from mtopd.megatron import checkpoint
from mtopd.megatron.agreement import decide, see_start_alike
from mtopd.megatron.micro_batch import PackedMicroBatch, vocab_parallel_cross_entropy
from mtopd.megatron.packing import loss_rows_of_rank, pack_rows
from mtopd.metrics import MetricsWriter
from mtopd.metrics_lines import EvaluationLine, MemoryLine, SupervisedStepLine
from mtopd.objectives import CrossEntropy
from mtopd.progress import Progress, logs_json, say
from mtopd.prompt_table import Prompts
from mtopd.rollout.engine import Engine
from mtopd.run_dir import RunDir
from mtopd.step_sums import NonFiniteGradients
from mtopd.types import MtopdError, num_input_tokens

from . import evaluate
from .engines import ENGINES
from .export import export
from .student import Student, peak_host_bytes


def main(run_dir: Path, generation: int) -> None:
    """All train steps, on this rank."""
    run = RunDir(run_dir, generation)
    config: SpecialistConfig = load_config(run.config, [], SpecialistConfig)
    student = Student(config.student, config.train.optimizer, config.train.num_steps, config.seed)
    see_start_alike(student.ranks, run)
    prompts = Prompts.load(run, config.data)
    is_first = student.ranks.rank == 0
    as_json = logs_json(config.log_json)
    metrics = MetricsWriter(run.metrics, enabled=is_first, echo=as_json)
    progress = Progress(enabled=is_first and not as_json)
    checkpoints = checkpoint.CheckpointWriter(
        student.trainer, run, lambda published: checkpoint.prune(run, keep=config.checkpoint.keep)
    )
    shares = dict.fromkeys(prompts.names, 1.0)  # of each source in a mini-batch

    @functools.cache
    def engine() -> Engine:
        return ENGINES["embedded"](student)

    def evaluated() -> evaluate.Result:
        engine().update_weights(student.weights(), f"supervised/{generation}/0")
        answers: list[evaluate.Answer] = []
        found = evaluate.measure(engine(), prompts, student, config, answers=answers)
        evaluate.write_answers(run, student.ranks, num_done, answers)
        engine().release()
        return found

    num_done, has_ended = _resume(student, run, config, shares)
    for step in range(num_done, 0 if has_ended else config.train.num_steps):
        progress.phase("train", step, config.train.num_steps)
        line = train_step(student, prompts, config, shares, step)
        progress.advance(tokens=line.tokens, positions=line.positions)
        metrics.write(line, step, step=step)
        num_done = step + 1
        if reached_targets(config.train.stop, step, evaluated, shares, metrics):
            progress.note(f"every source is at its target accuracy after {num_done} steps")
            break
        checkpoints.advance()
        if num_done % config.checkpoint.every == 0 and num_done < config.train.num_steps:
            checkpoints.save(num_done, {"shares": shares})

    if not has_ended:  # from here a start with more steps goes on
        checkpoints.save(num_done, {"shares": shares, "ended": config.train.num_steps})
    checkpoints.close()
    if prompts.num_held_out:
        found = evaluated()
        metrics.write(EvaluationLine(found.accuracy, stopped=found.stopped), num_done)
        progress.note(
            f"accuracy after {num_done} steps: {evaluate.format_accuracy(found.accuracy)}"
        )
        for hint in evaluate.explain_zeros(found):
            say(hint)
        if is_first:
            evaluate.write(run, "final", found.accuracy)
    metrics.write(MemoryLine(peak_host_bytes(student.ranks)), num_done)
    metrics.close()
    progress.close()
    done = {"train_steps": {"planned": config.train.num_steps, "done": num_done}}
    export(student, run, run.path / "export" / "final", done)
    dist.destroy_process_group()


def train_step(
    student: Student,
    prompts: Prompts,
    config: SpecialistConfig,
    shares: Mapping[str, float],
    step: int,
) -> SupervisedStepLine:
    """One optimizer update on a mini-batch that is drawn by ``step``.  Collective."""
    started = time.perf_counter()
    trainer, size = student.trainer, config.train.global_batch_size
    drawn = draw(prompts, shares, size, seed=config.seed * 1_000_003 + step)
    batch = [prompts.train[source].example(row) for source, row in drawn]
    micro_batches, num_tokens = pack(batch, config, student)
    objective = CrossEntropy(
        vocab_size=student.vocab_size,
        tp_rank=student.ranks.tp_rank,
        cross_entropy=vocab_parallel_cross_entropy,
    )
    trainer.forward_backward(micro_batches, objective)
    sums = trainer.reduce(objective.finish)
    loss = objective.loss(sums)
    try:
        grad_norm, lr = trainer.optimizer_step(sums)
    except NonFiniteGradients as error:
        raise MtopdError(
            f"train step {step} was refused: {error}, the loss is {loss}; weights are as after the "
            "step before.  Lower train.optimizer.lr, or look at its examples: "
            f"{describe_rows(drawn, prompts.names)}"
        ) from None
    seconds = time.perf_counter() - started
    positions = sum(num_input_tokens(len(e.prompt_ids), len(e.response_ids)) for e in batch)
    return SupervisedStepLine(
        loss=loss,
        grad_norm=grad_norm,
        lr=lr,
        tokens=num_tokens,
        tokens_per_s=num_tokens / seconds,
        positions=positions,
        positions_per_s=positions / seconds,
        wall_s=seconds,
    )


def _resume(
    student: Student, run: RunDir, config: SpecialistConfig, shares: dict[str, float]
) -> tuple[int, bool]:
    """Restore the newest checkpoint: the steps it has, and whether this many planned ones end there
    (``train.stop`` may end them early).
    """
    newest = decide(student.ranks, lambda: checkpoint.newest(run))
    if newest is None:
        return 0, False
    state = checkpoint.load(student.trainer, run, newest)
    shares.update(state["shares"])
    return newest, state.get("ended") == config.train.num_steps


def draw(
    prompts: Prompts, shares: Mapping[str, float], size: int, *, seed: int
) -> list[tuple[int, int]]:
    """One mini-batch as (source, row): dealt to the sources by their shares (largest remainder),
    rows at random.
    """
    total = sum(shares.values())
    exact = [size * shares[name] / total for name in prompts.names]
    counts = [int(x) for x in exact]
    for i in sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])[: size - sum(counts)]:
        counts[i] += 1
    rng = random.Random(seed)
    return [
        (source, rng.randrange(len(table)))
        for source, (table, count) in enumerate(zip(prompts.train, counts, strict=True))
        for _ in range(count)
    ]


def describe_rows(drawn: list[tuple[int, int]], names: Sequence[str]) -> str:
    """The rows of each source, ascending."""
    rows = {
        name: sorted({row for source, row in drawn if source == number})
        for number, name in enumerate(names)
    }
    return "; ".join(
        f"{name} {', '.join(map(str, numbers))}" for name, numbers in rows.items() if numbers
    )


def pack(
    batch: list[SupervisedExample], config: SpecialistConfig, student: Student
) -> tuple[list[PackedMicroBatch], int]:
    """This dp rank's micro-batches, dealt by length: every rank has the same number; and the global
    token count.
    """
    ranks, size = student.ranks, config.train.micro_batch_size
    num_tokens = sum(len(e.response_ids) for e in batch)
    longest = max(num_input_tokens(len(e.prompt_ids), len(e.response_ids)) for e in batch)
    multiple = student.trainer.seq_length_multiple
    seq_length = -(-longest // multiple) * multiple
    ordered = sorted(batch, key=lambda e: (len(e.prompt_ids) + len(e.response_ids), e.prompt_ids))
    examples = ordered[ranks.dp_rank :: ranks.dp_size]
    micro_batches = []
    for start in range(0, len(examples), size):
        part = examples[start : start + size]
        labels: list[int] = []
        for example in part:
            for rows in loss_rows_of_rank(example, seq_length, ranks):
                labels += example.response_ids[rows.start : rows.stop]
        micro_batches.append(
            pack_rows(
                part,
                [1.0 / num_tokens] * len(part),
                shape=(size, seq_length),
                packed=False,
                ranks=ranks,
                payload=torch.tensor(labels, dtype=torch.long, device=ranks.device),
            )
        )
    return micro_batches, num_tokens


def reached_targets(
    stop: StopConfig | None,
    step: int,
    evaluated: Callable[[], evaluate.Result],
    shares: dict[str, float],
    metrics: MetricsWriter,
) -> bool:
    """Evaluate when due and shift ``shares`` towards the sources that lag; True when every source
    is at its target.
    """
    if stop is None or step + 1 < stop.first or (step + 1) % stop.every:
        return False
    result = evaluated()
    found = result.accuracy
    assert found.keys() == shares.keys()  # the config refuses a stop without held-out prompts
    metrics.write(EvaluationLine(found, dict(shares), result.stopped), step)
    below = {name: max(stop.accuracy - value, 0.0) for name, value in found.items()}
    floor = max(stop.min_share, 1e-9)  # all sources above: equal shares
    total = sum(below.values()) or 1.0
    shares.update({name: max(value / total, floor) for name, value in below.items()})
    return all(abs(value - stop.accuracy) <= stop.tolerance for value in found.values())
