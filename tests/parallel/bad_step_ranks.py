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
from mtopd.pipelines import teacher_pass, train
from mtopd.pipelines.job import Job
from mtopd.progress import quiet_libraries
from mtopd.trajectories import read_metadata, sample_metadata
from mtopd.types import MtopdError


def poison_cache(job: Job, victim: int) -> None:
    """A sound entry of one sample whose second row is NaN; the pass then leaves it as it is."""
    samples = {s.sample_id: s for s in sample_metadata(read_metadata(job.run.trajectories(0)))}
    store = job.stores[samples[victim].teacher_index]
    if job.ranks.rank == 0:
        rows = np.zeros((samples[victim].num_loss_tokens, store.hidden_size), np.float32)
        rows[1] = np.nan
        key = job.cache_key(0, samples[victim])
        with HiddenCacheWriter(
            job.run.hidden_cache(0), writer="poison", generation=1, hidden_dtype="float32"
        ) as writer:
            writer.put(store.fingerprint, store.hidden_size, key, victim, 0, rows)
    dist.barrier()


def main() -> None:
    quiet_libraries()
    spec = json.loads(sys.argv[1])
    job = Job(Path(spec["run"]), 1)
    tokens = job.tokens(0)
    samples = sample_metadata(read_metadata(job.run.trajectories(0)))
    victim = next(s for s in samples if s.num_loss_tokens > 3 and s.teacher_index == 1)
    poison_cache(job, victim.sample_id)
    teacher_pass.run(job, 0)
    (plan,) = train.plan(job, samples, seed=0)

    def say(text: str) -> None:
        if job.ranks.rank == 0:
            print(f"PASSED {text}", flush=True)

    def step(number: int) -> dict:
        with train.open_cache(job, 0) as reader, train.CachedStates(job, reader, 0) as states:
            runs = train.runs_of_step(job, plan, 0)
            return train.train_step(job, plan, runs, tokens, states, number)

    def refusal(number: int) -> str:
        before = {name: tensor.clone() for name, tensor in job.student.weights().items()}
        done = job.trainer.steps_done
        try:
            step(number)
        except MtopdError as error:
            assert job.trainer.steps_done == done
            for name, tensor in job.student.weights().items():
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
    job.config = job.config.model_copy(
        update={"train": job.config.train.model_copy(update={"max_bad_steps": 1})}
    )
    values = step(0)
    assert (
        values["bad_steps"] == 1
        and wanted[:-1] in str(values["refused"])
        and job.state()["bad_steps"] == 1
    )
    assert wanted in refusal(1)
    say("one step left out")

    # Sound states again; then a token whose embedding is NaN poisons every sample that reads it.
    job.cache_key, original = (lambda *args: original(*args)[::-1]), job.cache_key
    for seal in ("SEALED",) if job.ranks.rank == 0 else ():
        (job.run.hidden_cache(0) / seal).unlink()
    dist.barrier()
    teacher_pass.run(job, 0)
    forward_backward = job.trainer.forward_backward

    def overflow(*args: object) -> dict:
        totals = forward_backward(*args)
        if job.ranks.rank == 0:
            next(iter(job.trainer.chunks[0].parameters())).main_grad.view(-1)[0] = torch.inf
        return totals

    job.trainer.forward_backward = overflow
    said = refusal(2)
    assert "no sample's loss is NaN or inf: the gradients overflowed" in said, said
    say(said)

    def overflow_last(*args: object) -> dict:
        """In what tp ranks hold alike, and on one of them: the norm counts it on another."""
        totals = forward_backward(*args)
        if job.ranks.rank == job.ranks.world_size - 1:
            job.trainer.chunks[-1].decoder.final_layernorm.weight.main_grad[0] = torch.inf
        return totals

    job.trainer.forward_backward = overflow_last
    said = refusal(2)
    assert f"gradients are NaN or inf on 1 of {job.ranks.world_size} ranks" in said, said

    # Left out, it leaves no trace: the next step is taken.
    job.config = job.config.model_copy(
        update={"train": job.config.train.model_copy(update={"max_bad_steps": 2})}
    )
    assert step(2)["bad_steps"] == 2
    job.trainer.forward_backward = forward_backward
    before = job.trainer.steps_done
    values = step(3)
    assert (
        values["loss"] > 0 and values["grad_norm"] > 0 and set(values["head_loads"].values()) == {1}
    ), values
    assert job.trainer.steps_done == before + 1

    if job.trainer.chunks[0].pre_process:
        with torch.no_grad():
            weight = job.trainer.chunks[0].embedding.word_embeddings.weight
            token = int(tokens.tokens(victim.sample_id).prompt_ids[0])
            if job.ranks.tp_rank == token // len(weight):
                weight[token % len(weight)] = torch.nan
    said = refusal(3)
    assert "the student's hidden states in sample" in said and str(victim.sample_id) in said, said
    say(said)
    job.metrics.close()
    job.checkpoints.close()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
