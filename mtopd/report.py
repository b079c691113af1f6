"""What a run did, as numbers: report.json and the rows of its tables.  Reads the run directory,
writes nothing.

Numbers come from metrics.jsonl (the last line of each kind, iteration and step: a train step that
ran again after a resume counts once), from evaluations/ and from the manifest.  An unfinished run
is reported as far as it came; what was not measured is null.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtopd.config import ConsolidateConfig, SourceConfig
from mtopd.data import route
from mtopd.files import read_json
from mtopd.metrics import read_metrics
from mtopd.run_dir import SCHEMA, RunDir, is_sealed
from mtopd.types import MtopdError

Accuracy = Mapping[str, float | None]  # by source name

_KL_STEPS = 10  # train steps at either end of the run that reverse_kl is taken over
_MIN_GAIN = 0.05  # where the teacher is less than this above the base, recovery says nothing


# -- the run ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class RunRecord:
    """What a run directory holds of a consolidation."""

    config: ConsolidateConfig
    config_yaml: str
    teachers: Sequence[Mapping[str, Any]]  # the manifest's table
    lines: Mapping[
        str, Sequence[Mapping[str, Any]]
    ]  # metrics by kind, in order of iteration and step
    evaluations: Mapping[int, Accuracy]  # the student after so many iterations
    models: Mapping[str, Accuracy]  # baselines by name, teachers in their order
    weight_average: Accuracy | None
    finished: bool

    @property
    def passes(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """(teacher name, values) of every teacher pass."""
        return (
            item for line in self.lines.get("teacher_pass", ()) for item in line["teachers"].items()
        )

    def passes_of(self, teacher: str) -> list[Mapping[str, Any]]:
        return [values for name, values in self.passes if name == teacher]

    def teacher_of(self, source: SourceConfig) -> str | None:
        """The teacher that a prompt of this source goes to when its row adds no route fields."""
        fields = {"domain": source.name, **source.fields}
        try:
            return self.config.teachers[route(fields, [t.route for t in self.config.teachers])].name
        except MtopdError:
            return None


def read_run(path: Path, config: ConsolidateConfig) -> RunRecord:
    run, lines = RunDir(path), defaultdict(list)
    for line in sorted(
        read_metrics(run.metrics), key=lambda line: (line["iteration"], line.get("step", 0))
    ):
        lines[line["kind"]].append(line)
    files = sorted((path / "evaluations").glob("*.json"))
    baselines: dict[str, Any] = next(
        (read_json(file) for file in files if file.stem == "baselines"), {}
    )
    teachers = read_json(run.manifest)["teachers"]
    order = {teacher["name"]: index for index, teacher in enumerate(teachers)}
    models = sorted(baselines.get("models", {}).items(), key=lambda item: order.get(item[0], -1))
    return RunRecord(
        config=config,
        config_yaml=run.config.read_text(),
        teachers=teachers,
        lines=lines,
        evaluations={int(file.stem): read_json(file) for file in files if file.stem.isdigit()},
        models=dict(models),
        weight_average=baselines.get("weight_average"),
        finished=is_sealed(run.export(config.train.num_iterations)),
    )


# -- numbers ---------------------------------------------------------------------------------------
def build_report(record: RunRecord) -> dict[str, Any]:
    """report.json, schema 1.  What the run did not measure is null."""
    steps, memory = record.lines.get("train_step", ()), record.lines.get("memory", ())
    passes = [values for _, values in record.passes]
    phases = {
        kind.removeprefix("phase/"): lines
        for kind, lines in record.lines.items()
        if kind.startswith("phase/")
    }
    domains = {source.name: _domain(record, source) for source in record.config.data.sources}
    recovered = [d["recovery"] for d in domains.values() if d["recovery"] is not None]
    resident, heads = _peak(steps, "peak_resident_heads"), _peak(steps, "peak_head_bytes")
    average = record.weight_average or {}
    bad_steps = {
        line["step"] for line in record.lines.get("bad_step", ())
    }  # with NaN or inf; one may be taken later
    left_out, allowed = (
        len(bad_steps - {line["step"] for line in steps}),
        record.config.train.max_bad_steps,
    )
    report = {
        "schema": SCHEMA,
        "finished": record.finished,
        "iterations": {
            "done": len({line["iteration"] for line in phases.get("update_weights", ())}),
            "planned": record.config.train.num_iterations,
        },
        "wall_s": {phase: _total(lines, "wall_s") for phase, lines in phases.items()},
        "stall_s": {"teacher_pass": _total(passes, "stall_s"), "train": _total(steps, "stall_s")},
        "train_steps": len(steps),
        "rollout_tokens": _total(record.lines.get("rollout", ()), "tokens"),
        "waves": _peak(passes, "waves"),
        "teachers": [_teacher(record, teacher) for teacher in record.teachers],
        "peak_resident_heads": resident,
        "peak_head_bytes": heads,
        "peak_device_bytes": max(heads, _peak(passes, "peak_device_bytes")),
        "peak_host_bytes": _peak(memory, "peak_host_bytes") if memory else None,
        "reverse_kl": {"first": _token_mean_kl(steps[:_KL_STEPS]), "last": _token_mean_kl(steps[-_KL_STEPS:])},
        "domains": domains,
        "worst_recovery": min(recovered, default=None),
        "mean_recovery": sum(recovered) / len(recovered) if recovered else None,
        "baselines": {
            "weight_average": average,
            "specialists": {name: accuracy for name, accuracy in record.models.items() if name != "base"},
        },
        "weight_average_worst_recovery": worst_recovery(domains, average),
        "checks": {
            "head_loads": _check(sum(_total(_tables(steps, "head_loads"), t["name"]) for t in record.teachers),
                                 _total(steps, "teachers_in_step")),
            # In a wave every stored byte is read once over all ranks, or it was kept in host memory
            # since it was read.
            "bytes_streamed": _check(_total(passes, "bytes_read") + _total(passes, "bytes_kept"),
                                     sum(p["waves"] * p["stored_bytes"] for p in passes)),
            "peak_resident_heads": {"found": resident, "at_most": 1, "ok": resident <= 1},
            "train_steps_left_out": {"found": left_out, "at_most": allowed, "ok": left_out <= allowed},
        },
    }  # fmt: skip
    return _finite(report)


def _teacher(record: RunRecord, teacher: Mapping[str, Any]) -> dict[str, Any]:
    name, steps = teacher["name"], record.lines.get("train_step", ())
    passes = record.passes_of(name)
    return {
        "name": name,
        "fingerprint": teacher["fingerprint"],
        "route": next((dict(t.route) for t in record.config.teachers if t.name == name), None),
        "passes": len(passes),
        "tokens": _total(passes, "tokens"),
        "head_loads": _total(_tables(steps, "head_loads"), name),
        "head_bytes_read": _total(_tables(steps, "head_bytes_read"), name),
        "bytes_read": _total(passes, "bytes_read"),
        "bytes_kept": _total(passes, "bytes_kept"),
        "probe": next((p["probe"] for p in reversed(passes) if "probe" in p), None),
        "stored_bytes": passes[-1]["stored_bytes"] if passes else None,
        "peak_device_bytes": _peak(passes, "peak_device_bytes"),
        "peak_host_bytes": _peak(passes, "peak_host_bytes"),
    }


def _domain(record: RunRecord, source: SourceConfig) -> dict[str, float | None]:
    models = (record.models.get("base"), record.models.get(record.teacher_of(source) or ""))
    newest = record.evaluations[max(record.evaluations)] if record.evaluations else None
    base, teacher, student = (
        _number(model.get(source.name)) if model else None for model in (*models, newest)
    )
    return {
        "base": base,
        "teacher": teacher,
        "student": student,
        "recovery": recovery(base, teacher, student),
    }


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


def _token_mean_kl(steps: Sequence[Mapping[str, Any]]) -> float | None:
    tokens = _total(steps, "tokens")
    return sum(s["reverse_kl"] * s["tokens"] for s in steps) / tokens if tokens else None


def _check(found: float, expected: float) -> dict[str, Any]:
    return {"found": found, "expected": expected, "ok": found == expected}


def _tables(lines: Iterable[Mapping[str, Any]], key: str) -> list[Mapping[str, Any]]:
    return [line.get(key, {}) for line in lines]


def _values(lines: Iterable[Mapping[str, Any]], key: str) -> Iterator[Any]:
    return (value for line in lines if _number(value := line.get(key)) is not None)


def _total(lines: Iterable[Mapping[str, Any]], key: str) -> Any:
    return sum(_values(lines, key))


def _peak(lines: Iterable[Mapping[str, Any]], key: str) -> Any:
    return max(_values(lines, key), default=0)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _finite(value: Any) -> Any:
    """The same value with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return _number(value) if isinstance(value, float) else value


