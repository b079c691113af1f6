"""Matrix products of the fused losses: operands of 16 bits, results and sums of 32 (or all of 64).

Legend: C tokens of a chunk, v vocabulary rows, X hidden size.

CUDA multiplies 16-bit operands into float32 directly.  Elsewhere they are upcast first, the weights
a tile of vocabulary rows at a time, so that an upcast copy of a whole output layer never exists.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def hidden_times_weight_(
    out_Cv: Tensor, hidden_CX: Tensor, weight_vX: Tensor, tile_rows: int
) -> None:
    """out = hidden @ weight.T, in the dtype of `out`."""
    dtype = out_Cv.dtype
    if has_wide_product(hidden_CX, weight_vX, dtype):
        torch.mm(hidden_CX, weight_vX.T, out_dtype=dtype, out=out_Cv)
        return
    hidden_CX = hidden_CX.to(dtype)
    for tile in _tiles(weight_vX, tile_rows, dtype):
        torch.mm(hidden_CX, weight_vX[tile].to(dtype).T, out=out_Cv[:, tile])


def gradient_times_weight(
    gradient_Cv: Tensor, weight_vX: Tensor, tile_rows: int, dtype: torch.dtype
) -> Tensor:
    """gradient @ weight, [C, X] in `dtype`."""
    if has_wide_product(gradient_Cv, weight_vX, dtype):
        return torch.mm(gradient_Cv, weight_vX, out_dtype=dtype)
    product_CX = gradient_Cv.new_zeros(gradient_Cv.shape[0], weight_vX.shape[1], dtype=dtype)
    for tile in _tiles(weight_vX, tile_rows, dtype):
        product_CX.addmm_(gradient_Cv[:, tile].to(dtype), weight_vX[tile].to(dtype))
    return product_CX


def add_gradient_times_hidden_(
    sum_vX: Tensor, gradient_Cv: Tensor, hidden_CX: Tensor, is_first: bool
) -> None:
    """sum += gradient.T @ hidden in the dtype of the sum; with `is_first` the sum's content is not
    read.
    """
    beta = 0 if is_first else 1
    if has_wide_product(gradient_Cv, hidden_CX, sum_vX.dtype):
        torch.addmm(sum_vX, gradient_Cv.T, hidden_CX, out_dtype=sum_vX.dtype, beta=beta, out=sum_vX)
    else:
        sum_vX.addmm_(gradient_Cv.T.to(sum_vX.dtype), hidden_CX.to(sum_vX.dtype), beta=beta)


def has_wide_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch.mm takes these operands with out_dtype=dtype."""
    is_16_bit = left.dtype == right.dtype and left.dtype in (torch.bfloat16, torch.float16)
    return left.is_cuda and is_16_bit and dtype == torch.float32


def _tiles(weight_vX: Tensor, tile_rows: int, dtype: torch.dtype) -> Iterator[slice]:
    """Vocabulary rows to upcast at once; all of them where nothing is upcast."""
    num_rows = weight_vX.shape[0]
    step = num_rows if weight_vX.dtype == dtype else tile_rows
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, max(step, 1)))
