"""One table of dtypes: all spellings lead to the same facts, and torch agrees with them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from mtopd.dtypes import (
    dtype_name,
    is_safetensors_name,
    item_size,
    numpy_dtype,
    safetensors_name,
    torch_dtype,
)


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("float32", "F32"),
        ("bfloat16", "BF16"),
        ("float16", "F16"),
        ("float64", "F64"),
        ("int64", "I64"),
        ("bool", "BOOL"),
        ("uint8", "U8"),
        ("float8_e4m3fn", "F8_E4M3"),
    ],
)
def test_spellings_agree(name: str, stored: str) -> None:
    dtype = torch_dtype(stored)
    assert dtype == torch_dtype(name) == getattr(torch, name)
    for spelling in (name, stored, dtype):
        assert dtype_name(spelling) == name and safetensors_name(spelling) == stored
        assert item_size(spelling) == dtype.itemsize == numpy_dtype(spelling).itemsize
    assert is_safetensors_name(stored) and not is_safetensors_name(name)


def test_torch_knows_more_names_than_the_table() -> None:
    assert torch_dtype("half") == torch.float16 and dtype_name(torch.complex64) == "complex64"
    for wrong in ("fp32", "nn", "Tensor"):
        with pytest.raises(KeyError):
            torch_dtype(wrong)


def test_names_and_sizes_need_no_torch() -> None:
    code = "import sys, mtopd.dtypes as d; d.item_size('BF16'); d.dtype_name('F32'); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
