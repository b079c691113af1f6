"""Weights of a transformers model under the names that its checkpoints use, whatever the model
calls them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from mtopd.types import MtopdError


class Tensors(Protocol):
    """Tensors of a checkpoint by name, one at a time."""

    def __getitem__(self, name: str) -> torch.Tensor: ...


def stored_names(model: Any, name: str, tensor: torch.Tensor) -> list[str]:
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
