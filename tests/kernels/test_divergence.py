"""Values and both gradients of the fused divergence against float64 autograd of the dense
reference; extreme logits, convergence, nothing to do; the gradient's way to the caller.
"""

import math
from typing import Any

import pytest
import torch
from divergence_cases import (
    FEW_ROWS,
    LEVELS,
    ONE_ROW,
    Case,
    assert_as_good_as_dense,
    assert_level,
    dense,
    fused,
    make_case,
    relative_error,
)
from row_cases import SIX
from torch import Tensor

from mtopd.kernels import divergence, fused_linear_divergence
from mtopd.kernels.rows import LOG_PROB_FLOOR

INF = math.inf


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


def test_labels_change_nothing_else() -> None:
    case = make_case()
    with_labels, without = case.call(*case.leaves()), case.call(*case.leaves(), labels=None)
    assert without.label_log_prob is None and with_labels.label_log_prob is not None
    assert not with_labels.label_log_prob.requires_grad
    for name in ("loss", "per_token", "entropy"):
        assert torch.equal(getattr(with_labels, name), getattr(without, name))


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

    monkeypatch.setattr(divergence, "_StudentGradients", None)  # making one now fails
    with torch.no_grad():
        unwanted = case.call(hidden, weight)
    assert (
        not unwanted.loss.requires_grad
        and not case.call(hidden.detach(), weight.detach()).loss.requires_grad
    )
    assert torch.equal(unwanted.loss, expected.loss) and torch.equal(
        unwanted.per_token, expected.per_token
    )


