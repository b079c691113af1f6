"""What a run did, as numbers: the contents of report.json. What was not measured is null."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from mtopd.metrics import Entry
from mtopd.metrics_lines import (
    BadStepLine,
    EvaluationLine,
    MemoryLine,
    PhaseLine,
    RolloutLine,
    SequenceFilterLine,
    StalenessLine,
    TrainStepLine,
    WeightUpdateLine,
)
from mtopd.report.record import Accuracy, Domain, Record, RunRecord, SpecialistRecord
from mtopd.run_dir import SCHEMA

Report = Mapping[str, Any]  # as JSON has it

_END_STEPS = 10  # at most so many train steps at either end of the run make its first and last KL
_MIN_GAIN = 0.05  # where the teacher is less than this above the base, recovery says nothing
_LAST_PHASE = "update_weights"  # ends an iteration


def build_report(record: RunRecord) -> Report:
    """report.json, schema 1."""
    steps, passes = record.lines(TrainStepLine), [metrics for _, metrics in record.passes]
    rollouts, memory = record.lines(RolloutLine), record.lines(MemoryLine)
    wall_s: dict[str, list[float]] = defaultdict(list)
    for phase in record.lines(PhaseLine):
        wall_s[phase.name].append(phase.wall_s)
    found = record.domains()
    domains = {domain.name: _domain(record, domain) for domain in found}
    recovered = [d["recovery"] for d in domains.values() if d["recovery"] is not None]
    resident = _peak(s.heads.peak_resident_heads for s in steps)
    heads = _peak(s.heads.peak_head_bytes for s in steps)
    average = record.weight_average or {}
    taken = {entry.step for entry in record.entries(TrainStepLine)}
    # A step with NaN or inf may be taken by a later start.
    left_out = len({entry.step for entry in record.entries(BadStepLine)} - taken)
    allowed = record.config.train.max_bad_steps
    report = {
        "schema": SCHEMA,
        "finished": record.finished,
        "began_with": record.origin,
        "iterations": {
            "done": len({e.iteration for e in record.entries(PhaseLine) if e.line.name == _LAST_PHASE}),
            "planned": record.config.train.num_iterations,
        },
        "wall_s": {name: _total(seconds) for name, seconds in wall_s.items()},
        "stall_s": {"teacher_pass": _total(p.stall_s for p in passes),
                    "train": _total(s.heads.stall_s for s in steps)},
        "hidden_s": {"teacher_pass": _total(p.hidden_s for p in passes)},
        "train_steps": len(steps),
        **_work(steps),
        "rollout_tokens": _total(line.tokens for line in rollouts),
        "continued_tokens": _total(line.continued_tokens for line in rollouts),
        "token_log_bytes": _total(line.log_bytes for line in rollouts),
        "environment": _environment(rollouts),
        "weight_updates": _weight_updates(record.lines(WeightUpdateLine)),
        "waves": _peak(p.waves for p in passes),
        "teachers": [_teacher(record, steps, teacher) for teacher in record.teachers],
        "peak_resident_heads": resident,
        "peak_head_bytes": heads,
        "peak_device_bytes": max(heads, _peak(p.peak_device_bytes for p in passes)),
        "peak_host_bytes": _peak(line.peak_host_bytes for line in memory) if memory else None,
        "reverse_kl": first_and_last(steps, lambda s: s.reverse_kl),
        "log_prob_mismatch": _mismatch(record),
        "staleness": _staleness(record),
        "carried_over": _carried_over(rollouts),
        "samples_filtered": _filtered(record),
        "domains": domains,
        "no_recovery": {d.name: _why_not(record, d, domains[d.name]) for d in found
                        if domains[d.name]["recovery"] is None},
        "student_stopped": _newest_stopped(record),
        "worst_recovery": min(recovered, default=None),
        "mean_recovery": sum(recovered) / len(recovered) if recovered else None,
        "baselines": {
            "weight_average": average,
            "specialists": {name: accuracy for name, accuracy in record.models.items() if name != "base"},
        },
        "weight_average_worst_recovery": worst_recovery(domains, average),
        "checks": {
            "head_loads": _check(sum(_total(s.heads.head_loads.get(t["name"]) for s in steps) for t in record.teachers),
                                 _total(s.heads.teachers_in_step for s in steps)),
            # In a wave every stored byte is read once over all ranks, or it was kept in host memory
            # since it was read.
            "bytes_streamed": _check(_total(p.bytes_read for p in passes) + _total(p.bytes_kept for p in passes),
                                     sum(p.waves * p.stored_bytes for p in passes)),
            "peak_resident_heads": {"found": resident, "at_most": 1, "ok": resident <= 1},
            "train_steps_left_out": {"found": left_out, "at_most": allowed, "ok": left_out <= allowed},
        },
    }  # fmt: skip
    return _finite(report)


def _environment(lines: Sequence[RolloutLine]) -> dict[str, float] | None:
    """Sums over a run's rollouts; None where no source has an environment."""
    told = [line for line in lines if line.environment_calls is not None]
    if not told:
        return None
    return {
        "tokens": _total(line.environment_tokens for line in told),
        "calls": _total(line.environment_calls for line in told),
        "calls_s": _total(line.environment_s for line in told),
        "failed_samples": _total(line.environment_errors for line in told),
    }


