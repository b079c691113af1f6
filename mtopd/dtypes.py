"""The spellings of a dtype and the bytes of one element.

A dtype is named here as torch names it ("bfloat16"); safetensors files and a teacher's manifest
have names of their own ("BF16").  Every function takes either spelling, or torch's own dtype.
Neither torch nor numpy is imported before a function needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import torch


class _Spellings(NamedTuple):
    name: str
    safetensors: str
    item_size: int
    numpy: str  # numpy has no bfloat16 and no float8: their bits


_TABLE = (
    _Spellings("float64", "F64", 8, "<f8"),
    _Spellings("float32", "F32", 4, "<f4"),
    _Spellings("bfloat16", "BF16", 2, "<u2"),
    _Spellings("float16", "F16", 2, "<f2"),
    _Spellings("int64", "I64", 8, "<i8"),
    _Spellings("int32", "I32", 4, "<i4"),
    _Spellings("int16", "I16", 2, "<i2"),
    _Spellings("int8", "I8", 1, "i1"),
    _Spellings("uint8", "U8", 1, "u1"),
    _Spellings("bool", "BOOL", 1, "?"),
    _Spellings("float8_e4m3fn", "F8_E4M3", 1, "u1"),
)
_BY_SPELLING = {s.name: s for s in _TABLE} | {s.safetensors: s for s in _TABLE}


def dtype_name(dtype: str | torch.dtype) -> str:
    """Torch's name.  One that is not in the table stays as it is."""
    spelling = str(dtype).removeprefix("torch.")
    return _BY_SPELLING[spelling].name if spelling in _BY_SPELLING else spelling


def safetensors_name(dtype: str | torch.dtype) -> str:
    return _BY_SPELLING[dtype_name(dtype)].safetensors


def is_safetensors_name(name: object) -> bool:
    return isinstance(name, str) and name in _BY_SPELLING and _BY_SPELLING[name].name != name


def item_size(dtype: str | torch.dtype) -> int:
    """Bytes of one element."""
    return _BY_SPELLING[dtype_name(dtype)].item_size


def torch_dtype(dtype: str) -> torch.dtype:
    """Raises KeyError for what torch has no dtype for."""
    import torch

    found = getattr(torch, dtype_name(dtype), None)
    if not isinstance(found, torch.dtype):
        raise KeyError(dtype)
    return found


def is_torch_dtype(name: str) -> bool:
    import torch

    return isinstance(getattr(torch, name.removeprefix("torch."), None), torch.dtype)


def numpy_dtype(dtype: str | torch.dtype) -> np.dtype:
    """What an array has that holds the values, or the bits where numpy lacks the dtype."""
    import numpy as np

    return np.dtype(_BY_SPELLING[dtype_name(dtype)].numpy)
