"""Extreme logits, convergence, nothing to do, refusals, and the bound on memory."""

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from divergence_cases import Case, dense, fused, make_case, relative_error
from row_cases import SIX
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from mtopd.kernels import chunks
from mtopd.kernels.rows import LOG_PROB_FLOOR

INF = math.inf


def from_logits(student: list[float], teacher: list[float], **options: Any) -> Case:
    """One token with these logits: hidden state 1, the logits as weights, so that the weight
    gradient is dL/dz.
    """
    one = torch.ones(1, 1)
    student_weight_V1, teacher_weight_V1 = (
        torch.tensor(z, dtype=torch.float32)[:, None] for z in (student, teacher)
    )
    return Case(one, student_weight_V1, one, teacher_weight_V1, torch.ones(1), options)


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"divergence": "sideways"},
            "divergence='sideways' is unknown; known: 'reverse_kl', 'forward_kl', 'tvd', 'jsd'",
        ),
        ({"beta": 0.5}, "beta=0.5: divergence='reverse_kl' takes no beta"),
        ({"divergence": "jsd"}, "beta=None: divergence='jsd' needs a beta with 0 < beta < 1"),
        (
            {"divergence": "jsd", "beta": 0.0},
            "the limits are 'forward_kl' at 0 and 'reverse_kl' at 1",
        ),
        (
            {"divergence": "jsd", "beta": 1.0},
            "the limits are 'forward_kl' at 0 and 'reverse_kl' at 1",
        ),
        ({"divergence": "skewed_reverse_kl", "beta": 0}, "the limit at 0 is 'reverse_kl'"),
        ({"divergence": "skewed_forward_kl", "beta": INF}, "the limit at 0 is 'forward_kl'"),
        ({"divergence": "tvd", "beta": 0.1}, "divergence='tvd' takes no beta"),
        ({"teacher_neginf": "clamp"}, "teacher_neginf='clamp' is unknown"),
        ({"backend": "liger"}, "backend='liger' is unknown"),
        ({"backend": "triton"}, "backend='triton' works on cuda, but the tensors are on cpu"),
        (
            {"weight_grad_accumulator": torch.zeros(1003, 24)},
            "student_weight does not require a gradient",
        ),
        (
            {"weight_grad_accumulator": torch.zeros(1003, 23)},
            r"\[1003, 23\] on cpu, but student_weight is \[1003, 24\]",
        ),
        (
            {"weight_grad_accumulator": torch.zeros(1003, 24).bfloat16()},
            "a contiguous torch.float32 buffer",
        ),
        ({"weight_grad_accumulator": torch.zeros(24, 1003).T}, "a contiguous torch.float32 buffer"),
        ({"weight_grad_accumulator": 3}, "weight_grad_accumulator is int"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": INF}, "temperature is inf"),
        ({"student_softcap": -1.0}, "student_softcap is -1.0"),
        ({"teacher_logit_scale": float("nan")}, "teacher_logit_scale is nan"),
        ({"vocab_size": 1004}, "vocab_size is 1004.*1003 rows"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"workspace_bytes": 0}, "workspace_bytes is 0"),
        (
            {"token_weight": torch.ones(36)},
            "student_hidden has 37, teacher_hidden has 37, token_weight has 36",
        ),
        ({"token_weight": torch.ones(37, 1)}, r"token_weight has 2 dimensions \[37, 1\]"),
        ({"token_weight": torch.ones(37, dtype=torch.int64)}, "token_weight has dtype torch.int64"),
        ({"token_weight": torch.full((37,), float("nan"))}, "token_weight holds 37 NaN"),
        (
            {"token_weight": torch.ones(37, device="meta")},
            "token_weight is on meta, but student_hidden is on cpu",
        ),
        ({"teacher_bias": torch.zeros(1000)}, "teacher_weight has 1003, teacher_bias has 1000"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    case = make_case()
    with pytest.raises(ValueError, match=message):
        case.call(case.student_hidden_TD, case.student_weight_VD, **change)


def test_rounded_products_are_refused() -> None:
    case = make_case()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with pytest.raises(ValueError, match="is 'medium': float32 operands would be rounded"):
            fused(case)
        assert fused(case.to(torch.float64)).loss.isfinite()
    finally:
        torch.set_float32_matmul_precision(before)


def test_mismatched_shapes_are_refused() -> None:
    case = make_case()
    with pytest.raises(ValueError, match="student_hidden has 23, student_weight has 24"):
        case.call(case.student_hidden_TD[:, 1:], case.student_weight_VD)
    with pytest.raises(ValueError, match="student_weight has 1002, teacher_weight has 1003"):
        case.call(case.student_hidden_TD, case.student_weight_VD[1:])
    case.teacher_hidden_TE = case.teacher_hidden_TE[:, 1:]
    with pytest.raises(ValueError, match="teacher_hidden has 32, teacher_weight has 33"):
        fused(case)


class StorageMeter(TorchDispatchMode):
    """Follows the storages that operations create: the largest one, and the most bytes alive at
    once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest_bytes = self.peak_bytes = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in inputs:
                storage = leaf.untyped_storage()
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.largest_bytes = max(self.largest_bytes, storage.nbytes())
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.peak_bytes = max(
            self.peak_bytes, sum(num_bytes for _, num_bytes in self._alive.values())
        )
        return result


@pytest.fixture
def metered(monkeypatch: pytest.MonkeyPatch) -> None:
    """No workspace kept from other tests: the meter has to see it come."""
    monkeypatch.setattr(chunks, "_kept", {})


@pytest.mark.usefixtures("metered")
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"student_softcap": 5.0, "teacher_softcap": 5.0, "temperature": 0.7},
        {"divergence": "jsd", "beta": 0.5},
    ],
    ids=["plain", "softcap", "jsd"],
)
def test_memory_does_not_grow_with_tokens_times_vocabulary(
    options: dict[str, Any], backend: str
) -> None:
    # Plain torch has its rows in float64.
    workspace_bytes = (4 if backend == "cpu" else 16) << 20
    largest = []
    for num_tokens in (64, 2048):
        case = make_case(num_tokens, 15, 16, 8192, masked=0, **options)
        hidden, weight = case.leaves()
        with StorageMeter() as meter:
            case.call(hidden, weight, workspace_bytes=workspace_bytes, backend=backend)
        chunks._kept.clear()
        gradient_bytes = hidden.nbytes + weight.nbytes
        assert meter.peak_bytes <= workspace_bytes + gradient_bytes + 32 * 8 * num_tokens
        assert meter.peak_bytes > workspace_bytes // 2, "the workspace is there to be used"
        largest.append(meter.largest_bytes)
    assert largest[0] == largest[1]


@pytest.mark.usefixtures("metered")
def test_upcast_weights_stay_within_the_workspace() -> None:
    case = make_case(300, 255, 256, 8192, masked=0).to(torch.bfloat16)
    with StorageMeter() as meter, torch.no_grad():
        case.call(case.student_hidden_TD, case.student_weight_VD, workspace_bytes=2 << 20)
    assert meter.peak_bytes <= (2 << 20) + 32 * 8 * 300
    chunks._kept.clear()
    hidden, weight = case.leaves()
    with StorageMeter() as meter:
        case.call(hidden, weight, workspace_bytes=2 << 20)
    assert meter.peak_bytes <= (2 << 20) + 2 * (hidden.nbytes + weight.nbytes) + 32 * 8 * 300


def test_entropy_of_the_student() -> None:
    case = make_case(temperature=2.0, vocab_size=1000)
    torch.testing.assert_close(fused(case).entropy.double(), dense(case).entropy, rtol=1e-6, atol=0)


RESIDENT_MEMORY = """
import torch
from mtopd.kernels import fused_linear_divergence

def peak_growth(num_tokens):
    hidden, teacher = torch.randn(num_tokens, 64).requires_grad_(), torch.randn(num_tokens, 64)
    weight.grad = None
    status = lambda key: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) << 10
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    out = fused_linear_divergence(
        hidden, weight, teacher, teacher_weight, token_weight=torch.full((num_tokens,), 1 / num_tokens)
    )
    out.loss.backward()
    return status("VmHWM") - before - hidden.grad.nbytes - 2 * 4 * num_tokens

