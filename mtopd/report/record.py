"""What a run directory holds, read for its report; nothing is written.

Numbers come from metrics.jsonl (a train step that ran again after a resume counts once), from
evaluations/ and from the manifest. An unfinished run is read as far as it came.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtopd.config import ConsolidateConfig
from mtopd.config_data import SourceConfig
from mtopd.config_specialist import SpecialistConfig
from mtopd.data import route
from mtopd.files import read_json
from mtopd.manifest import kept_config
from mtopd.metrics import Entry, L, read_metrics
from mtopd.metrics_lines import Line, PassMetrics, TeacherPassLine
from mtopd.prompt_table import domain_name, held_out_teachers
from mtopd.run_dir import RunDir, is_sealed
from mtopd.types import MtopdError
from mtopd.yaml_file import read_yaml

Accuracy = Mapping[str, float | None]  # by domain


@dataclass(frozen=True)
class Domain:
    """Held-out prompts that are counted together: a source's that go to one teacher."""

    name: str
    teacher: str | None
    why_not: str = ""  # why no recovery can be told, whatever was evaluated


@dataclass(frozen=True, kw_only=True)
class Record:
    """What runs of both kinds leave."""

    config_yaml: str
    metrics: Sequence[Entry[Line]]  # in order of iteration and step
    finished: bool

    def entries(self, kind: type[L]) -> list[Entry[L]]:
        return [
            Entry(iteration, step, line)
            for iteration, step, line in self.metrics
            if isinstance(line, kind)
        ]

    def lines(self, kind: type[L]) -> list[L]:
        return [entry.line for entry in self.entries(kind)]


@dataclass(frozen=True, kw_only=True)
class SpecialistRecord(Record):
    """A supervised run."""

    config: SpecialistConfig
    final: Accuracy  # after training; empty before, and without held-out prompts


@dataclass(frozen=True, kw_only=True)
class RunRecord(Record):
    """A consolidation."""

    config: ConsolidateConfig
    teachers: Sequence[Mapping[str, Any]]  # the manifest's table
    evaluations: Mapping[int, Accuracy]  # the student after so many iterations
    models: Mapping[str, Accuracy]  # baselines by name, teachers in their order
    weight_average: Accuracy | None
    origin: str | None  # RUN@ITERATION whose checkpoint the run began with (--from)
    # By source, the teachers that its held-out prompts go to; None: no prompt table can be read.
    asked: Mapping[int, Sequence[int]] | None

    @property
    def passes(self) -> Iterator[tuple[str, PassMetrics]]:
        """(teacher name, metrics) of every teacher pass."""
        return (item for line in self.lines(TeacherPassLine) for item in line.teachers.items())

    def domains(self) -> list[Domain]:
        """What the report has a column for: a source, or each of its teachers where the held-out
        prompts go to several.
        """
        return [d for n, s in enumerate(self.config.data.sources) for d in self._domains_of(n, s)]

    def _domains_of(self, number: int, source: SourceConfig) -> list[Domain]:
        if self.asked is None:
            return [Domain(source.name, self.teacher_of(source))]
        teachers = [self.config.teachers[i].name for i in self.asked.get(number, ())]
        if not teachers:
            why = "it has no held-out prompts (eval_path)"
            return [Domain(source.name, self.teacher_of(source), why)]
        if len(teachers) == 1:
            return [Domain(source.name, teachers[0])]
        newest = self.evaluations[max(self.evaluations)] if self.evaluations else {}
        if source.name in newest:
            why = f"its prompts go to {', '.join(teachers)} and were counted together by an older "
            return [Domain(source.name, None, why + "version")]
        return [Domain(domain_name(source.name, teacher), teacher) for teacher in teachers]

    def teacher_of(self, source: SourceConfig) -> str | None:
        """The teacher that a prompt of this source goes to when its row adds no route fields."""
        fields = {"domain": source.name, **source.fields}
        try:
            routes = {teacher.name: teacher.route for teacher in self.config.teachers}
            return [*routes][route(fields, routes)]
        except MtopdError:
            return None


def read_config(run_dir: Path) -> ConsolidateConfig | SpecialistConfig:
    """The config a run was started with. Raises MtopdError for any other directory."""
    run = RunDir(run_dir)
    for path in (run.config, run.manifest):
        if not path.is_file():
            raise MtopdError(
                f"{run_dir} is not a run directory (no {path.name}); give the run_dir of a "
                "consolidation or a specialist"
            )
    values, manifest = read_yaml(run.config), read_json(run.manifest)
    if not isinstance(values, dict) or "teachers" not in values:
        return kept_config(run, SpecialistConfig)
    if not isinstance(manifest, dict) or "teachers" not in manifest:
        raise MtopdError(
            f"{run.manifest} is that of a run without teachers, {run.config} names some; put the "
            "right one back"
        )
    return kept_config(run, ConsolidateConfig)


def read_specialist(run_dir: Path, config: SpecialistConfig) -> SpecialistRecord:
    run, final = RunDir(run_dir), run_dir / "evaluations" / "final.json"
    return SpecialistRecord(
        config=config,
        config_yaml=run.config.read_text(encoding="utf-8"),
        metrics=_in_order(run),
        final=read_json(final) if final.exists() else {},
        finished=is_sealed(run_dir / "export" / "final"),
    )


def _in_order(run: RunDir) -> list[Entry[Line]]:
    return sorted(read_metrics(run.metrics), key=lambda entry: (entry.iteration, entry.step or 0))


def read_run(run_dir: Path, config: ConsolidateConfig) -> RunRecord:
    run = RunDir(run_dir)
    files = sorted((run_dir / "evaluations").glob("*.json"))
    baselines: dict[str, Any] = next(
        (read_json(file) for file in files if file.stem == "baselines"), {}
    )
    known = read_json(run.manifest)
    teachers, origin = known["teachers"], known.get("from")
    order = {teacher["name"]: index for index, teacher in enumerate(teachers)}
    models = sorted(baselines.get("models", {}).items(), key=lambda item: order.get(item[0], -1))
    return RunRecord(
        config=config,
        config_yaml=run.config.read_text(encoding="utf-8"),
        teachers=teachers,
        metrics=_in_order(run),
        evaluations={int(file.stem): read_json(file) for file in files if file.stem.isdigit()},
        models=dict(models),
        weight_average=baselines.get("weight_average"),
        asked=held_out_teachers(run),
        origin=f"{origin['run']}@{origin['iteration']}" if origin else None,
        finished=is_sealed(run.export(config.train.num_iterations)),
    )
