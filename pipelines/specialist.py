"""Supervised training of one model on the student's trainer: the base, and each specialist before
it teaches.

Ends as an HF checkpoint ``run/export/<steps>`` and, where the config names one, as a teacher store.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from mtopd.config import SpecialistConfig, load_config
from mtopd.data import SupervisedExample
from mtopd.megatron import checkpoint
from mtopd.megatron.cross_entropy import CrossEntropy
from mtopd.megatron.train_step import NonFiniteGradients, PackedMicroBatch
from mtopd.metrics import MetricsWriter
from mtopd.metrics_lines import EvaluationLine, SupervisedStepLine
from mtopd.progress import Progress
from mtopd.run_dir import RunDir
from mtopd.types import MtopdError

from .evaluate import accuracy
from .job import Student, write_evaluation
from .packing import pack_rows, rows_here
from .prompts import Prompts

_CHECKPOINT_EVERY = 100  # train steps
_CHECKPOINTS_KEPT = 2


def main(run_dir: Path, generation: int) -> None:
    """All train steps, on this rank."""
    run = RunDir(run_dir, generation)
    config: SpecialistConfig = load_config(run.config, [], SpecialistConfig)
    student = Student(config.student, config.train.optimizer, config.train.num_steps, config.seed)
    prompts = Prompts.load(run, config.data)
    first = student.ranks.rank == 0
    metrics = MetricsWriter(run.metrics, enabled=first, echo=config.log_json)
    progress = Progress(enabled=first and not config.log_json)
    objective = CrossEntropy(vocab_size=student.vocab_size, tp_rank=student.ranks.tp_rank)
    shares = dict.fromkeys(prompts.names, 1.0)

    checkpoints = checkpoint.CheckpointWriter(
        student.trainer, run, lambda published: checkpoint.prune(run, keep=_CHECKPOINTS_KEPT)
    )

    start = _resume(student, run, shares)
    for step in range(start, config.train.num_steps):
        progress.phase("train", step, config.train.num_steps)
        started = time.perf_counter()
        drawn = draw(
            prompts, shares, config.train.global_batch_size, seed=config.seed * 1_000_003 + step
        )
        batch = [prompts.train[source].example(row) for source, row in drawn]
        micro_batches, num_tokens = pack(batch, config, student)
        sums = student.trainer.reduce_metrics(
            student.trainer.forward_backward(micro_batches, objective), ["loss"]
        )
        try:
            grad_norm, lr = student.trainer.optimizer_step()
        except NonFiniteGradients as error:
            raise MtopdError(
                f"train step {step} was refused: {error}, the loss is {sums['loss']}; weights are "
                "as after the step "
                "before.  Lower train.optimizer.lr, or look at its examples: "
                f"{named(drawn, prompts.names)}"
            ) from None
        progress.advance(tokens=num_tokens)
        seconds = time.perf_counter() - started
        line = SupervisedStepLine(
            loss=sums["loss"], grad_norm=grad_norm, lr=lr, tokens=num_tokens, wall_s=seconds
        )
        metrics.write(line, step, step=step)
        if _reached_target(config, student, prompts, shares, step, metrics):
            progress.note(f"every source is at its target accuracy after {step + 1} steps")
            break
        checkpoints.advance()
        if (step + 1) % _CHECKPOINT_EVERY == 0:
            checkpoints.save(step + 1, {"shares": shares})

    checkpoints.close()
    student.update_weights()
    found = accuracy(
        student.engine, prompts, student.tokenizer, student.ranks, config.data.max_response
    )
    progress.note("  ".join(f"{name} {value:.3f}" for name, value in found.items()))
    if student.ranks.rank == 0:
        write_evaluation(run, "final", found)
    metrics.close()
    progress.close()
    student.export(run, run.path / "export" / "final")
    dist.destroy_process_group()


def _resume(student: Student, run: RunDir, shares: dict[str, float]) -> int:
    newest = [checkpoint.newest(run)]
    dist.broadcast_object_list(newest, src=0)
    if newest[0] is None:
        return 0
    shares.update(checkpoint.load(student.trainer, run, newest[0])["shares"])
    return newest[0]


def draw(
    prompts: Prompts, shares: dict[str, float], size: int, *, seed: int
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


def named(drawn: list[tuple[int, int]], names: Sequence[str]) -> str:
    """The rows of each source, ascending."""
    rows = {
        name: sorted({row for source, row in drawn if source == number})
        for number, name in enumerate(names)
    }
    return "; ".join(f"{name} {', '.join(map(str, of))}" for name, of in rows.items() if of)


def pack(
    batch: list[SupervisedExample], config: SpecialistConfig, student: Student
) -> tuple[list[PackedMicroBatch], int]:
    """This dp rank's micro-batches, dealt by length: every rank has the same number; and the global
    token count.
    """
    ranks, size = student.ranks, config.train.micro_batch_size
    num_tokens = sum(len(e.response_ids) for e in batch)
    multiple = student.trainer.seq_length_multiple
    longest = max(len(e.prompt_ids) + len(e.response_ids) - 1 for e in batch)
    seq_length = -(-longest // multiple) * multiple
    mine = sorted(batch, key=lambda e: (len(e.prompt_ids) + len(e.response_ids), e.prompt_ids))[
        ranks.dp_rank :: ranks.dp_size
    ]
    micro_batches = []
    for start in range(0, len(mine), size):
        part = mine[start : start + size]
        whole = [
            _WholeAnswer(e.prompt_ids, e.response_ids, [1] * len(e.response_ids)) for e in part
        ]
        labels: list[int] = []
        for example in whole:
            for here in rows_here(example, seq_length, ranks):
                labels += example.response_ids[here.first : here.stop]
        micro_batches.append(
            pack_rows(
                whole,
                [1.0 / num_tokens] * len(part),
                shape=(size, seq_length),
                packed=False,
                ranks=ranks,
                payload=torch.tensor(labels, dtype=torch.long, device=ranks.device),
            )
        )
    return micro_batches, num_tokens


class _WholeAnswer(NamedTuple):
    """An example as ``pack_rows`` takes it: every token of the answer is trained."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    loss_mask: Sequence[int]


def _reached_target(
    config: SpecialistConfig,
    student: Student,
    prompts: Prompts,
    shares: dict[str, float],
    step: int,
    metrics: MetricsWriter,
) -> bool:
    """Evaluate when due, shift the shares towards the sources that lag; True when every source
    reached its target.
    """
    stop = config.train.stop
    if stop is None or step + 1 < stop.first or (step + 1) % stop.every:
        return False
    student.update_weights()
    found = accuracy(
        student.engine, prompts, student.tokenizer, student.ranks, config.data.max_response
    )
    metrics.write(EvaluationLine(found, shares), step)
    below = {name: max(stop.accuracy - value, 0.0) for name, value in found.items()}
    floor = max(stop.min_share, 1e-9)  # all sources above: equal shares
    shares.update(
        {name: max(value / (sum(below.values()) or 1.0), floor) for name, value in below.items()}
    )
    return all(abs(value - stop.accuracy) <= stop.tolerance for value in found.values())
