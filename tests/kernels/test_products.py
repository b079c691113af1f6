"""Products of 16-bit operands with float32 results, on CPU, on CUDA and as CUDA would take them."""

import pytest
import torch
from divergence_cases import (
    FEW_ROWS,
    LEVELS,
    Case,
    assert_level,
    dense,
    fused,
    make_case,
    relative_error,
)
from row_cases import SIX
from torch import Tensor

from mtopd.kernels import chunks, products


def emulate_cuda(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Products of bfloat16 operands with float32 results on CPU, and with them the path that CUDA
    takes.

    Returns a list that grows by the rows of each weight-gradient product.
    """
    mm, addmm, weight_products = torch.mm, torch.addmm, []

    def wide(left: Tensor, right: Tensor, dtype: torch.dtype) -> bool:
        return left.dtype == right.dtype == torch.bfloat16 and dtype == torch.float32

    def emulated_mm(
        left: Tensor, right: Tensor, out_dtype: torch.dtype | None = None, out: Tensor | None = None
    ):
        assert out_dtype is None or left.dtype == right.dtype == torch.bfloat16
        return mm(left.to(out_dtype or left.dtype), right.to(out_dtype or right.dtype), out=out)

    def emulated_addmm(
        total: Tensor, left: Tensor, right: Tensor, out_dtype: torch.dtype, beta: int, out: Tensor
    ):
        assert left.dtype == right.dtype == torch.bfloat16 and total.dtype == out_dtype
        weight_products.append(len(right))
        return addmm(total, left.to(out_dtype), right.to(out_dtype), beta=beta, out=out)

    for module in (products, chunks):
        monkeypatch.setattr(module, "has_wide_product", wide)
    monkeypatch.setattr(torch, "mm", emulated_mm)
    monkeypatch.setattr(torch, "addmm", emulated_addmm)
    return weight_products


@pytest.mark.parametrize(("distance", "level"), LEVELS)
@pytest.mark.parametrize("path", ["cpu", "emulated_cuda", "cuda"])
@pytest.mark.parametrize(("divergence", "beta"), SIX)
def test_bfloat16_operands(
    divergence: str,
    beta: float | None,
    path: str,
    distance: float,
    level: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The gradient is within 0.3 % of float64 on the same operands: logits are never rounded to 16
    bits.
    """
    case = make_case(
        64, 96, 128, 2051, distance=distance, vocab_size=2000, divergence=divergence, beta=beta
    )
    case = case.to(torch.bfloat16)
    assert_level(case, level)
    oracle = dense(case)
    device = "cpu"
    if path == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        device = "cuda"
    elif path == "emulated_cuda":
        emulate_cuda(monkeypatch)
        case.options["backend"] = "torch"  # the others cannot write bfloat16 on CPU
    tensors = (
        case.student_hidden_TD,
        case.student_weight_VD,
        case.teacher_hidden_TE,
        case.teacher_weight_VE,
    )
    per_token = (case.token_weight_T, case.label_T)
    on_device = Case(*(tensor.to(device) for tensor in (*tensors, *per_token)), case.options)
    actual = fused(on_device, workspace_bytes=2_000_000)
    assert actual.hidden_grad.dtype == actual.weight_grad.dtype == torch.bfloat16
    assert actual.loss.dtype == actual.per_token.dtype == actual.entropy.dtype == torch.float32
    # The value's error is that of float32 products: noise of 1e-6 in delta, squared or times delta.
    value_bound = {1.0: 1e-5, 4e-3: 1e-4, 4e-5: 1e-3}[level]
    for value, expected, bound in zip(
        actual, oracle, (value_bound, value_bound, 2e-6, 2e-6, 3e-3, 3e-3), strict=True
    ):
        assert relative_error(value.cpu(), expected) <= bound


def test_derivatives_are_collected_for_large_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow derivatives: eight logit chunks make one gradient chunk; the rest is multiplied at the
    end.
    """
    weight_products = emulate_cuda(monkeypatch)
    case = make_case(200, 96, 128, 2051, masked=1).to(torch.bfloat16)
    fused(case, workspace_bytes=1_500_000, backend="torch")
    num_rows = weight_products[0] // 8
    assert weight_products == [8 * num_rows] * (199 // (8 * num_rows)) + [199 % (8 * num_rows)], (
        weight_products
    )


def test_mixed_dtypes_and_float16() -> None:
    case = make_case()
    case.token_weight_T /= 1e6  # 1/N of a large batch: float16 would lose it
    case.student_hidden_TD = case.student_hidden_TD.to(torch.float16)
    oracle = dense(case)
    actual = fused(case, workspace_bytes=FEW_ROWS)
    assert relative_error(actual.weight_grad, oracle.weight_grad) < 3e-6
    assert relative_error(actual.loss, oracle.loss) < 3e-6
