"""The row kernels on CPU against float64 autograd of the reference, given the same float32 logits; the
choice between them.
"""

import logging
from collections.abc import Callable

import pytest
import torch
from row_cases import CHECKS, check_levels

from mtopd.kernels import rows, rows_cpu, rows_torch


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("kernels", [rows_cpu.KERNELS, rows_torch.KERNELS], ids=["cpu", "torch"])
def test_rows(kernels: rows.RowKernels, check: Callable[[rows.RowKernels, str], None]) -> None:
    check(kernels, "cpu")


@pytest.mark.parametrize("kernels", [rows_cpu.KERNELS, rows_torch.KERNELS], ids=["cpu", "torch"])
def test_a_whole_vocabulary(kernels: rows.RowKernels) -> None:
    check_levels(kernels, "cpu", num_rows=2, num_columns=151936)


def test_choice_of_kernels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mtopd.kernels.rows")
    rows.select_row_kernels.cache_clear()
    for _ in range(3):
        assert rows.select_row_kernels("auto", "cpu", torch.float32).NAME == "cpu"
        assert rows.select_row_kernels("auto", "cpu", torch.float64).NAME == "torch"
    assert len(caplog.messages) == 2, "once for each choice"
    with pytest.raises(
        ValueError, match=r"backend='cpu' computes in float32, but an input is torch.float64"
    ):
        rows.select_row_kernels("cpu", "cpu", torch.float64)
    with pytest.raises(ValueError, match="backend='cpu' works on cpu, but the tensors are on cuda"):
        rows.select_row_kernels("cpu", "cuda", torch.float32)
    with pytest.raises(
        ValueError, match="backend='triton' works on cuda, but the tensors are on cpu"
    ):
        rows.select_row_kernels("triton", "cpu", torch.float32)
