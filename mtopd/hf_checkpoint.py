"""HF checkpoint folders: config and tensors read one at a time, and a folder written whole or not
at all.

No code from a folder is ever run: only config.json, tokenizer files and safetensors are read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from mtopd.dtypes import torch_dtype
from mtopd.families import FAMILIES, model_facts
from mtopd.files import publish_tree, remove_tree
from mtopd.safetensors_file import TensorEntry, read_header
from mtopd.types import MtopdError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


# -- config ----------------------------------------------------------------------------------------
def load_hf_config(folder: Path) -> PretrainedConfig:
    """The HF config of a checkpoint folder; never runs code from it.

    Raises MtopdError when the folder has no readable config.json or its architecture is not
    supported.
    """
    from transformers import AutoConfig

    path = folder / "config.json"
    if not path.is_file():
        raise MtopdError(f"{folder} is not an HF checkpoint: it has no config.json")
    try:
        model_type = json.loads(path.read_text()).get("model_type")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise MtopdError(f"{path} is not a valid HF config ({error})") from None
    _check_model_type(str(path), model_type)
    return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def hf_config_from_dict(values: Mapping[str, Any]) -> PretrainedConfig:
    """The HF config object of an architecture that a teacher store describes."""
    from transformers import AutoConfig

    values = dict(values)
    model_type = values.pop("model_type", None)
    _check_model_type("architecture", model_type)
    return AutoConfig.for_model(model_type, **values)


def _check_model_type(where: str, model_type: object) -> None:
    if model_type not in FAMILIES:
        raise MtopdError(
            f"{where} has model_type {model_type!r}; supported are {', '.join(FAMILIES)}"
        )


# -- tensors ---------------------------------------------------------------------------------------
class Tensors(Protocol):
    """Tensors of a checkpoint by name, one at a time."""

    def __getitem__(self, name: str) -> torch.Tensor: ...


class HFTensors(Mapping[str, torch.Tensor]):
    """Tensors of an HF folder by name, one at a time, each read anew.  Every file's header is
    checked at the start.

    They are read, not mapped: pages of a mapped file count as this process's memory for as long as
    it is open.
    """

    def __init__(self, folder: Path) -> None:
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise MtopdError(
                f"{folder} has no safetensors files; other weight formats can run code and are not "
                "read"
            )
        self._entries = {entry.name: (path, entry) for path in paths for entry in read_header(path)}
        self._folder = folder

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._entries:
            raise MtopdError(
                f"{self._folder} has no tensor {name!r}, which its config.json calls for"
            )
        path, entry = self._entries[name]
        tensor = torch.empty(entry.shape, dtype=torch_dtype(entry.dtype))
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(entry.start)
                _read_whole(file, tensor.reshape(-1).view(torch.uint8).numpy().data)
        except OSError as error:
            raise MtopdError(
                f"cannot read {path}: {error.strerror or 'it ends early'}; copy it again"
            ) from None
        return tensor

    def identity(self) -> list[list[Any]]:
        """What tells this checkpoint from another: every file's tensors, size and time of change."""
        files: dict[Path, list[TensorEntry]] = {}
        for path, entry in self._entries.values():
            files.setdefault(path, []).append(entry)
        return [
            [
                path.name,
                path.stat().st_size,
                path.stat().st_mtime_ns,
                [[e.name, e.dtype, e.shape, e.start] for e in es],
            ]
            for path, es in sorted(files.items())
        ]


def _read_whole(file: FileIO, out: memoryview) -> None:
    done = 0
    while done < len(out):
        got = file.readinto(out[done:])
        if not got:
            raise OSError("it ends early")
        done += got


def stored_names(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> list[str]:
    """The checkpoint's tensors that make up the model's ``name``.

    transformers stores the experts of a layer as one tensor, gate over up; its own map says which
    of the checkpoint's tensors those are, matrix by matrix and within it expert by expert.
    """
    from transformers.core_model_loading import revert_weight_conversion

    return list(revert_weight_conversion(model, {name: torch.empty_like(tensor, device="meta")}))


def fill(tensor: torch.Tensor, names: Sequence[str], tensors: Tensors) -> None:
    """Copy the checkpoint's tensors (``stored_names``) into the model's.  Raises MtopdError when a
    shape differs.
    """
    pieces = [tensor]
    if len(names) > 1:
        experts = tensor.shape[0]
        pieces = [
            piece
            for matrix in tensor.chunk(len(names) // experts, dim=1)
            for piece in matrix.unbind()
        ]
    for stored, piece in zip(names, pieces, strict=True):
        found = tensors[stored]
        if found.shape != piece.shape:
            raise MtopdError(
                f"tensor {stored!r} has shape {tuple(found.shape)}, the config calls for "
                f"{tuple(piece.shape)}"
            )
        piece.copy_(found)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of an HF checkpoint that answering takes."""
    stored, facts = HFTensors(folder), model_facts(load_hf_config(folder))
    return {name: stored[name] for name in stored if not facts.is_further_head(name)}


def average_weights(folders: list[Path]) -> dict[str, torch.Tensor]:
    """The plain mean of checkpoints, in the dtype of the first: a running float32 sum, so that one
    checkpoint is in memory beside it.
    """
    first, *others = folders
    weights = read_weights(first)
    sums = {name: tensor.float() for name, tensor in weights.items()}
    dtypes = {name: tensor.dtype for name, tensor in weights.items()}
    del weights
    for folder in others:
        weights = read_weights(folder)
        if lacking := sorted(sums.keys() - weights.keys()):
            raise MtopdError(
                f"{folder} has no tensor {lacking[0]!r}, which {first} has; they cannot be averaged"
            )
        for name, total in sums.items():
            if weights[name].shape != total.shape:
                raise MtopdError(
                    f"{name!r} has shape {tuple(weights[name].shape)} in {folder} and "
                    f"{tuple(total.shape)} in {first}; they cannot be averaged"
                )
            total += weights[name].float()
        del weights
    return {name: (total / len(folders)).to(dtypes[name]) for name, total in sums.items()}


# -- writing ---------------------------------------------------------------------------------------
def write_hf_checkpoint(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    hf_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype,
    seal: Callable[[Path], object],
) -> None:
    """Write a normal HF checkpoint, whole or not at all; ``seal`` marks the folder complete before
    it gets its name.  ``dtype`` is what config.json names.
    """
    from safetensors.torch import save_file

    partial = folder.with_name(f".{folder.name}.tmp")
    for leftover in (partial, folder):
        remove_tree(leftover)
    partial.mkdir(parents=True)
    save_file(
        {n: t.cpu().contiguous() for n, t in tensors.items()},
        partial / "model.safetensors",
        {"format": "pt"},
    )
    hf_config.dtype = dtype
    hf_config.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    seal(partial)
    publish_tree(partial, folder)
