"""The command line: ``mtopd``.  Checks what can be checked, starts the ranks, maps their exit code.

A user's mistake is one clear line and exit code 2; the traceback is shown with --debug.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from mtopd.types import MtopdError

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
_console = Console(stderr=True)

ConfigFile = Annotated[Path, typer.Argument(help="YAML config of the run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Override settings of the file."),
]
RunDirectory = Annotated[Path, typer.Argument(help="Run directory of a consolidation.")]
LogJson = Annotated[
    bool,
    typer.Option(
        "--log-json", help="Print every line of metrics.jsonl instead of a progress display."
    ),
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
    os.environ.setdefault(
        "TRANSFORMERS_OFFLINE", "1"
    )  # models and tokenizers come from folders, never from a hub


def _say(text: str) -> None:
    if _is_first():
        _console.print(text, style="dim", highlight=False, markup=False)


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _run(
    config: Any, prepare: Callable[..., None], target: str, final: Callable[[Any], Path]
) -> bool:
    """Lock the run directory, prepare it, run the ranks.  False when the run was finished before."""
    from mtopd.run_dir import RunDir, is_sealed

    from . import ranks

    run = RunDir(config.run_dir)
    if ranks.under_torchrun():
        return _run_under_torchrun(config, run, prepare, target)
    with run.lock():
        prepare(config, run, _say)
        if is_sealed(final(run)):
            _say(f"{run.path} is finished; remove it to start over")
            return False
        _say(f"starting {config.student.parallel.world_size} ranks")
        ranks.launch(config.student.parallel.world_size, target, run.path, run.generation)
    return True


def _run_under_torchrun(config: Any, run: Any, prepare: Callable[..., None], target: str) -> bool:
    """An outer torchrun started one process per rank: rank 0 locks and prepares, the others wait
    for its word.
    """
    import contextlib

    import torch.distributed as dist

    from . import ranks
    from .prepare import check_world

    check_world(config.student)
    store, _, _ = next(dist.rendezvous("env://"))
    store = dist.PrefixStore("mtopd", store)
    with run.lock() if _is_first() else contextlib.nullcontext():
        if _is_first():
            try:
                prepare(config, run, _say)
            except MtopdError as error:
                store.set("start", f"error {error}")
                raise
            store.set("start", f"generation {run.generation}")
        word, _, rest = store.get("start").decode().partition(" ")
        if word == "error":
            raise MtopdError(rest)
        ranks.quiet_libraries()
        ranks.resolve(target)(run.path, int(rest))
    return _is_first()


@app.command()
def consolidate(
    config: ConfigFile,
    overrides: Overrides = None,
    accept_changed: AcceptChanged = False,
    log_json: LogJson = False,
) -> None:
    """Distil all teachers of a config into one student; start again to resume, at another layout
    too.
    """
    import functools

    from mtopd.config import ConsolidateConfig, load_config

    from . import prepare, report

    loaded = load_config(config, [*(overrides or []), *_logging(log_json)], ConsolidateConfig)
    prepared = functools.partial(prepare.consolidate, accept_changed=accept_changed)
    _run(loaded, prepared, "consolidate:main", lambda run: run.export(loaded.train.num_iterations))
    if _is_first():
        report.write(loaded.run_dir, _console if loaded.log_json else Console())


@app.command()
def specialist(config: ConfigFile, overrides: Overrides = None, log_json: LogJson = False) -> None:
    """Train one model on supervised examples; writes an HF checkpoint and, if asked, a teacher
    store.
    """
    from mtopd.config import SpecialistConfig, load_config

    from . import prepare, stores

    loaded = load_config(config, [*(overrides or []), *_logging(log_json)], SpecialistConfig)
    final = loaded.run_dir / "export" / "final"
    _run(loaded, prepare.specialist, "specialist:main", lambda run: final)
    if _is_first() and loaded.store is not None:
        stores.add(
            loaded.store.name, final, loaded.store.path, _console, slices=loaded.store.slices
        )


def _logging(log_json: bool) -> list[str]:
    return ["log_json=true"] if log_json else []


def _phase(run_dir: Path, phase: str, iteration: int | None, log_json: bool) -> None:
    from mtopd.config import ConsolidateConfig, load_config
    from mtopd.run_dir import RunDir

    from . import prepare, ranks

    if not (run_dir / "config.yaml").is_file():
        raise MtopdError(
            f"{run_dir} is not a run directory (no config.yaml); give the run_dir of a "
            "consolidation"
        )
    loaded = load_config(run_dir / "config.yaml", _logging(log_json), ConsolidateConfig)
    run = RunDir(run_dir)
    with run.lock():
        prepare.consolidate(loaded, run, _say)
        chosen = "newest" if iteration is None else str(iteration)
        ranks.launch(
            loaded.student.parallel.world_size,
            "phase:main",
            run.path,
            run.generation,
            phase,
            chosen,
        )


@app.command()
def rollout(run_dir: RunDirectory, iteration: Iteration = None, log_json: LogJson = False) -> None:
    """Phase 1 alone: sample the iteration's trajectories with the checkpoint of that iteration."""
    _phase(run_dir, "rollout", iteration, log_json)