torch.set_num_threads(2)
weight, teacher_weight = torch.randn(151936, 64).requires_grad_(), torch.randn(151936, 64)
peak_growth(128)
print(peak_growth(256), peak_growth(8192))
"""


def test_resident_memory_does_not_grow_with_tokens() -> None:
    """Measured by the system in a process of its own, at a real vocabulary: T from 256 to 8192 adds
    nothing.
    """
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT_MEMORY], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    few, many = map(int, done.stdout.split())
    weight_grad_bytes = 151936 * 64 * 4
    assert few < weight_grad_bytes + (16 << 20), "the workspace is kept from the call before"
    assert many - few < 16 << 20, f"{few} bytes at 256 tokens, {many} at 8192"


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


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_accumulator_is_refused_under_recompute(use_reentrant: bool) -> None:
    case = make_case()
    hidden, weight = case.leaves()
    main_grad = torch.zeros(1003, 24)

    # The last product keeps an input: backward has to run all of this again.
    def loss(hidden_TD: Tensor) -> Tensor:
        loss = case.call(hidden_TD, weight, weight_grad_accumulator=main_grad).loss
        return loss + (hidden_TD * hidden_TD).sum()

    with pytest.raises(ValueError, match="cannot be used under activation recompute"):
        checkpoint(loss, hidden, use_reentrant=use_reentrant).backward()
