"""Matrix products of the fused losses: operands of 16 bits, results and sums of 32 (or all of 64).

Legend: C tokens of a chunk, v vocabulary rows, X hidden size.

CUDA multiplies 16-bit operands into float32 directly.  Elsewhere they are upcast first, the weights a tile of
vocabulary rows at a time, so that an upcast copy of a whole output layer never exists.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def hidden_times_weight(hidden_CX: Tensor, weight_vX: Tensor, dtype: torch.dtype, tile_rows: int) -> Tensor:
    """hidden @ weight.T, [C, v] in `dtype`."""
    if _has_wide_product(hidden_CX, weight_vX, dtype):
        return torch.mm(hidden_CX, weight_vX.T, out_dtype=dtype)
    hidden_CX = hidden_CX.to(dtype)
    product_Cv = hidden_CX.new_empty(hidden_CX.shape[0], weight_vX.shape[0])
    for tile in _tiles(weight_vX.shape[0], tile_rows if weight_vX.dtype != dtype else weight_vX.shape[0]):
        torch.mm(hidden_CX, weight_vX[tile].to(dtype).T, out=product_Cv[:, tile])
    return product_Cv


def gradient_times_weight(gradient_Cv: Tensor, weight_vX: Tensor, tile_rows: int) -> Tensor:
    """gradient @ weight, [C, X] in the dtype of the gradient."""
    dtype = gradient_Cv.dtype
    if _has_wide_gradient_product(weight_vX, dtype):
        return torch.mm(gradient_Cv.to(weight_vX.dtype), weight_vX, out_dtype=dtype)
    product_CX = gradient_Cv.new_zeros(gradient_Cv.shape[0], weight_vX.shape[1])
    for tile in _tiles(weight_vX.shape[0], tile_rows if weight_vX.dtype != dtype else weight_vX.shape[0]):
        product_CX.addmm_(gradient_Cv[:, tile], weight_vX[tile].to(dtype))
    return product_CX


def add_gradient_times_hidden_(sum_vX: Tensor, gradient_Cv: Tensor, hidden_CX: Tensor, tile_rows: int) -> None:
    """sum += gradient.T @ hidden; the sum has the dtype of the gradient."""
    dtype = gradient_Cv.dtype
    if not _has_wide_gradient_product(hidden_CX, dtype):
        sum_vX.addmm_(gradient_Cv.T, hidden_CX.to(dtype))
        return
    gradient_Cv = gradient_Cv.to(hidden_CX.dtype)
    for tile in _tiles(sum_vX.shape[0], tile_rows):
        sum_vX[tile].add_(torch.mm(gradient_Cv[:, tile].T, hidden_CX, out_dtype=dtype))


def _has_wide_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch.mm takes these operands with out_dtype=dtype."""
    is_16_bit = left.dtype == right.dtype and left.dtype in (torch.bfloat16, torch.float16)
    return left.is_cuda and is_16_bit and dtype == torch.float32


def _has_wide_gradient_product(operand: Tensor, dtype: torch.dtype) -> bool:
    """The same for a gradient cast to the operand's dtype: not float16, where 1/N times a small p underflows."""
    return operand.dtype != torch.float16 and _has_wide_product(operand, operand, dtype)


def _tiles(num_rows: int, tile_rows: int) -> Iterator[slice]:
    return (slice(start, min(start + tile_rows, num_rows)) for start in range(0, num_rows, max(tile_rows, 1)))
