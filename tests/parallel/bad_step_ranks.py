"""Worker of test_bad_steps: one run whose cache holds a NaN row, then whose student and gradients
are poisoned.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from mtopd.hidden_cache import HiddenCacheWriter
from mtopd.metrics_lines import to_values
from mtopd.pipelines import micro_batches, teacher_pass, train
from mtopd.pipelines.iteration import Iteration
from mtopd.pipelines.session import Session
from mtopd.progress import quiet_libraries
from mtopd.types import MtopdError
from tests.small_models import whole


def poison_cache(session: Session, iteration: Iteration, victim: int) -> None:
    """A sound entry of one sample whose second row is NaN; the pass then leaves it as it is."""
    samples = iteration.tokens.samples
    store = session.teachers.stores[samples[victim].teacher_index]
    if session.ranks.rank == 0:
        rows = np.zeros((samples[victim].num_loss_tokens, store.hidden_size), np.float32)
        rows[1] = np.nan
        key = iteration.cache_key(samples[victim])
        with HiddenCacheWriter(
            iteration.hidden_cache, writer="poison", generation=1, hidden_dtype="float32"
        ) as writer:
            writer.put(store.fingerprint, store.hidden_size, key, victim, 0, rows)
    dist.barrier()


def main() -> None:
    quiet_libraries()
    spec = json.loads(sys.argv[1])
    session = Session(Path(spec["run"]), 1)
    iteration, trainer = session.iteration(0), session.student.trainer
    samples = iteration.samples
    victim = next(s for s in samples if s.num_loss_tokens > 3 and s.teacher_index == 1)
    poison_cache(session, iteration, victim.sample_id)
    teacher_pass.run(session, iteration)
    (plan,) = micro_batches.plan(session, iteration, iteration.samples)

    def say(text: str) -> None:
        if session.ranks.rank == 0:
            print(f"PASSED {text}", flush=True)

    def step(number: int) -> dict:
        with train.open_hidden_states(session, iteration) as states:
            runs = micro_batches.teacher_runs(session, iteration, plan)
            return to_values(train.train_step(session, iteration, plan, runs, states, number))

    def refusal(number: int) -> str:
        before = whole(session.student.weights())
        done = trainer.steps_done
        try:
            step(number)
        except MtopdError as error:
            assert trainer.steps_done == done
            for name, tensor in whole(session.student.weights()).items():
                assert torch.equal(tensor, before[name]) or tensor.isnan().any(), (
                    f"{name} was touched"
                )
            return str(error)
        raise AssertionError("the step was not refused")

    said = refusal(0)
    wanted = f"cached hidden states of teacher 't1' in sample {victim.sample_id};"
    assert wanted in said and "max_bad_steps" in said, said
    say(said)

    # One such step is allowed: it is left out and counted, and the next is refused again.
    session.config = session.config.model_copy(
        update={"train": session.config.train.model_copy(update={"max_bad_steps": 1})}
    )
    values = step(0)
    assert (
        values["bad_steps"] == 1
        and wanted[:-1] in str(values["refused"])
        and session.checkpoint_state()["bad_steps"] == 1
    )
    assert wanted in refusal(1)
    say("one step left out")

    # Sound states again; then a token whose embedding is NaN poisons every sample that reads it.
    iteration.cache_key, original = (lambda *args: original(*args)[::-1]), iteration.cache_key
    for seal in ("SEALED",) if session.ranks.rank == 0 else ():
        (iteration.hidden_cache / seal).unlink()
    dist.barrier()
    teacher_pass.run(session, iteration)
    forward_backward = trainer.forward_backward

    def overflow(*args: object) -> None:
        forward_backward(*args)
        if session.ranks.rank == 0:
            next(iter(trainer.chunks[0].parameters())).main_grad.view(-1)[0] = torch.inf

    trainer.forward_backward = overflow
    said = refusal(2)
    assert "no sample's loss is NaN or inf: the gradients overflowed" in said, said
    say(said)

    def overflow_last(*args: object) -> None:
        """In what tp ranks hold alike, and on one of them: the norm counts it on another."""
        forward_backward(*args)
        if session.ranks.rank == session.ranks.world_size - 1:
            trainer.chunks[-1].decoder.final_layernorm.weight.main_grad[0] = torch.inf

    trainer.forward_backward = overflow_last
    said = refusal(2)
    assert f"gradients are NaN or inf on 1 of {session.ranks.world_size} ranks" in said, said

    # Left out, it leaves no trace: the next step is taken.
    session.config = session.config.model_copy(
        update={"train": session.config.train.model_copy(update={"max_bad_steps": 2})}
    )
    assert step(2)["bad_steps"] == 2
    trainer.forward_backward = forward_backward
    before = trainer.steps_done
    values = step(3)
    assert (
        values["loss"] > 0 and values["grad_norm"] > 0 and set(values["head_loads"].values()) == {1}
    ), values
    assert trainer.steps_done == before + 1

    if trainer.chunks[0].pre_process:
        with torch.no_grad():
            weight = trainer.chunks[0].embedding.word_embeddings.weight
            token = int(iteration.tokens.tokens(victim.sample_id).prompt_ids[0])
            if session.ranks.tp_rank == token // len(weight):
                weight[token % len(weight)] = torch.nan
    said = refusal(3)
    assert "the student's hidden states in sample" in said and str(victim.sample_id) in said, said
    say(said)
    # `teacher-pass` and `train` alone: no rank holds a whole model for sampling that nobody asks for.
    assert session.engine.version is None
    session.metrics.close()
    session.checkpoints.close()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
