"""Verbs about this host: ``mtopd serve`` and ``mtopd doctor``.  Only reads arguments; the bodies are
serve.py and doctor.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mtopd.config import ConsolidateConfig
from mtopd.config_file import load_config

ConfigFile = Annotated[Path, typer.Argument(help="YAML config of the run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Override settings of the file."),
]


def serve(
    config: ConfigFile,
    overrides: Overrides = None,
    host: Annotated[
        str, typer.Option(help="This machine's address or name by which the run reaches it.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="The first server's port; default: free ones."),
    ] = None,
) -> None:
    """Start the SGLang servers of a config and keep them up, until Ctrl-C or SIGTERM."""
    from .serve import serve as keep_up

    keep_up(load_config(config, overrides or [], ConsolidateConfig), host=host, port=port)


def doctor(
    model: Annotated[
        Path | None, typer.Argument(help="HF folder of a student; default: the machine alone.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="student.dtype: float32 or bfloat16.")] = "float32",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a micro-batch on one rank.")] = 4096,
) -> None:
    """Say what this machine has and which path each part takes; of MODEL, which layouts fit it."""
    from . import doctor as doctor_pipeline
    from .memory import print_layouts

    if model is None:
        doctor_pipeline.print_report(Console())
    else:
        print_layouts(model, Console(soft_wrap=True, highlight=False), dtype=dtype, tokens=tokens)
