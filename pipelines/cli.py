"""The command line: ``mtopd``.  Reads arguments, calls the verb's body, maps errors to exit codes.

A user's mistake is one clear line and exit code 2; the traceback is shown with --debug.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mtopd.config import ConsolidateConfig
from mtopd.config_file import load_config
from mtopd.config_specialist import SpecialistConfig
from mtopd.files import one_line_errors
from mtopd.progress import console, is_first, log_as_json, logs_json
from mtopd.run_dir import RunDir
from mtopd.types import MtopdError

from . import cli_host, cli_stores, failures, own_ranks, start
from .cli_host import ConfigFile, Overrides

app = typer.Typer(
    name="mtopd",
    help="Consolidate many specialist teachers into one student by full-vocabulary on-policy distillation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_stores.teachers_app, name="teachers")
app.add_typer(cli_stores.trajectories_app, name="trajectories")
app.add_typer(cli_stores.cache_app, name="cache")
app.command()(cli_host.serve)
app.command()(cli_host.doctor)
RunDirectory = Annotated[Path, typer.Argument(help="Run directory of a consolidation.")]


def _choose_logging(log_json: bool) -> bool:
    if log_json:
        log_as_json()
    return log_json


LogJson = Annotated[
    bool,
    typer.Option(
        "--log-json",
        help="Print lines of metrics.jsonl instead of a progress display.",
        callback=_choose_logging,
    ),
]
AcceptChanged = Annotated[
    bool,
    typer.Option(
        "--accept-changed", help="Go on although teachers, routes or tokenizer have changed."
    ),
]
Check = Annotated[
    bool,
    typer.Option(
        "--check",
        help="Stop before the ranks start: everything is checked, the prompts are prepared.",
    ),
]
Iteration = Annotated[
    int | None, typer.Option(min=0, help="Iteration to run; default: the newest checkpoint's.")
]

_INTERRUPTED = 128 + signal.SIGINT  # what typer makes of Ctrl-C: it returns the code of every exit
_STOPPED = "stopped; start the same command again to go on"


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    # models and tokenizers come from folders, never from a hub
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
    if context.invoked_subcommand in (
        "teachers",
        "trajectories",
        "cache",
        "report",
        "doctor",
        "serve",
    ):
        # They take no part in a torchrun: in a shell that inherited its variables, they speak.
        os.environ.pop("TORCHELASTIC_RUN_ID", None)


@app.command()
def consolidate(
    config: ConfigFile,
    overrides: Overrides = None,
    accept_changed: AcceptChanged = False,
    log_json: LogJson = False,
    check: Check = False,
    origin: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="RUN[@ITERATION]",
            help="A new run begins with weights and optimizer moments of that run's checkpoint.",
        ),
    ] = None,
) -> None:
    """Distil all teachers into one student; start again to resume, at another layout too."""
    from . import prepare, serve

    loaded = load_config(config, overrides or [], ConsolidateConfig)
    prepared = functools.partial(prepare.consolidate, accept_changed=accept_changed, origin=origin)
    run = RunDir(loaded.run_dir)
    final = run.export(loaded.train.num_iterations)
    start.start_ranks(
        run,
        loaded,
        prepared,
        "consolidate:main",
        final=final,
        check=check,
        around_ranks=functools.partial(serve.servers_of, loaded, run),
    )
    if is_first() and not check:
        from mtopd.report import write_report  # plots, which no rank needs

        write_report(loaded.run_dir, console if logs_json(loaded.log_json) else Console())


@app.command()
def specialist(
    config: ConfigFile,
    overrides: Overrides = None,
    log_json: LogJson = False,
    check: Check = False,
) -> None:
    """Train one model on supervised examples: an HF checkpoint and, if asked, a teacher store."""
    from . import prepare, stores

    loaded = load_config(config, overrides or [], SpecialistConfig)
    run, final = RunDir(loaded.run_dir), loaded.run_dir / "export" / "final"
    start.start_ranks(run, loaded, prepare.specialist, "supervised:main", final=final, check=check)
    if not is_first() or check:
        return
    from mtopd.report import write_report  # plots, which no rank needs

    write_report(loaded.run_dir, console if logs_json(loaded.log_json) else Console())
    if loaded.store is not None:
        stores.add(loaded.store.name, final, loaded.store.path, console, slices=loaded.store.slices)


@app.command()
def rollout(run_dir: RunDirectory, iteration: Iteration = None, log_json: LogJson = False) -> None:
    """Phase 1 alone: sample the iteration's trajectories with the checkpoint of that iteration."""
    start.phase(run_dir, "rollout", iteration)


@app.command("teacher-pass")
def teacher_pass(
    run_dir: RunDirectory, iteration: Iteration = None, log_json: LogJson = False
) -> None:
    """Phase 2 alone: fill the hidden cache from the iteration's sealed trajectories."""
    start.phase(run_dir, "teacher_pass", iteration)


@app.command()
def train(run_dir: RunDirectory, iteration: Iteration = None, log_json: LogJson = False) -> None:
    """Phase 3 alone: train steps from sealed trajectories and cache; ends in a checkpoint."""
    start.phase(run_dir, "train", iteration)


@app.command()
def evaluate(
    run_dir: RunDirectory,
    iteration: Iteration = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Evaluate the config's baselines instead.")
    ] = False,
    log_json: LogJson = False,
) -> None:
    """Accuracy on held-out prompts of the student at a checkpoint, or of the baselines."""
    if baselines and iteration is not None:
        raise MtopdError(
            "--iteration says which student, --baselines that it is none; leave one out"
        )
    start.phase(run_dir, "baselines" if baselines else "evaluate", iteration)
    if is_first():
        from mtopd.report import write_report

        write_report(run_dir, console if logs_json(False) else Console())


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="Run directory; a specialist's, too.")],
) -> None:
    """Write report.json and report.html of a run, finished or not, and print its table."""
    from mtopd.report import write_report

    write_report(run_dir, Console())


def main() -> None:
    """Entry point: user errors become one line and exit code 2."""
    # of libraries, about backends this machine lacks; `mtopd doctor` says it once
    warnings.filterwarnings("ignore")
    try:
        with one_line_errors():
            ended = app(standalone_mode=False)
        if not ended:
            return
        if ended != _INTERRUPTED:
            sys.exit(ended)
        message, code = _STOPPED, _INTERRUPTED
    except MtopdError as error:
        if "--debug" in sys.argv:
            raise
        message, code = str(error), 2
    except BrokenPipeError:  # whoever read what we print has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(128 + signal.SIGPIPE)
    except (KeyboardInterrupt, typer.Abort):
        message, code = _STOPPED, _INTERRUPTED
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        message, code = error.format_message(), 2  # usage errors of the command line
    failures.print_before_start(message, own_ranks.own_rank())
    sys.exit(code)


if __name__ == "__main__":
    main()