def _carried_over(lines: Sequence[RolloutLine]) -> dict[str, float] | None:
    """Responses that were open when an iteration ended, once for each; None without carry_over."""
    told = [line for line in lines if line.open_samples is not None]
    if not told:
        return None
    return {
        "samples": _total(line.open_samples for line in told),
        "tokens": _total(line.open_tokens for line in told),
    }


def _weight_updates(lines: Sequence[WeightUpdateLine]) -> dict[str, Any] | None:
    """Of the student's weights to servers; None for a run without servers."""
    if not lines:
        return None
    steps = dict.fromkeys(step for line in lines for step in line.seconds)
    return {
        "updates": len(lines),
        "seconds": {step: _total(line.seconds.get(step) for line in lines) for step in steps},
        "bytes": _total(line.bytes_sent for line in lines),
        "updates_without_a_server": sum(line.servers_out > 0 for line in lines),
        "probe_difference": _largest(line.probe_difference for line in lines),
    }


def first_steps(record: Record) -> list[Entry[TrainStepLine]]:
    """The first train step of each iteration: it trains on what its own weights sampled."""
    firsts: dict[int, Entry[TrainStepLine]] = {}
    for entry in record.entries(TrainStepLine):
        firsts.setdefault(entry.iteration, entry)
    return [*firsts.values()]


def _mismatch(record: RunRecord) -> dict[str, float | None]:
    """The largest differences between trainer and rollout in a train step: of the iterations' first
    steps, then of all.
    """
    firsts = [entry.line.mismatch for entry in first_steps(record)]
    found = [line.mismatch for line in record.lines(TrainStepLine)]
    return {
        "first_steps_p99": _largest(m.log_prob_difference_p99 for m in firsts),
        "p99": _largest(m.log_prob_difference_p99 for m in found),
        "token_mult_prob_error": _largest(m.token_mult_prob_error for m in found),
    }


def _staleness(record: RunRecord) -> dict[str, Any] | None:
    """How old the weights were that sampled loss tokens; None where all were the newest."""
    lines = record.lines(StalenessLine)
    if not lines:
        return None
    tokens: Counter[str] = Counter()
    for line in lines:
        tokens.update(line.tokens)
    return {
        "tokens": dict(tokens),
        "mean": sum(int(age) * count for age, count in tokens.items()) / max(tokens.total(), 1),
        "oldest": int(_peak(line.oldest for line in lines)),
        "tokens_masked": _total(line.tokens_masked for line in lines),
    }


def _filtered(record: RunRecord) -> int | None:
    """Samples that train.sequence_filter left out; None where it is off."""
    lines = record.lines(SequenceFilterLine)
    return sum(line.samples_filtered for line in lines) if lines else None


def _teacher(
    record: RunRecord, steps: Sequence[TrainStepLine], teacher: Mapping[str, Any]
) -> dict[str, Any]:
    name = teacher["name"]
    passes = [metrics for teacher_name, metrics in record.passes if teacher_name == name]
    return {
        "name": name,
        "fingerprint": teacher["fingerprint"],
        "route": next((dict(t.route) for t in record.config.teachers if t.name == name), None),
        "passes": len(passes),
        "tokens": _total(p.tokens for p in passes),
        "head_loads": _total(s.heads.head_loads.get(name) for s in steps),
        "head_bytes_read": _total(s.heads.head_bytes_read.get(name) for s in steps),
        "bytes_read": _total(p.bytes_read for p in passes),
        "bytes_kept": _total(p.bytes_kept for p in passes),
        "probe": next((p.probe for p in reversed(passes) if p.probe is not None), None),
        "stored_bytes": passes[-1].stored_bytes if passes else None,
        "peak_device_bytes": _peak(p.peak_device_bytes for p in passes),
        "peak_host_bytes": _peak(p.peak_host_bytes for p in passes),
    }


def _domain(record: RunRecord, domain: Domain) -> dict[str, float | None]:
    models = (record.models.get("base"), record.models.get(domain.teacher or ""))
    newest = record.evaluations[max(record.evaluations)] if record.evaluations else None
    base, teacher, student = (
        _number(model.get(domain.name)) if model else None for model in (*models, newest)
    )
    return {
        "base": base,
        "teacher": teacher,
        "student": student,
        "recovery": recovery(base, teacher, student),
    }


