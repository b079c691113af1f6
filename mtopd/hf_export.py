"""The student's HF folder with new weights, written whole or not at all.

What is no weight comes from the folder that the student began with, so that whoever read that one
reads this one: config.json and tokenizer files as they stood, not as this version of transformers
would write them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from mtopd.config_json import renamed
from mtopd.dtypes import dtype_name
from mtopd.families import rope_scaling
from mtopd.files import publish_tree, read_json, remove_tree
from mtopd.hf_checkpoint import HFTensors, weight_files
from mtopd.hf_writer import INDEX, Shard, write_index
from mtopd.run_dir import SEAL

# Files that are copied; code, pickles and other weight formats are none of them.
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "tiktoken*", "LICENSE*", "README*")
_NOT_COPIED = ("*.index.json", "*.py")
_TEMPLATES = "additional_chat_templates"
# Of config.json: the weights that are written have their scales multiplied in.
_OF_QUANTISED = ("quantization_config", "compression_config")
_EDITED = ("config.json", "tokenizer_config.json")
# What a start has read through whatever links lead to it, and an export is no model without.
_READ_AT_START = (
    *_EDITED,
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "chat_template.jinja",
)


def begin_export(
    folder: Path, source: Path, changes: Mapping[str, object], *, dtype: torch.dtype
) -> list[str]:
    """Make the folder that weight files are written into, with what else lies in ``source``; returns
    the names of what was left out.

    ``changes`` are fields of config.json that no longer are as they were; ``dtype`` is named there
    too.  Raises MtopdError or OSError where it cannot be written.
    """
    partial = unfinished(folder)
    for leftover in (partial, folder):
        remove_tree(leftover)
    partial.mkdir(parents=True)
    left_out = _copy(source, partial)
    for name in _EDITED:
        if (partial / name).is_file():
            values = found = read_json(partial / name)
            if "auto_map" in found:
                values = {field: value for field, value in found.items() if field != "auto_map"}
                left_out.append(f"auto_map of {name}")
            if name == "config.json":
                values = config_values(values | dict(changes), dtype)
            if values is not found:  # a tokenizer's file stays as it stood, byte for byte
                (partial / name).write_text(json.dumps(values, indent=2) + "\n")
    return left_out


def unfinished(folder: Path) -> Path:
    """Where an export is until it is whole."""
    return folder.with_name(f".{folder.name}.tmp")


def finish_export(folder: Path, shards: Sequence[Shard], seal: Callable[[Path], object]) -> None:
    """Write the index, look whether every weight file is whole, ``seal``, give the folder its name.
    The files were synced by their writers.
    """
    partial = unfinished(folder)
    write_index(partial, shards)
    found, wanted = HFTensors(partial), {t.name for shard in shards for t in shard.tensors}
    assert found.keys() == wanted, found.keys() ^ wanted
    seal(partial)
    publish_tree(partial, folder, durable={shard.name for shard in shards})


def config_values(values: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """config.json with the dtype of its weights, in the spellings that transformers 4 and 5 read, and
    without what told of quantised ones.

    transformers 5 writes ``dtype``, keeps everything of the rope in ``rope_parameters`` and has
    renamed fields (``num_experts``); transformers 4 reads ``torch_dtype``, ``rope_theta``,
    ``rope_scaling`` and the former names, and takes a default without a word where they are missing.
    """
    found = {name: value for name, value in values.items() if name not in _OF_QUANTISED}
    for spelling in ("torch_dtype", "dtype"):
        if spelling == "torch_dtype" or spelling in found:
            found[spelling] = dtype_name(dtype)
    rope = found.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        found["rope_theta"] = rope["rope_theta"]  # null says nothing, another is refused at a start
        if scaling := rope_scaling(rope):
            found["rope_scaling"] = found.get("rope_scaling") or scaling
    for former, name in renamed(found.get("model_type")).items():
        if name in found:
            found.setdefault(former, found[name])
    return found


def _copy(source: Path, target: Path) -> list[str]:
    """Copy by list; returns what was not copied and is no weight that ``tensors`` replace."""
    replaced = {path.name for path in weight_files(source)} | {INDEX, SEAL}
    left_out = []
    for path in sorted(source.iterdir()):
        if path.name == _TEMPLATES and path.is_dir() and not path.is_symlink():
            (target / _TEMPLATES).mkdir()
            for template in sorted(path.iterdir()):
                name = f"{_TEMPLATES}/{template.name}"
                if template.suffix == ".jinja" and template.is_file() and _is_own(template, source):
                    shutil.copyfile(template, target / name)
                else:
                    left_out.append(name)
        elif _is_copied(path.name) and path.is_file() and _is_own(path, source):
            shutil.copyfile(path, target / path.name)
        elif path.name not in replaced:
            left_out.append(path.name)
    return left_out


def _is_copied(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _COPIED) and not any(
        fnmatch(name, pattern) for pattern in _NOT_COPIED
    )


def _is_own(path: Path, source: Path) -> bool:
    """No link that leads elsewhere, but to what was read already; the links of a hub's cache lead
    into its ``blobs``.
    """
    if path.parent == source and path.name in _READ_AT_START:
        return True
    real = path.resolve()
    blobs = source.resolve().parent.parent / "blobs"
    return real.is_relative_to(source.resolve()) or real.parent == blobs