# -- tables ----------------------------------------------------------------------------------------
def result_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Cells of the result table: label, accuracy of each domain, worst recovery."""
    domains, baselines = report["domains"], report["baselines"]
    models = {
        "base": {name: d["base"] for name, d in domains.items()},
        **baselines["specialists"],
        "weight average": baselines["weight_average"],
        "student": {name: d["student"] for name, d in domains.items()},
    }
    rows = [
        [
            label,
            *(percent(accuracy.get(name)) for name in domains),
            number(worst_recovery(domains, accuracy)),
        ]
        for label, accuracy in models.items()
    ]
    return [
        *rows,
        [
            "recovery",
            *(number(d["recovery"]) for d in domains.values()),
            number(report["worst_recovery"]),
        ],
    ]


def check_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Cells of the table of checks: what, found, wanted, verdict."""
    rows = []
    for name, check in report["checks"].items():
        wanted = f"{check['expected']:,}" if "expected" in check else f"at most {check['at_most']}"
        rows.append(
            [
                name.replace("_", " "),
                f"{check['found']:,}",
                wanted,
                "ok" if check["ok"] else "WRONG",
            ]
        )
    return rows


def verdict(report: Mapping[str, Any]) -> str:
    """The run in one line."""
    kl = report["reverse_kl"]
    ratio = f" ({kl['first'] / kl['last']:.0f}x)" if kl["first"] is not None and kl["last"] else ""
    return (
        f"{'consolidated' if report['finished'] else 'unfinished, ' + progress(report)}: "
        f"worst recovery {number(report['worst_recovery'])}, mean "
        f"{number(report['mean_recovery'])}, "
        f"reverse KL {nats(kl['first'])} -> {nats(kl['last'])}{ratio}"
    )


def progress(report: Mapping[str, Any]) -> str:
    return f"{report['iterations']['done']} of {report['iterations']['planned']} iterations"


def number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}"


def nats(value: float | None) -> str:
    """A divergence, which may be near 1 or far below."""
    return "n/a" if value is None else f"{value:.2g}"


def percent(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1%}"


def in_bytes(count: float | None) -> str:
    """A number of bytes as text with a unit."""
    if count is None:
        return "n/a"
    power = min(int(math.log2(max(count, 1)) // 10), 4)
    return f"{round(count / 1024**power, 1):g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