def _why_not(record: RunRecord, domain: Domain, found: Mapping[str, float | None]) -> str:
    """Why a domain has no recovery, and what to do about it where something can be done."""
    if domain.why_not:
        return domain.why_not
    if domain.teacher is None:
        return "no teacher's route fits it"
    baselines = record.config.evaluation.baselines
    wanted = {"base": found["base"], domain.teacher: found["teacher"]}
    missing = [name for name, value in wanted.items() if value is None]
    if unnamed := [name for name in missing if name not in baselines]:
        return f"evaluation.baselines has no {' and no '.join(map(repr, unnamed))}"
    if missing:
        return f"baselines not evaluated: mtopd evaluate {record.config.run_dir} --baselines"
    if found["student"] is None:
        return "the student was not evaluated"
    return (
        f"teacher {domain.teacher} ({found['teacher']:.1%}) is not {_MIN_GAIN:.0%} above the base "
        f"({found['base']:.1%})"
    )


def recovery(base: float | None, teacher: float | None, student: float | None) -> float | None:
    """The share of the teacher's gain over the base that the student has; None where there is no
    gain to speak of.
    """
    if base is None or teacher is None or student is None or teacher - base < _MIN_GAIN:
        return None
    return (student - base) / (teacher - base)


def worst_recovery(
    domains: Mapping[str, Mapping[str, float | None]], accuracy: Accuracy
) -> float | None:
    """The lowest recovery over the domains of a model with this accuracy."""
    found = [
        recovery(d["base"], d["teacher"], _number(accuracy.get(name)))
        for name, d in domains.items()
    ]
    return min((r for r in found if r is not None), default=None)


def build_specialist_report(record: SpecialistRecord) -> Report:
    """report.json of a supervised run, schema 1."""
    steps, memory = record.lines(TrainStepLine), record.lines(MemoryLine)
    evaluations = record.lines(EvaluationLine)
    accuracy = record.final or (evaluations[-1].accuracy if evaluations else {})
    order = [source.name for source in record.config.data.sources]
    report = {
        "schema": SCHEMA,
        "kind": "specialist",
        "finished": record.finished,
        "train_steps": len(steps),
        "planned_steps": record.config.train.num_steps,
        "wall_s": {"train": _total(s.wall_s for s in steps)},
        **_work(steps),
        "loss": first_and_last(steps, lambda s: s.loss),
        "accuracy": {n: accuracy[n] for n in dict.fromkeys([*order, *accuracy]) if n in accuracy},
        "stopped": _newest_stopped(record),
        "peak_host_bytes": _peak(line.peak_host_bytes for line in memory) if memory else None,
    }
    return _finite(report)


def _work(steps: Sequence[TrainStepLine]) -> dict[str, float | None]:
    """How much the train steps got through, and how fast."""
    return {
        "train_tokens": _total(s.tokens for s in steps),
        "tokens_per_s": _rate((s.tokens, s.wall_s) for s in steps),
        "positions": _total(s.positions for s in steps),
        "positions_per_s": _rate((s.positions, s.wall_s) for s in steps),
    }


def _newest_stopped(record: Record) -> dict[str, float]:
    """The share of answers that ended by themselves in the newest evaluation of the student."""
    newest = [line.stopped for line in record.lines(EvaluationLine)][-1:]
    return dict(newest[0] or {}) if newest else {}


def first_and_last(
    steps: Sequence[TrainStepLine], value: Callable[[TrainStepLine], float]
) -> dict[str, float | None]:
    """Token means over as many ``steps`` at either end of the run, which never overlap: of one
    train step there is a first value and no last.
    """
    count = max(1, min(_END_STEPS, len(steps) // 2))
    last = steps[-count:] if len(steps) > 1 else []
    return {"first": _token_mean(steps[:count], value), "last": _token_mean(last, value)}


def _token_mean(
    steps: Sequence[TrainStepLine], value: Callable[[TrainStepLine], float]
) -> float | None:
    tokens = _total(s.tokens for s in steps)
    return sum(value(s) * s.tokens for s in steps) / tokens if tokens else None


def _check(found: float, expected: float) -> dict[str, Any]:
    return {"found": found, "expected": expected, "ok": found == expected}


def _numbers(values: Iterable[object]) -> Iterator[float]:
    """The numbers among what lines say; older ones lack some."""
    return (v for v in values if isinstance(v, int | float) and math.isfinite(v))


def _total(values: Iterable[object]) -> float:
    return sum(_numbers(values))


def _rate(counts: Iterable[tuple[float | None, float | None]]) -> float | None:
    """Counts per second, over those that were counted; None where an older run has none."""
    known = [(n, s) for n, s in counts if n is not None and s is not None]
    seconds = _total(s for _, s in known)
    return _total(n for n, _ in known) / seconds if seconds else None


def _peak(values: Iterable[object]) -> float:
    return max(_numbers(values), default=0)


def _largest(values: Iterable[object]) -> float | None:
    return max(_numbers(values), default=None)


def _number(value: object) -> float | None:
    return next(map(float, _numbers([value])), None)


def _finite(value: Any) -> Any:
    """The same value with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return _number(value) if isinstance(value, float) else value
