"""Chunks change no result, and memory is bounded whatever the number of tokens."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from divergence_cases import (
    ONE_ROW,
    Case,
    assert_as_good_as_dense,
    fused,
    make_case,
    relative_error,
)
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtopd.kernels import chunks


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
            case.label_T[rows],
        )
        actual = fused(part, workspace_bytes=4_000_000)
        assert torch.equal(actual.per_token, whole.per_token[rows])
        assert torch.equal(actual.entropy, whole.entropy[rows])
        assert torch.equal(actual.label_log_prob, whole.label_log_prob[rows])


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
