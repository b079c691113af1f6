"""The bodies of ``mtopd cache ls | verify | gc``: the hidden caches of a run, one for each
iteration.
"""

from __future__ import annotations

import logging
from pathlib import Path

from rich.console import Console, Group
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TransferSpeedColumn,
)
from rich.table import Column, Table
from rich.text import Text

from mtopd.files import read_json
from mtopd.hidden_cache import HiddenCacheReader, collect_garbage
from mtopd.progress import answer
from mtopd.run_dir import RunDir, existing_run, is_sealed
from mtopd.trajectories import read_metadata
from mtopd.types import MtopdError

# What is damaged is printed here, once; the cache's own warnings are for runs.
logging.getLogger("mtopd.hidden_cache").addHandler(logging.NullHandler())


def table(run_dir: Path) -> Group:
    """One row for each iteration and teacher; under the table, why an index file is refused.

    ``damaged``: index files, and segments whose files are not whole; their rows are read by
    ``verify`` alone.
    """
    run = existing_run(run_dir)
    numbers = ("samples", "rows", "bytes", "segments", "damaged")
    columns = [
        Column("iteration"),
        Column("teacher"),
        *(Column(name, justify="right") for name in numbers),
    ]
    rows, notes = Table(*columns, box=None, pad_edge=False), []
    names = _teacher_names(run)
    for iteration, cache in _caches(run):
        with HiddenCacheReader(cache) as reader:
            entries, damaged = reader.entries(), [*reader.broken_segments(), *reader.refused]
            notes += [Text(cause, style="red") for cause in reader.refused.values()]
        for folder in sorted(
            {path.parents[1] for path in (*damaged, *(entry.segment for entry in entries))}
        ):
            cached = [entry for entry in entries if entry.segment.parents[1] == folder]
            segments = {entry.segment: entry.sample.segment_bytes for entry in cached}
            counts = (
                len(cached),
                sum(entry.n_tokens for entry in cached),
                sum(segments.values()),
                len(segments),
                sum(path.parents[1] == folder for path in damaged),
            )
            name = escape(names.get(folder.name, folder.name))
            rows.add_row(str(iteration), name, *(f"{count:,}" for count in counts))
    return Group(rows, *notes)


def verify(run_dir: Path, console: Console) -> None:
    """Read every committed row.  Raises MtopdError that counts what is damaged, each named on a
    line before.
    """
    run, num_samples, num_bytes, num_damaged = existing_run(run_dir), 0, 0, 0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        for iteration, cache in _caches(run):
            with HiddenCacheReader(cache) as reader:
                entries = reader.entries()
                size = sum(entry.n_tokens * entry.layout.row_bytes for entry in entries)
                task = progress.add_task(f"iteration {iteration}", total=size)
                damaged = reader.verify(lambda count, task=task: progress.advance(task, count))  # type: ignore[misc]
                causes = [*reader.refused.values(), *damaged.values()]
            for sample_id in _lost(run, iteration, {entry.row_key.sample_id for entry in entries}):
                causes.append(
                    f"sample {sample_id} is in no index file of {cache}; it has to be computed "
                    "again"
                )
            for cause in causes:
                console.print(
                    f"iteration {iteration}: {cause}",
                    style="red",
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                )
            num_samples += len(entries)
            num_bytes += size
            num_damaged += len(causes)
    if num_damaged:
        raise MtopdError(
            f"{num_damaged} samples or index files of the caches of {run_dir} are damaged; compute "
            f"an iteration's again with `mtopd teacher-pass {run_dir} --iteration N`"
        )
    answer(f"{num_samples:,} samples are whole, {num_bytes:,} bytes")


def gc(run_dir: Path, console: Console) -> None:
    """Recover the caches of the run and delete what no reader will ever need.

    Raises MtopdError while the run is going: a segment being written looks the same as one left
    behind.
    """
    run, freed = existing_run(run_dir), 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with run.lock(), Progress(*columns, console=console, transient=True) as progress:
        for iteration, cache in progress.track(_caches(run), description="caches"):
            before = _size(cache)
            for segment in collect_garbage(cache):
                answer(f"iteration {iteration}: segment {segment} removed")
            freed += before - _size(cache)
    answer(f"{freed:,} bytes freed")


def _caches(run: RunDir) -> list[tuple[int, Path]]:
    found = [int(path.name) for path in sorted(run.path.glob("iterations/" + 6 * "[0-9]"))]
    caches = [(iteration, run.hidden_cache(iteration)) for iteration in found]
    return [
        (iteration, cache)
        for iteration, cache in caches
        if cache.is_dir() and not cache.is_symlink()
    ]


def _teacher_names(run: RunDir) -> dict[str, str]:
    """Teachers by the name of their folder in a cache; teachers with one store share one."""
    found: dict[str, str] = {}
    for teacher in read_json(run.manifest).get("teachers", []):
        folder = teacher["fingerprint"][:16]
        found[folder] = ", ".join(filter(None, (found.get(folder), teacher["name"])))
    return found


def _lost(run: RunDir, iteration: int, found: set[int]) -> list[int]:
    """Samples of the iteration's trajectories that a sealed cache has to hold and no sound index
    file names.
    """
    trajectories = run.trajectories(iteration)
    if not (is_sealed(run.hidden_cache(iteration)) and is_sealed(trajectories)):
        return []
    return sorted(set(read_metadata(trajectories)["sample_id"].to_pylist()) - found)


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
