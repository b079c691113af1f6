"""The command line's groups that look after stored files: ``mtopd teachers``, ``mtopd trajectories`` and
``mtopd cache``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mtopd.progress import console, say

teachers_app = typer.Typer(
    help="Teacher stores: the format teachers are streamed from.", no_args_is_help=True
)
cache_app = typer.Typer(
    help="Hidden caches of a run: teachers' last hidden states on disk.", no_args_is_help=True
)
trajectories_app = typer.Typer(
    help="Trajectories of a run: from another harness, what there is, whether it is sound.",
    no_args_is_help=True,
)

RunDirectory = Annotated[Path, typer.Argument(help="Run directory of a consolidation.")]
StoreFolder = Annotated[Path, typer.Argument(help="Folder that holds the stores.")]
StorePath = Annotated[str, typer.Argument(metavar="STORE", help="A teacher store: folder or URL.")]


@teachers_app.command("add")
def teachers_add(
    name: Annotated[str, typer.Argument(help="The teacher's name.")],
    source: Annotated[Path, typer.Option("--from", help="HF checkpoint folder.")],
    to: Annotated[str, typer.Option(help="Folder that holds the stores.")] = "teachers",
    slices: Annotated[
        str,
        typer.Option(
            metavar="N|auto",
            help="Largest tensor-parallel size that can load it without a copy; auto: as many as "
            "the model has, up to 8.",
        ),
    ] = "1",
    logit_scale: Annotated[
        float, typer.Option(help="Factor the checkpoint's own code puts on its logits.")
    ] = 1.0,
    softcap: Annotated[
        float | None, typer.Option(help="Soft cap the checkpoint's own code puts on them.")
    ] = None,
) -> None:
    """Write the teacher store TO/NAME from an HF checkpoint; start again to resume."""
    from . import stores

    folder = stores.local_folder(to) / name
    stores.add(
        name, source, folder, console, slices=slices, logit_scale=logit_scale, softcap=softcap
    )


@teachers_app.command("ls")
def teachers_ls(folder: StoreFolder = Path("teachers")) -> None:
    """List the teacher stores of a folder; what cannot be read is named with its cause."""
    from . import stores

    Console(soft_wrap=True, highlight=False).print(stores.table(folder))


@teachers_app.command("verify")
def teachers_verify(store: StorePath) -> None:
    """Read every byte of a store and name each block that is damaged."""
    from . import stores

    stores.verify(store, console)


@teachers_app.command("rm")
def teachers_rm(
    store: StorePath, yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False
) -> None:
    """Remove a teacher store, and what an interrupted `teachers add` of it left."""
    from . import stores

    for folder in stores.removable(stores.local_folder(store)):
        if yes or typer.confirm(f"remove {folder}?", err=True, abort=True):
            stores.remove_store(folder)
            say(f"removed {folder}")


@trajectories_app.command("import")
def trajectories_import(
    run_dir: RunDirectory,
    files: Annotated[
        list[Path], typer.Argument(help="JSON Lines or Parquet: docs/trajectories.md.")
    ],
    iteration: Annotated[
        int | None,
        typer.Option(
            min=0, help="Iteration that trains on them; default: the newest checkpoint's."
        ),
    ] = None,
) -> None:
    """Take another harness's samples as an iteration's rollout; again to go on after a kill."""
    from . import imports

    imports.import_rows(run_dir, files, iteration, console)


@trajectories_app.command("ls")
def trajectories_ls(run_dir: RunDirectory) -> None:
    """Samples, tokens, students, finish reasons and bytes by iteration and shard."""
    from . import shards

    Console(soft_wrap=True, highlight=False).print(shards.table(run_dir))


@trajectories_app.command("verify")
def trajectories_verify(
    run_dir: RunDirectory,
    iteration: Annotated[int | None, typer.Option(min=0, help="Default: all of them.")] = None,
) -> None:
    """Read every byte and look at every sample; names the first bad place, with exit code 2."""
    from . import shards

    shards.verify(run_dir, iteration, console)


@cache_app.command("ls")
def cache_ls(run_dir: RunDirectory) -> None:
    """Samples, rows, bytes, segments and damaged files by iteration and teacher."""
    from . import caches

    Console(soft_wrap=True, highlight=False).print(caches.table(run_dir))


@cache_app.command("verify")
def cache_verify(run_dir: RunDirectory) -> None:
    """Read all rows and name every damaged sample with its cause; exit code 2 if there is one."""
    from . import caches

    caches.verify(run_dir, console)


@cache_app.command("gc")
def cache_gc(run_dir: RunDirectory) -> None:
    """Delete what crashes left, and segments computed again; refused while the run is in use."""
    from . import caches

    caches.gc(run_dir, console)
