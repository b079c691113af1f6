"""What `mtopd cache` does with the hidden caches of a run: show, verify, collect garbage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from mtopd.hidden_cache import HiddenCacheReader, collect_garbage
from mtopd.run_dir import RunDir, read_json
from mtopd.types import MtopdError


def show(run_dir: Path, console: Console) -> None:
    """A table per iteration and teacher.  ``damaged``: segments and index files whose files are not whole."""
    caches, names = _caches(run_dir), _teacher_names(run_dir)
    numbers = ("samples", "rows", "bytes", "segments", "damaged")
    table = Table("iteration", "teacher", *(Column(name, justify="right") for name in numbers))
    for iteration, root in caches:
        with HiddenCacheReader(root) as reader:
            entries, refused = reader.entries(), list(reader.refused)
            damaged = reader.broken_segments()
        folders = {e.segment.parents[1] for e in entries} | {path.parents[1] for path in refused}
        for folder in sorted(folders):
            own = [e for e in entries if e.segment.parents[1] == folder]
            segments = {e.segment: e.sample.segment_bytes for e in own}
            broken = [path for path in (*damaged, *refused) if path.parents[1] == folder]
            rows, size = sum(e.n_tokens for e in own), sum(segments.values())
            counts = (len(own), rows, size, len(segments), len(broken))
            table.add_row(str(iteration), names.get(folder.name, folder.name), *(f"{n:,}" for n in counts))
    console.print(table)


def verify(run_dir: Path, console: Console) -> None:
    """Read every row; name each damaged sample with its cause.  MtopdError if there is one."""
    causes: list[str] = []
    for iteration, root in _caches(run_dir):
        with HiddenCacheReader(root) as reader:
            total = sum(e.n_tokens * e.layout.row_bytes for e in reader.entries())
            with _bar(f"iteration {iteration}", total) as advance:
                found = [*reader.refused.values(), *reader.verify(advance).values()]
        causes += [f"iteration {iteration}: {cause}" for cause in found]
    for cause in causes:
        console.print(cause, highlight=False, markup=False, soft_wrap=True)
    if causes:
        raise MtopdError(
            f"{len(causes)} entries of the caches of {run_dir} are damaged; compute an iteration's again with "
            f"`mtopd teacher-pass {run_dir} --iteration N`"
        )
    console.print("all rows are sound")


def collect(run_dir: Path, console: Console) -> None:
    """Delete what no reader will ever need.  Refused while the run is in use."""
    caches = _caches(run_dir)
    with RunDir(run_dir).lock():
        for iteration, root in caches:
            before = _num_bytes(root)
            deleted = collect_garbage(root)
            console.print(f"iteration {iteration}: {len(deleted)} segments, {before - _num_bytes(root):,} bytes freed")


def _caches(run_dir: Path) -> list[tuple[int, Path]]:
    if not (run_dir / "config.yaml").is_file():
        raise MtopdError(f"{run_dir} is not a run directory (no config.yaml); give the run_dir of a consolidation")
    roots = sorted(run_dir.glob("iterations/*/hidden_cache"))
    return [(int(root.parent.name), root) for root in roots if root.parent.name.isdecimal()]


def _teacher_names(run_dir: Path) -> dict[str, str]:
    """Teachers by the name of their folder in a cache."""
    teachers = read_json(run_dir / "manifest.json").get("teachers", [])
    return {teacher["fingerprint"][:16]: teacher["name"] for teacher in teachers}


def _num_bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


@contextmanager
def _bar(name: str, total: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(name, total=total)
        yield lambda num_bytes: progress.advance(task, num_bytes)
