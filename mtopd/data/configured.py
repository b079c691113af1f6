"""The sources that a config names: checked before anything is read, read, known again by content."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mtopd.config_data import DataConfig, SourceConfig
from mtopd.data.environments import load_environment
from mtopd.data.prompt_file import load_prompt_file
from mtopd.data.readers import check_file, format_of
from mtopd.data.sources import Asking, PromptSource, load_reasoning_gym, with_fields
from mtopd.data.verifiers import open_dataset
from mtopd.types import MtopdError


def check_sources(config: DataConfig) -> None:
    """What takes no time to see: a file that is not there or of no format that is read, an unknown
    dataset or option of reasoning-gym, an expression that is none, an environment that is not
    installed.  Raises MtopdError.
    """
    for source in config.sources:
        try:
            _asking(source)
            for path in filter(None, (source.path, source.eval_path)):
                format_of(path)
            if source.environment is not None:
                load_environment(source.environment.python)
            if source.reasoning_gym is not None:
                open_dataset(
                    {
                        "dataset": source.reasoning_gym,
                        "options": source.config,
                        "size": source.draw("train_size"),
                        "seed": source.draw("seed"),
                    }
                )
        except MtopdError as error:
            raise MtopdError(f"source '{source.name}': {error}") from None


def _asking(source: SourceConfig) -> Asking:
    return Asking(
        source.system,
        tuple((example.question, example.answer) for example in source.examples),
        source.answer_from,
        tuple(source.normalize),
    )


def load_source(
    source: SourceConfig, say: Callable[[str], None] = lambda text: None
) -> tuple[PromptSource, PromptSource | None]:
    """(train rows, held-out rows or None) of one configured source, with its ``fields`` added for
    routing.
    """
    domain = source.fields.get("domain", source.name)
    asking = _asking(source)
    held_out: PromptSource | None = None
    if source.reasoning_gym is not None:
        train, held_out = load_reasoning_gym(
            source.name,
            source.reasoning_gym,
            source.config,
            size=source.draw("train_size"),
            seed=source.draw("seed"),
            eval_size=source.draw("eval_size"),
            eval_seed=source.draw("eval_seed"),
            num_examples=source.num_examples or 0,
            domain=domain,
            asking=asking,
        )
    else:
        assert source.path is not None
        load = partial(load_prompt_file, domain=domain, asking=asking, say=say)
        train = load(source.name, source.path)
        if source.eval_path is not None:
            held_out = load(f"{source.name}-eval", source.eval_path, held_out=True)
    return with_fields(train, source.fields), held_out and with_fields(held_out, source.fields)


def source_identity(source: SourceConfig) -> dict[str, Any]:
    """What a source's prompts are made of, by content: equal identities give equal rows.

    A file counts by its bytes, under the key that names it in the config, wherever it lies; a
    reasoning-gym dataset by its name, its options, its draws and the package's version.
    """
    if source.reasoning_gym is None:
        paths = {"path": source.path, "eval_path": source.eval_path}
        return {key: _file_hash(source.name, path) for key, path in paths.items() if path}
    return {
        "reasoning_gym": source.reasoning_gym,
        "version": importlib.metadata.version("reasoning-gym"),
        "config": dict(source.config),
        "train_size": source.train_size,
        "seed": source.seed,
        "eval_size": source.eval_size,
        "eval_seed": source.eval_seed,
    }


def _file_hash(name: str, path: Path) -> str:
    check_file(path)
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise MtopdError(
            f"source '{name}': {path} cannot be read ({error.strerror}); correct the path, or its "
            "permissions"
        ) from None
