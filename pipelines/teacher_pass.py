"""Phase 2: every teacher reads its own trajectories; its last hidden states go to the cache.

    mtopd teacher-pass RUN_DIR --iteration N

Differs from the textbook in: a teacher is never whole on a device, its layers are streamed through
all ranks while its tokens wait; what is kept is the last hidden states, never logits; samples whose
rows the cache holds soundly are not computed again.

``rollout.overlap_teacher_pass``: the ranks have nothing to do while servers answer, so the pass begins
on what is sealed.  The iteration's shards are cut into quarters (``planning.quarters``), and a quarter
is read as soon as it is whole.  Batches hold samples of one quarter, with the option and without it,
so a hidden state has the same bits whenever its quarter was read, and the trained weights are the
same.  Why quarters: reading one streams its teachers once more, out of storage where they do not stay
in host memory.  So a teacher is streamed four times in an iteration at most, and where sources have
teachers of their own, answered one source after the other, hardly more than once.  The rollout's end
waits for the quarter that is being read then, and no longer.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence, Set

import torch.distributed as dist

from mtopd.dtypes import item_size
from mtopd.hidden_cache import HiddenCacheReader, merge_index, recover
from mtopd.megatron.agreement import decide, digest_of, gather, see_alike
from mtopd.metrics_lines import PassMetrics, TeacherPassLine
from mtopd.planning import plan_pass, quarters
from mtopd.rollout.background import Background
from mtopd.run_dir import is_sealed
from mtopd.trajectories import TokenStore, sealed_shards, shard_is_sealed

from .iteration import Iteration
from .session import Session
from .teacher_stream import TeacherPlan, forward_teacher

logger = logging.getLogger(__name__)
_LOOK_S = 0.25  # between two looks for a whole quarter

Quarter = Sequence[str]  # names of its shards


def run(session: Session, iteration: Iteration) -> None:
    """Fill and seal ``hidden_cache/`` of the iteration; check a sealed one and compute again what
    is damaged.  Collective.
    """
    folder, tokens = iteration.hidden_cache, iteration.tokens
    save_what_was_left(session, iteration)
    is_changed = False
    for name, metrics in read_quarters(session, iteration, tokens, quarters([*tokens.shards])):
        session.metrics.write(TeacherPassLine({name: metrics}), iteration.number, part=name)
        is_changed = True
    if session.ranks.rank == 0 and (is_changed or not is_sealed(folder)):
        if folder.exists():
            merge_index(folder)
        session.run.seal(folder)
    dist.barrier()


def run_beside(session: Session, iteration: Iteration) -> None:
    """With ``rollout.overlap_teacher_pass``, read the quarters of the iteration that are whole while the
    others are still being answered; ``run`` does the rest.  Returns when the rollout is over, or
    nothing but its last quarter is left.  Collective.
    """
    rollout = session.rollout
    if rollout is None or not session.config.rollout.overlap_teacher_pass:
        return
    answering = rollout.background
    assert answering is not None, "an engine of these ranks is refused at load"
    save_what_was_left(session, iteration)
    waiting = dict(enumerate(quarters(rollout.shard_names)))
    while whole := decide(session.ranks, lambda: wait_for_quarters(iteration, waiting, answering)):
        of_round = [waiting.pop(number) for number in whole]
        tokens = iteration.tokens_of([name for quarter in of_round for name in quarter])
        part = f"start {session.run.generation}, quarters {whole}"
        started = time.perf_counter()
        for name, metrics in read_quarters(session, iteration, tokens, of_round):
            ended = time.perf_counter()
            hidden_s = max(min(ended, answering.ended_at or ended) - started, 0.0)
            line = TeacherPassLine({name: dataclasses.replace(metrics, hidden_s=hidden_s)})
            session.metrics.write(line, iteration.number, part=f"{name}, {part}")
            started = ended


def wait_for_quarters(
    iteration: Iteration, waiting: Mapping[int, Quarter], answering: Background
) -> list[int]:
    """Numbers of the quarters that are whole, as soon as one is; none where nothing but the last is left
    or the rollout is over: then the pass itself reads what waits.
    """
    folder = iteration.trajectories
    while len(waiting) > 1 and not answering.is_over(within_s=_LOOK_S):
        listed = {*sealed_shards(folder)}
        whole = [
            number
            for number, quarter in waiting.items()
            if listed.issuperset(quarter) and all(shard_is_sealed(folder, n) for n in quarter)
        ]
        if whole:
            return whole if len(whole) < len(waiting) else []
    return []


def save_what_was_left(session: Session, iteration: Iteration) -> None:
    """Commit the rows that a killed start has left.  Collective."""

    def recovered() -> None:
        if not iteration.hidden_cache.exists():
            return
        found = recover(iteration.hidden_cache)
        if found.segments:
            logger.warning(
                "hidden cache: a killed start left %d segments; %d samples saved, %d to compute again",
                *(len(part) for part in (found.segments, found.salvaged, found.dropped)),
            )

    decide(session.ranks, recovered)


def read_quarters(
    session: Session, iteration: Iteration, tokens: TokenStore, parts: Sequence[Quarter]
) -> Iterator[tuple[str, PassMetrics]]:
    """Stream each teacher over those of its samples in ``parts``, whole quarters, that have no rows
    yet; gives its name and what was done, teacher after teacher.  Collective.
    """
    stores, stream = session.teachers.stores, session.teachers.stream
    missing = missing_samples(session, iteration, tokens)
    teacher_plans = see_alike(
        session.ranks,
        lambda: plan(session, tokens, parts, missing),
        lambda plans: (digest_of(*map(plan_facts, plans)), f"plans {len(plans)} teachers"),
    )
    if teacher_plans:
        stream.expect([v.teacher for v in teacher_plans for _ in v.waves[0]])
    for teacher_plan in teacher_plans:
        session.check_rollout()
        metrics = forward_teacher(session, iteration, tokens, teacher_plan)
        yield stores[teacher_plan.teacher].name, metrics


def plan(
    session: Session, tokens: TokenStore, parts: Sequence[Quarter], missing: Set[int]
) -> list[TeacherPlan]:
    """The teachers that have something to do, in index order; the same on every rank.

    Batches are planned over all of a teacher's samples in a quarter, whatever the cache holds: a
    repaired cache is bit-identical to an uninterrupted one.
    """
    offload, teachers = session.config.teacher_offload, session.teachers
    by_quarter = [
        [tokens.samples[sample_id] for name in part for sample_id in tokens.shards[name]]
        for part in parts
    ]
    teacher_plans = []
    for index, store in enumerate(teachers.stores):
        own = [[s for s in part if s.teacher_index == index] for part in by_quarter]
        samples = [*itertools.chain.from_iterable(own)]
        places = {i for i, s in enumerate(samples) if s.sample_id in missing}
        if places:
            waves = plan_pass(
                [[sample.num_teacher_tokens for sample in part] for part in own],
                teachers.meshes[index].num_replicas,
                batch_tokens=offload.batch_tokens,
                token_bytes=store.hidden_size * item_size(store.dtype),
                activation_budget=offload.activation_budget,
                requested=places,
            )
            teacher_plans.append(
                TeacherPlan(index, samples, {samples[i].sample_id for i in places}, waves)
            )
    return teacher_plans


def plan_facts(teacher_plan: TeacherPlan) -> tuple[object, ...]:
    """What all ranks have to plan alike, in an order of its own."""
    sample_ids = [sample.sample_id for sample in teacher_plan.samples]
    return (teacher_plan.teacher, sample_ids, sorted(teacher_plan.missing), teacher_plan.waves)


def missing_samples(session: Session, iteration: Iteration, tokens: TokenStore) -> set[int]:
    """Ids of samples without sound rows in the cache, the same on every rank; each checks its part.
    Collective.
    """
    ranks = session.ranks
    part = [*tokens.samples.values()][ranks.rank :: ranks.world_size]

    def look() -> list[int]:
        with HiddenCacheReader(iteration.hidden_cache) as reader:
            causes = reader.missing(
                [(iteration.cache_key(s), s.sample_id, iteration.number) for s in part]
            )
        if is_sealed(iteration.hidden_cache):
            for (_, sample_id, _), cause in causes.items():
                logger.warning("hidden cache: sample %d is computed again: %s", sample_id, cause)
        return [sample_id for _, sample_id, _ in causes]

    return {sample_id for found in gather(ranks, look) for sample_id in found}