@app.command("teacher-pass")
def teacher_pass(
    run_dir: RunDirectory, iteration: Iteration = None, log_json: LogJson = False
) -> None:
    """Phase 2 alone: fill the hidden cache from the iteration's sealed trajectories."""
    _phase(run_dir, "teacher_pass", iteration, log_json)


@app.command()
def train(run_dir: RunDirectory, iteration: Iteration = None, log_json: LogJson = False) -> None:
    """Phase 3 alone: the iteration's train steps from its sealed trajectories and cache; ends in a
    checkpoint.
    """
    _phase(run_dir, "train", iteration, log_json)


@app.command()
def report(run_dir: RunDirectory) -> None:
    """Write report.json and report.html of a run, finished or not, and print its table."""
    from . import report as report_pipeline

    report_pipeline.write(run_dir, Console())


StorePath = Annotated[
    str, typer.Argument(metavar="STORE", help="Folder or URL of a teacher store.")
]


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
        name, source, folder, _console, slices=slices, logit_scale=logit_scale, softcap=softcap
    )


@teachers_app.command("ls")
def teachers_ls(
    folder: Annotated[Path, typer.Argument(help="Folder that holds the stores.")] = Path(
        "teachers"
    ),
) -> None:
    """List the teacher stores of a folder; what cannot be read is named with its cause."""
    from . import stores

    Console(soft_wrap=True, highlight=False).print(stores.table(folder))


@teachers_app.command("verify")
def teachers_verify(store: StorePath) -> None:
    """Read every byte of a store and name each block that is damaged."""
    from . import stores

    stores.verify(store, _console)


@teachers_app.command("rm")
def teachers_rm(
    store: StorePath, yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False
) -> None:
    """Remove a teacher store, and what an interrupted `teachers add` of it left."""
    from . import stores

    for folder in stores.removable(stores.local_folder(store)):
        if yes or typer.confirm(f"remove {folder}?", err=True, abort=True):
            stores.remove_store(folder)
            _say(f"removed {folder}")


@cache_app.command("ls")
def cache_ls(run_dir: RunDirectory) -> None:
    """Samples, rows, bytes, segments and damaged files by iteration and teacher."""
    from . import caches

    Console(soft_wrap=True, highlight=False).print(caches.table(run_dir))


@cache_app.command("verify")
def cache_verify(run_dir: RunDirectory) -> None:
    """Read all rows and name every damaged sample with its cause; exit code 2 if there is one."""
    from . import caches

    caches.verify(run_dir, _console)


@cache_app.command("gc")
def cache_gc(run_dir: RunDirectory) -> None:
    """Delete what crashes left and segments that were computed again; refused while the run is in
    use.
    """
    from . import caches

    caches.gc(run_dir, _console)


@app.command()
def doctor() -> None:
    """Say what this machine has and which path each part will take."""
    from . import doctor as doctor_pipeline

    doctor_pipeline.print_report(Console())


def main() -> None:
    """Entry point: user errors become one line and exit code 2."""
    import warnings

    warnings.filterwarnings(
        "ignore"
    )  # of libraries, about backends this machine lacks; `mtopd doctor` says it once
    try:
        app(standalone_mode=False)
    except MtopdError as error:
        if "--debug" in sys.argv:
            raise
        _error(str(error))
        sys.exit(2)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _error("stopped; start the same command again to go on")
        sys.exit(130)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        _error(error.format_message())  # usage errors of the command line
        sys.exit(2)


def _error(text: str) -> None:
    if _is_first():
        line = " ".join(text.split())  # one line, whatever the message holds
        _console.print(
            f"[bold red]error:[/bold red] {escape(line)}", highlight=False, soft_wrap=True
        )


if __name__ == "__main__":
    main()
