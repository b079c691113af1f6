"""Values and both gradients of the fused divergence against float64 autograd of the dense
reference.
"""

from typing import Any

import pytest
import torch
from divergence_cases import Case, assert_as_good_as_dense, dense, fused, make_case, relative_error
from row_cases import SIX
from torch import Tensor

from mtopd.kernels import chunks, fused_linear, fused_linear_divergence, products

ONE_ROW = 1  # workspace_bytes too small for a row: chunks of one
FEW_ROWS = 300_000


# Noise of the teacher, and the reverse KL that it makes.
LEVELS = [(1.15, 1.0), (0.07, 4e-3), (0.007, 4e-5)]


def assert_level(case: Case, level: float) -> None:
    """The reverse KL of the case, whatever divergence it is made for, is about `level`, and not
    below 1.
    """
    reverse = Case(
        **{**vars(case), "options": {**case.options, "divergence": "reverse_kl", "beta": None}}
    )
    kl = dense(reverse).per_token
    mean_kl = float(kl.sum() / (kl != 0).sum())
    assert level / 2.5 < mean_kl < level * 2.5 and (level < 1 or mean_kl >= 1), mean_kl


@pytest.mark.parametrize("workspace_bytes", [ONE_ROW, FEW_ROWS, None])
@pytest.mark.parametrize(("distance", "level"), LEVELS)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(("divergence", "beta"), SIX)
def test_error_is_that_of_dense_float32(
    divergence: str,
    beta: float | None,
    backend: str,
    distance: float,
    level: float,
    workspace_bytes: int | None,
) -> None:
    case = make_case(distance=distance, divergence=divergence, beta=beta)
    assert_level(case, level)
    at_most = 3e-6 if level >= 1 else None
    assert_as_good_as_dense(
        fused(case, workspace_bytes=workspace_bytes, backend=backend), case, at_most
    )


@pytest.mark.parametrize(
    ("num_tokens", "student_size", "teacher_size", "vocab_rows"),
    [
        (1, 1, 2, 1),
        (1, 8, 9, 2),
        (2, 3, 8, 8),
        (9, 7, 41, 41),
        (423, 17, 20, 1423),
        (64, 128, 256, 517),
    ],
)
def test_odd_sizes(num_tokens: int, student_size: int, teacher_size: int, vocab_rows: int) -> None:
    case = make_case(
        num_tokens, student_size, teacher_size, vocab_rows, masked=num_tokens // 3, distance=2.0
    )
    if vocab_rows == 1:  # one token: nothing to learn, nothing to divide by
        assert all(bool((tensor == 0).all()) for tensor in fused(case))
    else:
        assert_as_good_as_dense(fused(case, workspace_bytes=FEW_ROWS), case, 3e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.3},
        {"temperature": 1.7},
        {"student_logit_scale": 0.6},
        {"teacher_logit_scale": 1.4},
        {"student_softcap": 2.5},
        {"teacher_softcap": 3.0},
        {"teacher_bias": torch.randn(1003, generator=torch.Generator().manual_seed(5))},
        {
            "temperature": 1.3,
            "vocab_size": 981,
            "student_logit_scale": 1.2,
            "student_softcap": 6.0,
            "teacher_logit_scale": 0.8,
            "teacher_softcap": 5.0,
            "teacher_bias": torch.randn(1003, generator=torch.Generator().manual_seed(6)),
        },
    ],
    ids=lambda options: "all" if len(options) > 1 else next(iter(options)),
)
@pytest.mark.parametrize(("divergence", "beta"), SIX)
def test_transforms_of_the_logits(
    divergence: str, beta: float | None, options: dict[str, Any]
) -> None:
    case = make_case(distance=2.5, divergence=divergence, beta=beta, **options)
    assert_as_good_as_dense(fused(case, workspace_bytes=FEW_ROWS), case, 3e-6)


