"""What a run directory holds of a consolidation, read for its report; nothing is written.

Numbers come from metrics.jsonl (a train step that ran again after a resume counts once), from
evaluations/ and from the manifest. An unfinished run is read as far as it came.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtopd.config import ConsolidateConfig, SourceConfig, load_config
from mtopd.data import route
from mtopd.files import read_json
from mtopd.metrics import Entry, L, read_metrics
from mtopd.metrics_lines import Line, PassMetrics, TeacherPassLine
from mtopd.run_dir import RunDir, is_sealed
from mtopd.types import MtopdError

Accuracy = Mapping[str, float | None]  # by source name


@dataclass(frozen=True)
class RunRecord:
    config: ConsolidateConfig
    config_yaml: str
    teachers: Sequence[Mapping[str, Any]]  # the manifest's table
    metrics: Sequence[Entry[Line]]  # in order of iteration and step
    evaluations: Mapping[int, Accuracy]  # the student after so many iterations
    models: Mapping[str, Accuracy]  # baselines by name, teachers in their order
    weight_average: Accuracy | None
    finished: bool

    def entries(self, kind: type[L]) -> list[Entry[L]]:
        return [
            Entry(iteration, step, line)
            for iteration, step, line in self.metrics
            if isinstance(line, kind)
        ]

    def lines(self, kind: type[L]) -> list[L]:
        return [entry.line for entry in self.entries(kind)]

    @property
    def passes(self) -> Iterator[tuple[str, PassMetrics]]:
        """(teacher name, metrics) of every teacher pass."""
        return (item for line in self.lines(TeacherPassLine) for item in line.teachers.items())

    def teacher_of(self, source: SourceConfig) -> str | None:
        """The teacher that a prompt of this source goes to when its row adds no route fields."""
        fields = {"domain": source.name, **source.fields}
        try:
            return self.config.teachers[route(fields, [t.route for t in self.config.teachers])].name
        except MtopdError:
            return None


def read_config(run_dir: Path) -> ConsolidateConfig:
    """The config a consolidation was started with. Raises MtopdError for any other directory."""
    run = RunDir(run_dir)
    for path in (run.config, run.manifest):
        if not path.is_file():
            raise MtopdError(
                f"{run_dir} is not a run directory (no {path.name}); give the run_dir of a "
                "consolidation"
            )
    if "teachers" not in read_json(run.manifest):
        raise MtopdError(
            f"{run_dir} is a run without teachers; a report needs the run_dir of a consolidation"
        )
    return load_config(run.config, [], ConsolidateConfig)


def read_run(run_dir: Path, config: ConsolidateConfig) -> RunRecord:
    run = RunDir(run_dir)
    files = sorted((run_dir / "evaluations").glob("*.json"))
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
        metrics=sorted(
            read_metrics(run.metrics), key=lambda entry: (entry.iteration, entry.step or 0)
        ),
        evaluations={int(file.stem): read_json(file) for file in files if file.stem.isdigit()},
        models=dict(models),
        weight_average=baselines.get("weight_average"),
        finished=is_sealed(run.export(config.train.num_iterations)),
    )
