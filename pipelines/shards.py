"""The bodies of ``mtopd trajectories ls | verify``: the trajectories of a run, by iteration and shard."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console, Group
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column, Table
from rich.text import Text

from mtopd import trajectories
from mtopd.config import ConsolidateConfig
from mtopd.files import read_json
from mtopd.manifest import kept_config
from mtopd.progress import answer, say
from mtopd.run_dir import RunDir, existing_run, is_sealed, numbered, read_seal
from mtopd.teacher_offload.store import open_store
from mtopd.tokenizer import load_tokenizer, vocab_size
from mtopd.trajectories.samples import verify_folder
from mtopd.types import MtopdError

from .imports import IMPORT

_ENDINGS = (".sealed.json", ".meta.parquet", ".tokens.arrow")  # of a shard's files


def table(run_dir: Path) -> Group:
    """One row a shard; under the table, what is not complete or cannot be read.  ``students``: the
    iterations whose weights sampled its tokens.
    """
    columns = [Column("iteration"), Column("shard", no_wrap=True)]
    reasons = [reason.removeprefix("environment_") for reason in trajectories.FINISH_REASONS]
    numbers = ("samples", "tokens", "students", *reasons, "bytes")
    columns += [Column(name, justify="right") for name in numbers]
    rows, notes = Table(*columns, box=None, pad_edge=False), []
    for iteration, folder in _folders(run_dir):
        said = f"iteration {iteration}: "
        if folder.with_name(IMPORT).exists():
            notes.append(Text(said + "an import is not complete; start it again"))
        if not folder.exists():
            continue
        for name in _shards(folder):
            files = [folder / (name + ending) for ending in _ENDINGS]
            size = f"{sum(path.stat().st_size for path in files if path.is_file()):,}"
            cells = [""] * (len(numbers) - 1)
            try:
                if trajectories.shard_is_sealed(folder, name):
                    cells = _cells(folder, name)
                else:
                    notes.append(Text(said + f"shard {name} is not sealed, or not whole"))
            except MtopdError as error:
                notes.append(Text(str(error), style="red"))
            rows.add_row(str(iteration), escape(name), *cells, size)
        if not is_sealed(folder):
            notes.append(Text(said + "not sealed, the rollout is not complete"))
    return Group(rows, *notes)


def _cells(folder: Path, name: str) -> list[str]:
    columns = trajectories.read_shard_metadata(folder, name).to_pydict()
    versions, reasons = columns["student_version"], columns["finish_reason"]
    first, last = min(versions), max(versions)
    return [
        f"{len(versions):,}",
        f"{sum(columns['response_len']):,}",
        str(first) if first == last else f"{first}..{last}",
        *(f"{reasons.count(reason):,}" for reason in trajectories.FINISH_REASONS),
    ]


def verify(run_dir: Path, iteration: int | None, console: Console) -> None:
    """Read every byte and look at every sample.  Raises MtopdError that names the first bad place."""
    run, num_samples, num_bytes = RunDir(run_dir), 0, 0
    folders = [(n, f) for n, f in _folders(run_dir) if f.exists() and iteration in (None, n)]
    if not folders:
        found = (
            "no trajectories" if iteration is None else f"no trajectories of iteration {iteration}"
        )
        raise MtopdError(f"{run_dir} has {found}")
    config = kept_config(run, ConsolidateConfig)
    known = read_json(run.manifest)["teachers"]
    stores = [
        open_store(teacher.store, name=teacher.name, expected=entry["fingerprint"])
        for teacher, entry in zip(config.teachers, known, strict=True)
    ]
    ids = vocab_size(load_tokenizer(config.student.model))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        for number, folder in folders:
            sealed = read_seal(folder) if is_sealed(folder) else {}
            names = trajectories.sealed_shards(folder)
            for name in set(_shards(folder)) - {*names} if sealed else ():
                raise MtopdError(
                    f"{folder} is sealed, but has files of a shard {name} that is not: its seal is "
                    "gone, or the files are not this run's; put it back or remove them"
                )
            if not sealed:
                say(f"iteration {number}: the rollout is not complete; sealed shards are read")
            if not names and not sealed:
                continue
            total = sum(trajectories.load_shard(folder, name).num_samples for name in names)
            bar = progress.add_task(f"iteration {number}", total=total)
            num_samples += verify_folder(
                folder,
                seals=sealed.get("shards"),
                iteration=number,
                vocab_size=ids,
                teacher_vocab_sizes=[store.vocab_size for store in stores],
                advance=lambda bar=bar: progress.advance(bar),  # type: ignore[misc]
            )
            num_bytes += sum(path.stat().st_size for path in folder.iterdir())
    answer(f"{num_samples:,} samples are sound, {num_bytes:,} bytes")


def _folders(run_dir: Path) -> list[tuple[int, Path]]:
    run = existing_run(run_dir)
    folders = {n: run.trajectories(n) for n in numbered(run.path / "iterations")}
    return [(n, f) for n, f in folders.items() if f.exists() or f.with_name(IMPORT).exists()]


def _shards(folder: Path) -> list[str]:
    """Names of all shards that have a file, sealed or not."""
    files = (path.name for path in folder.iterdir() if not path.name.startswith("."))
    return sorted({f.removesuffix(e) for f in files for e in _ENDINGS if f.endswith(e)})