@pytest.mark.parametrize(("divergence", "beta"), SIX)
def test_transforms_in_float64_and_gradcheck(divergence: str, beta: float | None) -> None:
    options: dict[str, Any] = {"divergence": divergence, "beta": beta}
    options |= {
        "temperature": 1.3,
        "student_logit_scale": 1.2,
        "student_softcap": 4.0,
        "teacher_softcap": 5.0,
    }
    case = make_case(5, 4, 6, 23, masked=1, vocab_size=21, **options).to(torch.float64)
    for actual, oracle in zip(fused(case, workspace_bytes=ONE_ROW), dense(case), strict=True):
        assert relative_error(actual, oracle) < 1e-12
    assert divergence == "tvd" or torch.autograd.gradcheck(
        lambda hidden, weight: case.call(hidden, weight).loss, case.leaves()
    )


def test_chunks_do_not_matter() -> None:
    case = make_case(200, vocab_rows=700)
    one_chunk, many_chunks = fused(case), fused(case, workspace_bytes=ONE_ROW)
    for one, many in zip(one_chunk, many_chunks, strict=True):
        assert relative_error(many, one) <= 2e-6  # the product of one row sums in another order


def test_sum_over_many_chunks() -> None:
    """The weight gradient of 32 chunks against that of one: float32 sums in another order, nothing
    rounded between.
    """
    case = make_case(1024, 24, 33, 128, masked=0)
    one, many = fused(case), fused(case, workspace_bytes=32 * (2 * 128 + 2 * (24 + 33)) * 4)
    assert relative_error(many.weight_grad, one.weight_grad) <= 5e-7
    assert not torch.equal(many.weight_grad, one.weight_grad), (
        "these are different numbers of chunks"
    )


@pytest.mark.parametrize("num_tokens", [1, 127, 128, 129, 255, 257])
def test_around_whole_chunks(num_tokens: int) -> None:
    case = make_case(num_tokens, vocab_rows=1501, masked=0)  # 128 tokens in a chunk
    assert_as_good_as_dense(fused(case), case, 3e-6)


def test_order_of_the_vocabulary() -> None:
    case = make_case()
    expected = fused(case)
    order = torch.randperm(1003, generator=torch.Generator().manual_seed(8))
    case.student_weight_VD, case.teacher_weight_VE = (
        case.student_weight_VD[order],
        case.teacher_weight_VE[order],
    )
    actual = fused(case)
    assert relative_error(actual.per_token, expected.per_token) <= 1e-6
    assert relative_error(actual.weight_grad, expected.weight_grad[order]) <= 1e-6


@pytest.mark.parametrize("garbage", [1e6, float("inf"), float("nan")])
def test_padding_takes_no_part(garbage: float) -> None:
    case = make_case(vocab_size=990)
    clean = fused(case)
    case.student_weight_VD[990:] = garbage
    case.teacher_weight_VE[990:] = -garbage
    dirty = fused(case)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert bool((dirty.weight_grad[990:] == 0).all())
    case.student_weight_VD[990:] = case.teacher_weight_VE[990:] = 0
    assert_as_good_as_dense(dirty, case)


def test_masked_rows_cannot_leak() -> None:
    case = make_case(masked=11)
    masked = case.token_weight_T == 0
    clean = fused(case, workspace_bytes=FEW_ROWS)
    case.student_hidden_TD[masked] = float("nan")
    case.teacher_hidden_TE[masked] = float("inf")
    dirty = fused(case, workspace_bytes=FEW_ROWS)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    for tensor in (dirty.per_token, dirty.entropy, dirty.hidden_grad):
        assert bool((tensor[masked] == 0).all())


def test_backward_again_with_another_upstream_scalar() -> None:
    case = make_case()
    expected = fused(case)
    hidden, weight = case.leaves()
    loss = case.call(hidden, weight).loss
    for upstream in (1.0, 0.0, 3.7, 1.0):
        grads = torch.autograd.grad(
            loss, (hidden, weight), torch.tensor(upstream), retain_graph=True
        )
        for grad, unscaled in zip(grads, (expected.hidden_grad, expected.weight_grad), strict=True):
            torch.testing.assert_close(grad, upstream * unscaled, rtol=1e-6, atol=0)


def test_inputs_are_not_written() -> None:
    bias = torch.randn(1003, generator=torch.Generator().manual_seed(2))
    case = make_case(
        student_softcap=4.0, teacher_softcap=4.0, student_logit_scale=2.0, temperature=2.0
    )
    hidden, weight = case.leaves()
    inputs = (
        hidden,
        weight,
        case.teacher_hidden_TE,
        case.teacher_weight_VE,
        case.token_weight_T,
        bias,
    )
    before = [tensor.detach().clone() for tensor in inputs]
    case.call(hidden, weight, teacher_bias=bias).loss.backward()
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, before, strict=True))


