"""SGLang servers of a run, before its ranks start: what they start with, whether they can serve it, and
whether they answer.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence

from mtopd.config import ConsolidateConfig
from mtopd.dtypes import torch_dtype
from mtopd.manifest import differences
from mtopd.rollout.sglang_broadcast import let_go
from mtopd.rollout.sglang_command import check_arguments
from mtopd.rollout.sglang_servers import wait_for_servers
from mtopd.rollout.sglang_serving import start_command, write_serving_folder
from mtopd.run_dir import RunDir
from mtopd.types import MtopdError

from .continuation import architecture


def check_engine(config: ConsolidateConfig) -> None:
    """Raise MtopdError where the client's library is missing, or servers could not compute what they
    will be asked.
    """
    if config.rollout.engine != "sglang":
        return
    for library in ("aiohttp", "orjson"):
        if importlib.util.find_spec(library) is None:
            raise MtopdError(
                f"rollout.engine sglang needs {library}, which is not installed: "
                "pip install 'mtopd[sglang]'"
            )
    rollout = config.rollout
    if rollout.python is not None:  # servers: auto
        if not os.access(rollout.python, os.X_OK) or rollout.python.is_dir():
            raise MtopdError(
                f"rollout.python {rollout.python} is no program that can be run; it is the Python of "
                "an environment that has SGLang, which is one of its own (docs/rollout.md)"
            )
        check_arguments(rollout.server_args)
    wanted = architecture(config.student.model) | {"vocab_size": 0}  # rows behind are not served
    for name, folder in config.evaluation.baselines.items():
        found = architecture(folder) | {"vocab_size": 0}
        for _, difference in differences(found, wanted):
            raise MtopdError(
                f"evaluation.baselines.{name}: {folder} has another architecture than the student "
                f"{config.student.model}, which is what the SGLang servers compute: {difference}; "
                "leave it out, or evaluate it with rollout.engine embedded"
            )


def write_folder(
    config: ConsolidateConfig, run: RunDir, vocab_size: int, say: Callable[[str], None]
) -> None:
    """Write what servers start with; where it is new, say how they do."""
    if config.rollout.engine != "sglang":
        return
    student = config.student
    dtype = torch_dtype(student.dtype)
    is_new = write_serving_folder(run.serving, student.model, vocab_size, dtype)
    if is_new and config.rollout.servers != "auto":
        command = start_command(
            run.serving, context_length=config.data.context_length, seeded=config.rollout.seeded
        )
        say(f"SGLang servers of this run are started with: {command} --host HOST --port PORT")


def await_servers(
    config: ConsolidateConfig, run: RunDir, urls: Sequence[str] | None = None
) -> None:
    """Return once every server answers, and as its client reads.  ``urls``: None for those that the
    config names.  Raises MtopdError.
    """
    rollout = config.rollout
    if rollout.engine == "sglang":
        with let_go(run.weights_group):
            wait_for_servers(
                rollout.servers if urls is None else urls,
                context_length=config.data.context_length,
                seeded=rollout.seeded,
                patience_s=rollout.patience_s,
            )