def test_autocast_does_not_reach_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of the state itself too: on CPU the products here happen to be of a kind that autocast
    leaves alone.
    """
    case, seen = make_case(), []
    expected = fused(case)

    def evaluate(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        seen.append(torch.is_autocast_enabled("cpu"))
        return original(*args)

    original = divergence._evaluate
    monkeypatch.setattr(divergence, "_evaluate", evaluate)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = fused(case)
    assert seen == [False]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_two_runs_agree_bit_for_bit() -> None:
    torch.set_num_threads(2)
    case = make_case(100, 64, 96, 5003)
    first, second = (fused(case, workspace_bytes=4_000_000) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


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


def from_logits(student: list[float], teacher: list[float], **options: Any) -> Case:
    """One token with these logits: hidden state 1, the logits as weights, so that the weight
    gradient is dL/dz.
    """
    one = torch.ones(1, 1)
    student_weight_V1, teacher_weight_V1 = (
        torch.tensor(z, dtype=torch.float32)[:, None] for z in (student, teacher)
    )
    label = torch.zeros(1, dtype=torch.long)
    return Case(one, student_weight_V1, one, teacher_weight_V1, torch.ones(1), label, options)


GRAD = [-0.029946, -0.081402, 0.111348]


@pytest.mark.parametrize(
    ("case", "kl", "grad"),
    [
        (from_logits([1, 2, 3], [1, 2, 2.5]), 0.02914512, GRAD),
        (from_logits([1001, 1002, 1003], [-999, -998, -997.5]), 0.02914512, GRAD),
        (from_logits([1, 2, 3, 99], [1, 2, 2.5, -INF], vocab_size=3), 0.02914512, [*GRAD, 0]),
        (from_logits([1, 2, 3, -INF], [1, 2, 2.5, -INF]), 0.02914512, [*GRAD, 0]),
        (from_logits([1, 2, 3, -INF], [1, 2, 2.5, 0]), 0.07303138, [*GRAD, 0]),
        (from_logits([0, 200, 1], [0, 1, 200]), 199, [0, 0, 0]),
        (from_logits([0, 1, 2], [0, 1, 200]), 65.87469, [11.858622, 32.235073, -44.093697]),
        (from_logits([10001, 10002, 10003], [-9999, -9998, -9997]), 0, [0, 0, 0]),
        # Excluded where the student has no float32 mass.
        (from_logits([0, 200, 1], [-INF, 200, 1]), 0, [0, 0, 0]),
    ],
    ids=[
        "plain",
        "shifted",
        "padding",
        "both-neginf",
        "student-neginf",
        "p-0",
        "q-0",
        "identical-shifted",
        "no-mass",
    ],
)
def test_extreme_logits(case: Case, kl: float, grad: list[float]) -> None:
    actual = fused(case)
    torch.testing.assert_close(
        actual.per_token, torch.tensor([kl], dtype=torch.float32), rtol=2e-6, atol=1e-30
    )
    expected = torch.tensor(grad, dtype=torch.float32)
    torch.testing.assert_close(actual.weight_grad[:, 0], expected, rtol=1e-6, atol=1e-6)
    if not any(grad):
        assert bool((actual.weight_grad == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distance", [1.0, 1e-2, 1e-4, 1e-6, 1e-8])
def test_never_negative(distance: float, dtype: torch.dtype) -> None:
    out = fused(make_case(64, distance=distance, temperature=0.5).to(dtype))
    assert bool((out.per_token >= 0).all()) and bool((out.entropy >= 0).all()) and out.loss >= 0


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_self_distillation(dtype: torch.dtype, bound: float) -> None:
    """The teacher is the student in another basis, then the same tensors: nothing to learn."""
    case = make_case().to(torch.float64)
    basis_DD = torch.linalg.qr(
        torch.randn(24, 24, generator=torch.Generator().manual_seed(3)).double()
    ).Q
    case.teacher_hidden_TE = case.student_hidden_TD @ basis_DD
    case.teacher_weight_VE = case.student_weight_VD @ basis_DD
    assert 0 <= fused(case.to(dtype)).per_token.max() < bound
    case.teacher_hidden_TE, case.teacher_weight_VE = case.student_hidden_TD, case.student_weight_VD
    same = fused(case.to(dtype))
    assert same.per_token.max() == 0 and not same.hidden_grad.any() and not same.weight_grad.any()


def test_the_gradient_of_a_row_sums_to_zero() -> None:
    case = make_case(1, masked=0).to(torch.float64)
    weight_grad_VD = fused(case).weight_grad
    assert weight_grad_VD.sum(0).abs().max() < 1e-14 * weight_grad_VD.abs().sum()


@pytest.mark.parametrize("num_tokens", [0, 5])
@pytest.mark.parametrize(("divergence", "beta"), SIX)
def test_nothing_to_do_keeps_the_graph(
    divergence: str, beta: float | None, num_tokens: int
) -> None:
    out = fused(make_case(num_tokens, masked=num_tokens, divergence=divergence, beta=beta))
    assert out.per_token.shape == out.entropy.shape == (num_tokens,)
    assert out.hidden_grad.shape == (num_tokens, 24) and out.weight_grad.shape == (1003, 24)
    assert all(not tensor.any() for tensor in out)


def test_teacher_that_excludes_a_sampled_token_is_refused() -> None:
    """Before anything is computed: the accumulator, written in forward, is untouched."""
    case = make_case(masked=0, teacher_bias=torch.zeros(1003))
    case.token_weight_T[0] = 0
    case.options["teacher_bias"][17] = -INF
    hidden, weight = case.leaves()
    main_grad = torch.ones(1003, 24)
    with pytest.raises(
        ValueError, match=r"-inf .* in 36 of 36 tokens with a weight \(first: row 1\)"
    ):
        case.call(hidden, weight, weight_grad_accumulator=main_grad)
    assert bool((main_grad == 1).all())
    with pytest.raises(ValueError, match=r"-inf .* in 36 of 36"):
        fused(case)
    for name, beta in SIX:
        if name != "reverse_kl":
            assert fused(case, divergence=name, beta=beta).loss.isfinite()
    case.options["vocab_size"] = 17  # as padding the column is nobody's business
    case.label_T.clamp_(max=16)
    assert fused(case).loss.isfinite()


def test_logits_that_overflow_to_neginf_are_refused() -> None:
    """No bias says so beforehand: the refusal comes from the row statistics."""
    case = make_case(masked=0)
    case.teacher_hidden_TE[:, 0] = 1
    case.teacher_weight_VE[17] = 0
    case.teacher_weight_VE[17, 0] = -INF
    with pytest.raises(ValueError, match=r"-inf .* in 37 of 37"):
        fused(case)
    assert fused(case, teacher_neginf="floor").loss.isfinite()


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_floor_under_what_the_teacher_excludes(backend: str) -> None:
    """log q = -87.3 there, the other tokens as ever."""
    bias = torch.zeros(1003)
    bias[17] = bias[400] = -INF
    case = make_case(teacher_bias=bias)
    hidden, weight = (tensor.double() for tensor in case.leaves())
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    log_p = (hidden @ weight.T).log_softmax(-1)
    log_q = (
        case.teacher_hidden_TE.double() @ case.teacher_weight_VE.double().T + bias
    ).log_softmax(-1)
    per_token = (log_p.exp() * (log_p - log_q.masked_fill(log_q == -INF, LOG_PROB_FLOOR))).sum(-1)
    (per_token * case.token_weight_T).sum().backward()
    actual = fused(case, teacher_neginf="floor", backend=backend, workspace_bytes=300_000)
    is_live = case.token_weight_T != 0
    assert relative_error(actual.per_token, torch.where(is_live, per_token, 0).detach()) < 2e-6
    assert relative_error(actual.hidden_grad, hidden.grad) < 3e-6
    assert relative_error(actual.weight_grad, weight.grad) < 3e-6


def test_nan_logits_give_a_nan_loss() -> None:
    for name in ("student_hidden_TD", "teacher_hidden_TE"):
        case = make_case(masked=0)
        getattr(case, name)[3] = float("nan")
        out = fused(case)
        assert out.loss.isnan() and out.per_token[3].isnan() and out.weight_grad.isnan().any()
        assert out.per_token.isnan().sum() == 1


def test_entropy_of_the_student() -> None:
    case = make_case(temperature=2.0, vocab_size=1000)
    torch.testing.assert_close(fused(case).entropy.double(), dense(case).entropy, rtol=1e-6, atol=0)


def test_accumulator_takes_the_weight_gradient() -> None:
    """What was there stays; the parameter gets zeros, so that hooks fire, and a mark that says why."""
    case = make_case(vocab_size=990)
    expected = fused(case)
    hidden, weight = case.leaves()
    main_grad = torch.full((1003, 24), 0.25)
    for number in (1, 2):
        out = case.call(hidden, weight, weight_grad_accumulator=main_grad, workspace_bytes=300_000)
        weight.grad_added_to_main_grad = False
        out.loss.backward()
        assert weight.grad_added_to_main_grad is True
        assert weight.grad is not None and not weight.grad.any()
        torch.testing.assert_close(
            main_grad, 0.25 + number * expected.weight_grad, rtol=2e-6, atol=1e-6
        )
        torch.testing.assert_close(hidden.grad, number * expected.hidden_grad, rtol=1e-5, atol=1e-7)
    assert bool((main_grad[990:] == 0.25).all())


def test_accumulator_is_written_only_when_a_gradient_is_wanted_and_once() -> None:
    case = make_case()
    hidden, weight = case.leaves()
    main_grad = torch.zeros(1003, 24)

    def loss() -> Tensor:
        return case.call(hidden, weight, weight_grad_accumulator=main_grad).loss

    with torch.no_grad():
        loss()
    assert not main_grad.any()
    for scale, retain, message in (
        (2.0, False, "found 2"),
        (1.0, True, "found 1 and a retained graph"),
    ):
        with pytest.raises(ValueError, match=message):
            (scale * loss()).backward(retain_graph=retain)