def test_gradients_only_where_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case()
    expected = fused(case)
    hidden, weight = case.leaves()
    case.call(hidden, weight.detach()).loss.backward()
    assert torch.equal(hidden.grad, expected.hidden_grad)
    case.call(hidden.detach(), weight).loss.backward()
    assert torch.equal(weight.grad, expected.weight_grad)

    teacher = [
        tensor.clone().requires_grad_()
        for tensor in (case.teacher_hidden_TE, case.teacher_weight_VE)
    ]
    out = fused_linear_divergence(hidden, weight, *teacher, token_weight=case.token_weight_T)
    assert (
        out.loss.requires_grad and not out.per_token.requires_grad and not out.entropy.requires_grad
    )
    out.loss.backward()
    assert teacher[0].grad is None and teacher[1].grad is None

    monkeypatch.setattr(fused_linear, "_StudentGradients", None)  # making one now fails
    with torch.no_grad():
        unwanted = case.call(hidden, weight)
    assert (
        not unwanted.loss.requires_grad
        and not case.call(hidden.detach(), weight.detach()).loss.requires_grad
    )
    assert torch.equal(unwanted.loss, expected.loss) and torch.equal(
        unwanted.per_token, expected.per_token
    )


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
    on_device = Case(
        *(tensor.to(device) for tensor in (*tensors, case.token_weight_T)), case.options
    )
    actual = fused(on_device, workspace_bytes=2_000_000)
    assert actual.hidden_grad.dtype == actual.weight_grad.dtype == torch.bfloat16
    assert actual.loss.dtype == actual.per_token.dtype == actual.entropy.dtype == torch.float32
    # The value's error is that of float32 products: noise of 1e-6 in delta, squared or times delta.
    value_bound = {1.0: 1e-5, 4e-3: 1e-4, 4e-5: 1e-3}[level]
    for value, expected, bound in zip(
        actual, oracle, (value_bound, value_bound, 2e-6, 3e-3, 3e-3), strict=True
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


def test_autocast_does_not_reach_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of the state itself too: on CPU the products here happen to be of a kind that autocast
    leaves alone.
    """
    case, seen = make_case(), []
    expected = fused(case)

    def evaluate(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        seen.append(torch.is_autocast_enabled("cpu"))
        return original(*args)

    original = fused_linear._evaluate
    monkeypatch.setattr(fused_linear, "_evaluate", evaluate)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = fused(case)
    assert seen == [False]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_two_runs_agree_bit_for_bit() -> None:
    torch.set_num_threads(2)
    case = make_case(100, 64, 96, 5003)
    first, second = (fused(case, workspace_bytes=4_000_000) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_token_does_not_depend_on_the_others() -> None:
    case = make_case(300, 64, 96, 5003, masked=0)
    whole = fused(case, workspace_bytes=4_000_000)
    generator = torch.Generator().manual_seed(4)
    for num_tokens in (1, 2, 17, 100, 299):
        rows = torch.randperm(300, generator=generator)[:num_tokens]
        part = Case(
            case.student_hidden_TD[rows],
            case.student_weight_VD,
            case.teacher_hidden_TE[rows],
            case.teacher_weight_VE,
            case.token_weight_T[rows],
        )
        actual = fused(part, workspace_bytes=4_000_000)
        assert torch.equal(actual.per_token, whole.per_token[rows])
        assert torch.equal(actual.entropy, whole.entropy[rows])


def test_gradients_are_handed_over_without_a_copy() -> None:
    """A graph that is not retained gives its own buffers away; a retained one keeps them."""
    case = make_case()
    hidden, weight = case.leaves()
    loss = case.call(hidden, weight).loss
    address = loss.grad_fn.weight_grad_vD.data_ptr()  # another reference would make autograd copy
    loss.backward(retain_graph=True)
    assert weight.grad.data_ptr() != address == loss.grad_fn.weight_grad_vD.data_ptr()
    weight.grad = None
    loss.backward()
    assert weight.grad.data_ptr() == address and loss.grad_fn.weight_grad_vD is None
