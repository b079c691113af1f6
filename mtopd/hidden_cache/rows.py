"""Tensors seen as the rows of the cache, without a copy."""

from __future__ import annotations

import numpy as np
import torch


def view_rows(hidden_NE: torch.Tensor) -> np.ndarray:
    """The memory of a contiguous CPU tensor as the cache stores it: float32, or the uint16 bits of
    bfloat16.

    Writing into the result writes into the tensor, so it also serves as the buffer of a read.
    """
    assert hidden_NE.dtype in (torch.bfloat16, torch.float32), hidden_NE.dtype
    bits_NE = hidden_NE.detach()
    if bits_NE.dtype == torch.bfloat16:
        bits_NE = bits_NE.view(torch.uint16)
    return bits_NE.numpy()
