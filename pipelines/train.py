"""Phase 3: train steps over teacher-sorted mini-batches; one teacher head on the device at a time.

    mtopd train RUN_DIR --iteration N

Differs from the textbook in: the loss is the whole distribution's divergence, not a sampled token's;
the batch is sorted by teacher, so that each head is loaded once per step; gradients are sums in
which 1/N already stands, so nothing is divided after backward; a step with NaN or inf is not taken.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator

from mtopd.dtypes import torch_dtype
from mtopd.hidden_cache import CachedStates, HiddenCacheReader, StateFormat, committed
from mtopd.megatron.agreement import STALE_WAITS_S, decide, digest_of, see_alike
from mtopd.metrics_lines import BadStepLine, TrainStepLine
from mtopd.objectives import OBJECTIVES, Objective, TeacherFacts
from mtopd.run_dir import is_sealed
from mtopd.step_sums import NonFiniteGradients
from mtopd.types import MtopdError, TeacherRun, TrainStepPlan

from .iteration import Iteration
from .micro_batches import Runs, num_positions, pack, plan, teacher_runs
from .sequence_filter import trained_samples
from .session import Session
from .staleness import fresh_samples


def run(session: Session, iteration: Iteration) -> None:
    """All train steps of the iteration, from sealed trajectories and hidden cache.  Collective."""
    decide(session.ranks, lambda: check_sealed(iteration))
    see_alike(
        session.ranks,
        lambda: committed(iteration.hidden_cache),
        lambda names: (digest_of(names), f"lists {len(names)} indexes of {iteration.hidden_cache}"),
        waits_s=STALE_WAITS_S,
    )
    samples = trained_samples(session, iteration, fresh_samples(session, iteration))
    plans = see_alike(
        session.ranks,
        lambda: plan(session, iteration, samples),
        lambda plans: (digest_of(plans), f"plans {len(plans)} train steps"),
    )
    runs = [teacher_runs(session, iteration, step_plan) for step_plan in plans]
    if heads := session.teachers.heads:
        per_step = [dict.fromkeys(run.teacher_index for run in _flat(part)) for part in runs]
        heads.expect(itertools.chain(*per_step))
    with open_hidden_states(session, iteration) as hidden_states:
        if hidden_states:
            hidden_states.prefetch(runs[0])
        for number, step_plan in enumerate(plans):
            if hidden_states and number + 1 < len(plans):
                hidden_states.prefetch(runs[number + 1])
            session.check_rollout()
            step = iteration.step_number(number)
            line = train_step(session, iteration, step_plan, runs[number], hidden_states, step)
            session.metrics.write(line, iteration.number, step=step)
            session.progress.advance(
                tokens=sum(step_plan.num_tokens.values()),
                positions=num_positions(iteration, step_plan),
            )


def check_sealed(iteration: Iteration) -> None:
    for folder in (iteration.trajectories, iteration.hidden_cache):
        if not is_sealed(folder):
            raise MtopdError(f"{folder} is not sealed; run the phase that writes it first")


def train_step(
    session: Session,
    iteration: Iteration,
    step_plan: TrainStepPlan,
    runs: Runs,
    hidden_states: CachedStates | None,
    step: int,
) -> TrainStepLine | BadStepLine:
    """One optimizer update, or none where something is NaN or inf.  Collective."""
    started = time.perf_counter()
    trainer = session.student.trainer
    objective = build_objective(session, iteration, runs, hidden_states, step)
    micro_batches = pack(session, iteration, step_plan, runs)
    trainer.forward_backward(micro_batches, objective)
    sums = trainer.reduce(objective.finish)
    heads = objective.head_metrics(sums)
    try:
        objective.refuse_non_finite(sums)
        grad_norm, lr = trainer.optimizer_step(sums)
    except NonFiniteGradients as error:
        why = f"{error}; {objective.explain_non_finite()}"
        session.skip_step(step, why)
        return BadStepLine(refused=why, bad_steps=session.num_bad_steps, heads=heads)
    num_tokens = sum(step_plan.num_tokens.values())
    positions = num_positions(iteration, step_plan)
    divergence = objective.metrics(sums, step_plan)
    wall_s = time.perf_counter() - started
    return TrainStepLine(
        **vars(divergence),
        heads=heads,
        tokens=num_tokens,
        tokens_per_s=num_tokens / wall_s,
        positions=positions,
        positions_per_s=positions / wall_s,
        grad_norm=grad_norm,
        lr=lr,
        micro_batches=len(micro_batches),
        waste=step_plan.waste,
        wall_s=wall_s,
    )


def build_objective(
    session: Session,
    iteration: Iteration,
    runs: Runs,
    hidden_states: CachedStates | None,
    step: int,
) -> Objective:
    """The loss of one train step."""
    floors = session.probes.noise_floors
    stores = session.teachers.stores
    return OBJECTIVES["reverse_kl"](
        teachers=[TeacherFacts(store.name, floors.get(i)) for i, store in enumerate(stores)],
        heads=session.teachers.heads,
        hidden_states=hidden_states,
        vocab_size=session.student.vocab_size,
        tp_group=session.ranks.tp_group,
        device=session.ranks.device,
        runs=_flat(runs),
        seed=iteration.step_seed(step),
    )


@contextlib.contextmanager
def open_hidden_states(session: Session, iteration: Iteration) -> Iterator[CachedStates | None]:
    """The iteration's hidden states; ranks before the last stage never open them."""
    teachers = session.teachers
    if not session.ranks.is_last_stage:
        yield None
        return
    formats = [
        StateFormat(store.hidden_size, torch_dtype(teachers.hidden_dtype(i)))
        for i, store in enumerate(teachers.stores)
    ]
    with (
        HiddenCacheReader(iteration.hidden_cache) as reader,
        CachedStates(reader, formats, session.ranks, iteration.number) as states,
    ):
        yield states


def _flat(runs: Runs) -> list[TeacherRun]:
    return [*itertools.chain(*runs)]
