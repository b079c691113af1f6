"""The bodies of ``mtopd teachers add | ls | verify | rm``."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from rich.console import Console, Group
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from mtopd.config_values import NAME_PATTERN
from mtopd.dtypes import safetensors_name
from mtopd.progress import answer, say
from mtopd.teacher_offload.names import MANIFEST
from mtopd.teacher_offload.store import TeacherStore, check_files, damaged_blocks, open_store
from mtopd.teacher_offload.store_writer import adding_folder, bears_mark, remove_store
from mtopd.types import MtopdError

__all__ = [
    "add",
    "check_name",
    "check_place",
    "local_folder",
    "removable",
    "remove_store",
    "table",
    "verify",
]


def add(
    name: str,
    source: Path,
    target: Path,
    console: Console,
    *,
    slices: str | int,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> None:
    """Write a store, or finish one, with a progress bar; prints what was written.

    ``slices``: a number, also as the command line has it, or "auto".
    """
    check_name(name)
    number = _slices(slices)
    source = _expanded(source)
    from mtopd.convert.teacher import add_teacher

    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"teacher {name}", total=None)
        store = add_teacher(
            name,
            source,
            target,
            slices=number,
            logit_scale=logit_scale,
            softcap=softcap,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
            say=say,
        )
    answer(
        f"teacher {name}: {target}, {store.pass_bytes():,} bytes a pass, fingerprint "
        f"{store.fingerprint[:16]}"
    )


def check_name(name: str) -> None:
    """A teacher's name is that of its store's folder, and a key of configs and reports."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise MtopdError(
            f"a teacher's name begins with a letter or digit and has letters, digits, _, . and - "
            f"alone, found {name!r}; the folder that holds the store is --to"
        )


def check_place(target: Path) -> None:
    """A store can be written at ``target`` when its model is trained.  Raises MtopdError."""
    if target.exists():
        raise MtopdError(
            f"{target} exists, and what this run is to write there is not trained yet: give "
            "store.path another value, or remove it (a store: `mtopd teachers rm`)"
        )
    nearest = next(folder for folder in target.parents if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise MtopdError(f"the store {target} cannot be written: {nearest} is no folder of yours")


def _slices(given: str | int) -> int | Literal["auto"]:
    if given == "auto":
        return "auto"
    try:
        return int(given)
    except ValueError:
        raise MtopdError(f"slices {given!r}: give a number, or auto") from None


def local_folder(location: str) -> Path:
    """Stores are written and removed in folders only.  Raises MtopdError for a URL."""
    if "://" in location:
        raise MtopdError(
            "a store is written and removed in a local folder; copy it to an object store, or "
            "remove it there, with that store's own tool (e.g. `aws s3 sync`), teacher.json last"
        )
    return _expanded(location)


def _expanded(path: str | Path) -> Path:
    """Behind `--from=` a shell leaves ~ as it is."""
    return Path(os.path.expanduser(path))


def table(folder: Path) -> Group:
    """One row for each store in ``folder``; under the table, what cannot be read and what a killed
    command left.
    """
    if not folder.is_dir():
        raise MtopdError(
            f"there is no folder {folder}; give the folder that holds the teacher stores"
        )
    columns = (
        "name",
        "architecture",
        "layers",
        "hidden",
        "slices",
        "dtype",
        "bytes",
        "fingerprint",
    )
    rows, notes = Table(*columns, box=None, pad_edge=False), []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") and bears_mark(path):
            notes.append(
                Text(
                    f"{path.name} is unfinished: `teachers add` again goes on, `teachers rm` "
                    "removes it"
                )
            )
        if path.name.startswith(".") or not (path / MANIFEST).exists():
            continue
        try:
            rows.add_row(*map(escape, _cells(path, check_files(open_store(path)))))
        except MtopdError as error:
            notes.append(Text(f"{path.name} cannot be read: {error}", style="red"))
    return Group(rows, *notes)


def _cells(path: Path, store: TeacherStore) -> tuple[str, ...]:
    total = sum(file.size for file in store.files.values())
    architecture = str(store.manifest["architecture"]["model_type"])
    sizes = map(str, (store.num_layers, store.hidden_size, store.slices))
    return (
        path.name,
        architecture,
        *sizes,
        safetensors_name(store.dtype),
        f"{total:,}",
        store.fingerprint[:16],
    )


def verify(location: str, console: Console) -> None:
    """Read all bytes of a store.  Raises MtopdError that counts the damaged blocks, each named on a
    line before.
    """
    store = check_files(open_store(location, name=Path(location).name))  # as ``ls`` calls it
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    damaged: list[str] = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(
            f"teacher {store.name}", total=sum(f.size for f in store.files.values())
        )
        for file in store.files.values():
            for message in damaged_blocks(file, lambda count: progress.advance(task, count)):
                console.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
                damaged.append(message)
    if damaged:
        raise MtopdError(
            f"{len(damaged)} damaged blocks in {location}; copy the store again or write it anew"
        )
    answer(
        f"teacher {store.name}: {len(store.files)} files are whole, fingerprint "
        f"{store.fingerprint[:16]}"
    )


def removable(folder: Path) -> list[Path]:
    """The store at ``folder`` and the unfinished one beside it.  Raises MtopdError when neither
    bears our mark.
    """
    found = [path for path in (folder, adding_folder(folder)) if bears_mark(path)]
    if not found:
        raise MtopdError(
            f"{folder} is no teacher store (no teacher.json of ours); nothing was removed"
        )
    return found
