"""The command line: ``mtopd``.  Reads arguments, calls the verb's body, maps errors to exit codes.

A user's mistake is one clear line and exit code 2; the traceback is shown with --debug.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mtopd.config import ConsolidateConfig, SpecialistConfig, load_config
from mtopd.progress import console, is_first, print_error, say
from mtopd.run_dir import RunDir
from mtopd.types import MtopdError

from . import start

app = typer.Typer(
    name="mtopd",
    help="Consolidate many specialist teachers into one student by full-vocabulary on-policy distillation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
teachers_app = typer.Typer(
    help="Teacher stores: the format teachers are streamed from.", no_args_is_help=True
)
app.add_typer(teachers_app, name="teachers")
cache_app = typer.Typer(
    help="Hidden caches of a run: teachers' last hidden states on disk.", no_args_is_help=True
)
app.add_typer(cache_app, name="cache")

ConfigFile = Annotated[Path, typer.Argument(help="YAML config of the run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Override settings of the file."),
]
RunDirectory = Annotated[Path, typer.Argument(help="Run directory of a consolidation.")]
LogJson = Annotated[
    bool,
    typer.Option("--log-json", help="Print lines of metrics.jsonl instead of a progress display."),
]
AcceptChanged = Annotated[
    bool,
    typer.Option(
        "--accept-changed", help="Go on although teachers, routes or tokenizer have changed."
    ),
]
Iteration = Annotated[
    int | None, typer.Option(help="Iteration to run; default: the newest checkpoint's.")
]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    # models and tokenizers come from folders, never from a hub
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")


@app.command()
def consolidate(
    config: ConfigFile,
    overrides: Overrides = None,
    accept_changed: AcceptChanged = False,
    log_json: LogJson = False,
) -> None:
    """Distil all teachers into one student; start again to resume, at another layout too."""
    from . import prepare

    loaded = load_config(config, [*(overrides or []), *_logging(log_json)], ConsolidateConfig)
    prepared = functools.partial(prepare.consolidate, accept_changed=accept_changed)
    run = RunDir(loaded.run_dir)
    final = run.export(loaded.train.num_iterations)
    start.start_ranks(run, loaded, prepared, "consolidate:main", final=final)
    if is_first():
        from mtopd.report import write_report  # plots, which no rank needs

        write_report(loaded.run_dir, console if loaded.log_json else Console())


@app.command()
def specialist(config: ConfigFile, overrides: Overrides = None, log_json: LogJson = False) -> None:
    """Train one model on supervised examples: an HF checkpoint and, if asked, a teacher store."""
    from . import prepare, stores

    loaded = load_config(config, [*(overrides or []), *_logging(log_json)], SpecialistConfig)
    run, final = RunDir(loaded.run_dir), loaded.run_dir / "export" / "final"
    start.start_ranks(run, loaded, prepare.specialist, "supervised:main", final=final)
    if is_first() and loaded.store is not None:
        stores.add(loaded.store.name, final, loaded.store.path, console, slices=loaded.store.slices)


def _logging(log_json: bool) -> list[str]:
    return ["log_json=true"] if log_json else []


@app.command()
def rollout(run_dir: RunDirectory, iteration: Iteration = None, log_json: LogJson = False) -> None:
    """Phase 1 alone: sample the iteration's trajectories with the checkpoint of that iteration."""
    start.phase(run_dir, "rollout", iteration, _logging(log_json))


@app.command("teacher-pass")
def teacher_pass(
    run_dir: RunDirectory, iteration: Iteration = None, log_json: LogJson = False
) -> None:
    """Phase 2 alone: fill the hidden cache from the iteration's sealed trajectories."""
    start.phase(run_dir, "teacher_pass", iteration, _logging(log_json))


@app.command()
def train(run_dir: RunDirectory, iteration: Iteration = None, log_json: LogJson = False) -> None:
    """Phase 3 alone: train steps from sealed trajectories and cache; ends in a checkpoint."""
    start.phase(run_dir, "train", iteration, _logging(log_json))


@app.command()
def report(run_dir: RunDirectory) -> None:
    """Write report.json and report.html of a run, finished or not, and print its table."""
    from mtopd.report import write_report

    write_report(run_dir, Console())


StoreFolder = Annotated[Path, typer.Argument(help="Folder that holds the stores.")]
StorePath = Annotated[str, typer.Argument(metavar="STORE", help="A teacher store: folder or URL.")]


@teachers_app.command("add")
def teachers_add(
    name: Annotated[str, typer.Argument(help="The teacher's name.")],
    source: Annotated[Path, typer.Option("--from", help="HF checkpoint folder.")],
    to: Annotated[str, typer.Option(help="Folder that holds the stores.")] = "teachers",
    slices: Annotated[
        int, typer.Option(help="Largest tensor-parallel size that can load it without a copy.")
    ] = 1,
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


@app.command()
def doctor() -> None:
    """Say what this machine has and which path each part will take."""
    from . import doctor as doctor_pipeline

    doctor_pipeline.print_report(Console())


def main() -> None:
    """Entry point: user errors become one line and exit code 2."""
    # of libraries, about backends this machine lacks; `mtopd doctor` says it once
    warnings.filterwarnings("ignore")
    try:
        app(standalone_mode=False)
        return
    except MtopdError as error:
        if "--debug" in sys.argv:
            raise
        message, code = str(error), 2
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        message, code = "stopped; start the same command again to go on", 130
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        message, code = error.format_message(), 2  # usage errors of the command line
    if is_first():
        print_error(message)
    sys.exit(code)


if __name__ == "__main__":
    main()
