"""Time, peak memory and gradient error of `fused_linear_divergence` (reverse KL), next to what else
one could call.

    python benchmarks/divergence.py --device cpu --json benchmarks/results/divergence_cpu.json
    python benchmarks/divergence.py --quick

A step is the value, the gradient of the student's hidden states and the gradient of its output
layer.  Each repeat draws new inputs and runs every provider on them, in an order in which each
provider follows each other one equally often.  Ratios are medians of the repeats' ratios, so that a
slow moment of the machine hits both sides.

Columns of the table:
    median, p20-p80   of one step; float32 inputs on CPU, bfloat16 on CUDA
    x floor           time over that of the four matrix products alone, at the chunk sizes that "ours" uses
    x naive           time over that of naive eager
    peak extra MiB    highest memory in use during a step, above what was in use before and the two gradients.  On CPU
                      resident memory of a fresh process (without the buffers that the library of
                      the products keeps: the JSON lists them), on CUDA that of PyTorch's allocator
    grad err          the larger relative L2 error of the two gradients, against float64 on the same (rounded) inputs,
                      where the mean KL between student and teacher is about 1, 4e-3 and 4e-5

"naive eager" and "naive torch.compile" make logits as most systems do: in the dtype of the inputs,
so bfloat16 inputs give logits rounded to bfloat16.  Their column "grad err bf16" is what that
rounding does to the gradient near convergence.

"ours, main_grad" adds the weight gradient to a float32 buffer that outlives the step, as a Megatron
trainer does.  The teacher of a timing is independent of the student; that of an accuracy case is
the student with noise on its logits. All tokens have the weight 1/T, because Liger knows only the
mean.

Legend: T tokens, D student hidden size, E teacher hidden size, V vocabulary, C tokens of a logit
chunk, G tokens of a gradient chunk.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mtopd.dtypes import dtype_name
from mtopd.kernels import fused_linear_divergence
from mtopd.kernels.reference import divergence

SCHEMA_VERSION = 1
MIB = 1 << 20
TARGET_KLS = (1.0, 4e-3, 4e-5)
ACCURACY_TOKENS = 64
# Float64 at 151936 columns takes minutes there and shows the same errors.
ACCURACY_VOCAB_ON_CPU = 32000
# Hidden columns, at least, in which only the teacher of an accuracy case has anything.
NOISE_SIZE = 64
LOGIT_STD = 3.0  # of the student: the largest of 150000 logits is then near 13
NOISE_STD = 1.6  # of a teacher's extra logits before they are scaled

FLOOR, OURS, MAIN_GRAD, NAIVE, COMPILED, LIGER_CHUNKED, LIGER_TRITON = (
    "floor",
    "ours",
    "ours_main_grad",
    "naive_eager",
    "naive_compile",
    "liger_chunked",
    "liger_triton",
)
BASELINES = (FLOOR, NAIVE, COMPILED, LIGER_CHUNKED, LIGER_TRITON)


class Shape(NamedTuple):
    num_tokens: int
    student_size: int
    teacher_size: int
    vocab_size: int

    @property
    def flops(self) -> int:
        """Of the four products: both logits, gradient of the hidden states, gradient of the weight."""
        return 2 * self.num_tokens * self.vocab_size * (3 * self.student_size + self.teacher_size)


SHAPES = {
    "cpu": [Shape(256, 512, 1024, 151936), Shape(1024, 256, 256, 32000)],
    "cuda": [
        Shape(8192, 4096, 7168, 151936),
        Shape(8192, 4096, 7168, 129280),
        Shape(8192, 4096, 4096, 128256),
        Shape(4096, 4096, 4096, 128256),
        Shape(2048, 2048, 7168, 151936),
        Shape(16384, 4096, 7168, 129280),
        Shape(4096, 5120, 5120, 262144),
    ],
}
QUICK_SHAPES = [Shape(64, 32, 48, 1000)]
TINY_SHAPE = Shape(8, 16, 24, 256)


@dataclass
class Inputs:
    """What a step reads and, in `.grad` and `main_grad_VD`, what it leaves."""

    student_hidden_TD: Tensor
    student_weight_VD: Tensor
    teacher_hidden_TE: Tensor
    teacher_weight_VE: Tensor
    token_weight_T: Tensor
    main_grad_VD: Tensor | None = None

    @classmethod
    def empty(cls, shape: Shape, device: str, dtype: torch.dtype) -> Inputs:
        def empty(*sizes: int) -> Tensor:
            return torch.empty(sizes, device=device, dtype=dtype)

        return cls(
            empty(shape.num_tokens, shape.student_size).requires_grad_(),
            empty(shape.vocab_size, shape.student_size).requires_grad_(),
            empty(shape.num_tokens, shape.teacher_size),
            empty(shape.vocab_size, shape.teacher_size),
            torch.full((shape.num_tokens,), 1 / shape.num_tokens, device=device),
        )

    @torch.no_grad()
    def draw(self, seed: int) -> None:
        """New random content in the same memory, so that no provider pays for fresh pages of the
        inputs.
        """
        generator = torch.Generator(self.token_weight_T.device).manual_seed(seed)
        for hidden, weight in (
            (self.student_hidden_TD, self.student_weight_VD),
            (self.teacher_hidden_TE, self.teacher_weight_VE),
        ):
            hidden.normal_(generator=generator)
            weight.normal_(0, LOGIT_STD / math.sqrt(weight.shape[1]), generator=generator)

    @property
    def student(self) -> tuple[Tensor, Tensor]:
        return self.student_hidden_TD, self.student_weight_VD

    @property
    def teacher(self) -> tuple[Tensor, Tensor]:
        return self.teacher_hidden_TE, self.teacher_weight_VE

    def clear_gradients(self) -> None:
        for tensor in self.student:
            tensor.grad = None

    def gradient_bytes(self) -> int:
        """Without the placeholder of a gradient that went into a main_grad: that one is not an
        output.
        """
        return sum(
            tensor.grad.nbytes
            for tensor in self.student
            if tensor.grad is not None and not getattr(tensor, "grad_added_to_main_grad", False)
        )


Step = Callable[[], Tensor]  # leaves the gradients, returns the loss


class Provider(NamedTuple):
    label: str
    build: Callable[[Inputs], Step]
    is_compiled: bool = False
    needs_cuda: bool = False


def differentiated(loss_of: Callable[[], Tensor]) -> Step:
    def step() -> Tensor:
        loss = loss_of()
        loss.backward()
        return loss.detach()

    return step


def build_ours(inputs: Inputs) -> Step:
    def loss() -> Tensor:
        return fused_linear_divergence(
            *inputs.student, *inputs.teacher, token_weight=inputs.token_weight_T
        ).loss

    return differentiated(loss)


def build_ours_main_grad(inputs: Inputs) -> Step:
    main_grad_VD = torch.zeros_like(
        inputs.student_weight_VD, dtype=torch.float32, requires_grad=False
    )
    inputs.main_grad_VD = main_grad_VD

    def loss() -> Tensor:
        result = fused_linear_divergence(
            *inputs.student,
            *inputs.teacher,
            token_weight=inputs.token_weight_T,
            weight_grad_accumulator=main_grad_VD,
        )
        return result.loss

    return differentiated(loss)


def naive_loss(
    student_hidden_TD: Tensor,
    student_weight_VD: Tensor,
    teacher_hidden_TE: Tensor,
    teacher_weight_VE: Tensor,
    token_weight_T: Tensor,
) -> Tensor:
    # The product is rounded to the dtype of its operands before it becomes float32.
    student_logits_TV = (student_hidden_TD @ student_weight_VD.T).float()
    with torch.no_grad():
        teacher_logits_TV = (teacher_hidden_TE @ teacher_weight_VE.T).float()
    return (token_weight_T * divergence("reverse_kl", student_logits_TV, teacher_logits_TV)).sum()


def build_naive(inputs: Inputs) -> Step:
    return differentiated(
        lambda: naive_loss(*inputs.student, *inputs.teacher, inputs.token_weight_T)
    )


def build_naive_compile(inputs: Inputs) -> Step:
    mode = "max-autotune-no-cudagraphs" if inputs.token_weight_T.is_cuda else None
    compiled = torch.compile(naive_loss, mode=mode)
    return differentiated(lambda: compiled(*inputs.student, *inputs.teacher, inputs.token_weight_T))


def liger_loss(name: str) -> Callable[..., Tensor]:
    """Liger's module for the reverse KL, which it calls JSD with a beta of 1.  Fails where Liger is
    not installed.
    """
    if name == LIGER_CHUNKED:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        return LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=True, chunk_size=1024
        )
    from liger_kernel.transformers import LigerFusedLinearJSD

    # Summed in float32, as ours is: its default sums the chunks' weight gradients in bfloat16.
    return LigerFusedLinearJSD(jsd_beta=1.0, accum_dtype=torch.float32)


def build_liger_chunked(inputs: Inputs) -> Step:
    module = liger_loss(LIGER_CHUNKED)
    # Only says that no token is ignored.
    labels_T = torch.zeros_like(inputs.token_weight_T, dtype=torch.long)
    return differentiated(lambda: module(*inputs.student, *inputs.teacher, labels_T))


def build_liger_triton(inputs: Inputs) -> Step:
    module = liger_loss(LIGER_TRITON)
    return differentiated(lambda: module(*inputs.student, *inputs.teacher, None))


PROVIDERS = {
    OURS: Provider("ours", build_ours),
    MAIN_GRAD: Provider("ours, main_grad", build_ours_main_grad),
    NAIVE: Provider("naive eager", build_naive),
    COMPILED: Provider("naive torch.compile", build_naive_compile, is_compiled=True),
    LIGER_CHUNKED: Provider("Liger chunked JSD", build_liger_chunked, is_compiled=True),
    LIGER_TRITON: Provider(
        "Liger FusedLinearJSD", build_liger_triton, is_compiled=True, needs_cuda=True
    ),
}


class ChunkSizes(NamedTuple):
    logit_rows: int  # C
    gradient_rows: int  # G


class ProductSizes(TorchDispatchMode):
    """Notes rows, inner size and columns of every matrix product that runs under it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int, int]] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        operator = func.overloadpacket
        if operator in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = args[:2] if operator is torch.ops.aten.mm else args[1:3]
            self.seen.append((left.shape[0], left.shape[1], right.shape[1]))
        return func(*args, **(kwargs or {}))


def observed_chunk_sizes(inputs: Inputs, shape: Shape) -> ChunkSizes:
    """The chunk sizes of "ours", from the products that it runs: no knowledge of its inside can go
    stale here.
    """
    step = build_ours(inputs)
    with ProductSizes() as products:
        step()
    inputs.clear_gradients()
    logit_rows = [rows for rows, _, columns in products.seen if columns == shape.vocab_size]
    gradient_rows = [rows for rows, inner, _ in products.seen if inner == shape.vocab_size]
    if not logit_rows or not gradient_rows:
        raise RuntimeError("no product over the whole vocabulary seen; give --chunk-rows")
    return ChunkSizes(max(logit_rows), max(gradient_rows))


def build_floor(inputs: Inputs, shape: Shape, sizes: ChunkSizes) -> Step:
    """The four products and nothing else, results in memory that is already there, in the dtype of
    the inputs.
    """
    hidden_TD, weight_VD = (tensor.detach() for tensor in inputs.student)
    teacher_hidden_TE, teacher_weight_VE = inputs.teacher
    logit_rows, gradient_rows = (min(rows, shape.num_tokens) for rows in sizes)
    teacher_CV = hidden_TD.new_empty(logit_rows, shape.vocab_size)
    # The student's logits take the place of the derivatives: products do not care what the numbers
    # are.
    student_GV = hidden_TD.new_empty(max(logit_rows, gradient_rows), shape.vocab_size)
    hidden_grad_TD, weight_grad_VD = torch.empty_like(hidden_TD), torch.empty_like(weight_VD)
    nothing = hidden_TD.new_zeros(())

    def step() -> Tensor:
        for start in range(0, shape.num_tokens, gradient_rows):
            stop = min(start + gradient_rows, shape.num_tokens)
            for first in range(start, stop, logit_rows):
                last = min(first + logit_rows, stop)
                torch.mm(
                    teacher_hidden_TE[first:last],
                    teacher_weight_VE.T,
                    out=teacher_CV[: last - first],
                )
                torch.mm(
                    hidden_TD[first:last], weight_VD.T, out=student_GV[first - start : last - start]
                )
            gradient_GV, hidden_GD = student_GV[: stop - start], hidden_TD[start:stop]
            torch.mm(gradient_GV, weight_VD, out=hidden_grad_TD[start:stop])
            if start == 0:
                torch.mm(gradient_GV.T, hidden_GD, out=weight_grad_VD)
            else:
                weight_grad_VD.addmm_(gradient_GV.T, hidden_GD)
        return nothing

    return step


def build_step(name: str, inputs: Inputs) -> Step:
    provider = PROVIDERS[name]
    if provider.needs_cuda and not inputs.token_weight_T.is_cuda:
        raise RuntimeError("needs CUDA (a Triton kernel)")
    return provider.build(inputs)


def describe(error: Exception) -> str:
    """One line without the folders of this machine."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {re.sub(r'(/[^/ :]+)+/', '', lines[0])}"[:300]


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if platform.system() == "Linux":
        ctypes.CDLL(None).malloc_trim(0)


def balanced_order(names: Sequence[str], repeat: int) -> list[str]:
    """A Williams design: within 2 * len(names) repeats, each follows each other one equally often."""
    count = len(names)
    zigzag = [
        (index + 1) // 2 if index % 2 else (count - index // 2) % count for index in range(count)
    ]
    order = [names[(position + repeat) % count] for position in zigzag]
    return order[::-1] if repeat // max(count, 1) % 2 else order


def seconds_of(step: Step, device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


class Timings:
    """Steps on shared inputs, timed in turn; a step that fails is noted in `errors` and left out
    from then on.
    """

    def __init__(self, inputs: Inputs, device: str) -> None:
        self._inputs = inputs
        self._device = device
        self.steps: dict[str, Step] = {}
        self.errors: dict[str, str] = {}
        # NaN where a step failed, so that repeats stay aligned.
        self.samples: dict[str, list[float]] = {}

    def add(self, name: str, build: Callable[[], Step]) -> None:
        try:
            self.steps[name] = build()
        except Exception as error:
            self._drop(name, error)

    def run(self, warmups: int, repeats: int) -> None:
        self._inputs.draw(0)
        for name in list(self.steps):
            report(f"  warm-up: {name}")
            for _ in range(warmups):
                self._time(name)
        self.samples = {name: [math.nan] * repeats for name in self.steps}
        for repeat in range(repeats):
            report(f"  repeat {repeat + 1} of {repeats}")
            self._inputs.draw(repeat + 1)
            for name in balanced_order(list(self.samples), repeat):
                self.samples[name][repeat] = self._time(name)

    def _time(self, name: str) -> float:
        if name not in self.steps:
            return math.nan
        try:
            return seconds_of(self.steps[name], self._device)
        except Exception as error:
            self._drop(name, error)
            return math.nan
        finally:
            self._inputs.clear_gradients()

    def _drop(self, name: str, error: Exception) -> None:
        self.errors[name] = describe(error)
        self.steps.pop(name, None)
        report(f"  {name}: {self.errors[name]}")
        del error
        free_memory()

    def summary(self, name: str) -> dict[str, Any]:
        if name in self.errors:
            return {"error": self.errors[name]}
        samples = np.array(self.samples[name])
        p20, median, p80 = np.percentile(samples, [20, 50, 80])
        ratios = {
            baseline: float(np.median(samples / np.array(self.samples[baseline])))
            for baseline in BASELINES
            if baseline in self.samples and baseline not in self.errors and baseline != name
        }
        seconds = {"median": median, "p20": p20, "p80": p80, "samples": samples.tolist()}
        return {"seconds": seconds, "ratio_to": ratios}


def cuda_memory(inputs: Inputs, step: Step) -> dict[str, int]:
    free_memory()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    peak, after, outputs = (
        torch.cuda.max_memory_allocated(),
        torch.cuda.memory_allocated(),
        inputs.gradient_bytes(),
    )
    inputs.clear_gradients()
    return memory_record(before, peak, after, outputs)


def memory_record(before: int, peak: int, after: int, outputs: int) -> dict[str, int]:
    return {
        "peak_extra_bytes": peak - before - outputs,
        "gradient_bytes": outputs,
        "kept_bytes": after - before - outputs,  # a workspace that waits for the next call
    }


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (most since it was reset) of this process."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, field
    return int(found[1]) << 10


def measure_own_memory(name: str, shape: Shape, chunk_rows: int | None) -> dict[str, int]:
    """Of one step in this process, which has done nothing else that is large.  Products of
    `chunk_rows`, or all, tokens run first: what their library then keeps for itself is the same for
    the floor, and is listed apart.
    """
    is_compiled = PROVIDERS[name].is_compiled
    if not is_compiled:  # a compiled one would take the second shape as a reason to compile anew
        tiny = Inputs.empty(TINY_SHAPE, "cpu", torch.float32)
        tiny.draw(0)
        build_step(name, tiny)()
    inputs = Inputs.empty(shape, "cpu", torch.float32)
    inputs.draw(1)
    step = build_step(name, inputs)
    before_products = settled_bytes()
    rows = chunk_rows or shape.num_tokens
    build_floor(inputs, shape, ChunkSizes(rows, rows))()
    products = settled_bytes() - before_products
    if is_compiled:  # so that the compiler's memory does not count
        step()
        inputs.clear_gradients()
    before = settled_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
    step()
    record = memory_record(
        before, resident_bytes("VmHWM"), resident_bytes("VmRSS"), inputs.gradient_bytes()
    )
    return record | {"product_library_bytes": products}


def settled_bytes() -> int:
    free_memory()
    return resident_bytes("VmRSS")


def cpu_memory(name: str, shape: Shape, chunk_rows: int) -> dict[str, Any]:
    """`measure_own_memory` in a fresh process: in this one, steps could use memory again that
    others left behind.
    """
    command = [sys.executable, __file__, "--device", "cpu", "--shapes", ",".join(map(str, shape))]
    command += ["--memory-of", name, "--threads", str(torch.get_num_threads())]
    if name in (OURS, MAIN_GRAD):  # the others multiply all tokens at once, or Liger's 1024
        command += ["--chunk-rows", str(chunk_rows)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        lines = process.stderr.strip().splitlines() or ["no message"]
        return {"error": describe(RuntimeError(f"exit status {process.returncode}: {lines[-1]}"))}
    return json.loads(process.stdout.splitlines()[-1])


class AccuracyCase(NamedTuple):
    inputs: Inputs
    target_kl: float
    loss: Tensor  # this and the next two in float64
    hidden_grad_TD: Tensor
    weight_grad_VD: Tensor


def relative_error(actual: Tensor, oracle: Tensor) -> float:
    return float((actual.double() - oracle).norm() / oracle.norm())


def noise_scale(student_logits_TV: Tensor, noise_logits_TV: Tensor, target_kl: float) -> float:
    """The factor on the noise that makes the mean KL `target_kl`."""
    scale = math.sqrt(target_kl)
    for _ in range(20):
        kl = float(
            divergence(
                "reverse_kl", student_logits_TV, student_logits_TV + scale * noise_logits_TV
            ).mean()
        )
        if abs(kl / target_kl - 1) < 0.01:
            break
        # The KL grows with the square of small noise, more slowly later.
        scale *= math.sqrt(target_kl / kl)
    return scale


def make_accuracy_case(
    shape: Shape, device: str, dtype: torch.dtype, target_kl: float
) -> AccuracyCase:
    """A teacher that is the student plus scaled noise, which lives in hidden columns that only the
    teacher has.

    So rounding the inputs to bfloat16 rounds both models' common part alike and leaves the KL as it
    is.
    """
    generator = torch.Generator(device).manual_seed(0)
    num_extra = shape.teacher_size - shape.student_size

    def randn(*sizes: int, std: float = 1.0) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device) * std

    hidden_TD = randn(shape.num_tokens, shape.student_size)
    weight_VD = randn(
        shape.vocab_size, shape.student_size, std=LOGIT_STD / math.sqrt(shape.student_size)
    )
    noise_TX = randn(shape.num_tokens, num_extra)
    weight_VX = randn(shape.vocab_size, num_extra, std=NOISE_STD / math.sqrt(num_extra))
    scale = noise_scale(
        hidden_TD.double() @ weight_VD.double().T,
        noise_TX.double() @ weight_VX.double().T,
        target_kl,
    )
    inputs = Inputs(
        hidden_TD.to(dtype).requires_grad_(),
        weight_VD.to(dtype).requires_grad_(),
        torch.cat([hidden_TD, scale * noise_TX], 1).to(dtype),
        torch.cat([weight_VD, weight_VX], 1).to(dtype),
        torch.full((shape.num_tokens,), 1 / shape.num_tokens, device=device),
    )
    leaves = [tensor.detach().double().requires_grad_() for tensor in inputs.student]
    student_logits_TV = leaves[0] @ leaves[1].T
    teacher_logits_TV = inputs.teacher_hidden_TE.double() @ inputs.teacher_weight_VE.double().T
    loss = divergence("reverse_kl", student_logits_TV, teacher_logits_TV).mean()
    return AccuracyCase(inputs, target_kl, loss.detach(), *torch.autograd.grad(loss, leaves))


def errors_of(name: str, case: AccuracyCase) -> dict[str, Any]:
    inputs = case.inputs
    inputs.clear_gradients()
    try:
        loss = build_step(name, inputs)()
        hidden_grad_TD, weight_grad_VD = (tensor.grad for tensor in inputs.student)
        if name == MAIN_GRAD:
            weight_grad_VD = inputs.main_grad_VD
        assert hidden_grad_TD is not None and weight_grad_VD is not None
        return {
            "loss": relative_error(loss, case.loss),
            "student_hidden_grad": relative_error(hidden_grad_TD, case.hidden_grad_TD),
            "student_weight_grad": relative_error(weight_grad_VD, case.weight_grad_VD),
        }
    except Exception as error:
        return {"error": describe(error)}


def measure_accuracy(
    names: Iterable[str], shape: Shape, device: str
) -> tuple[Shape, dict[str, list[dict[str, Any]]]]:
    vocab_size = (
        shape.vocab_size if device == "cuda" else min(shape.vocab_size, ACCURACY_VOCAB_ON_CPU)
    )
    used = Shape(
        min(shape.num_tokens, ACCURACY_TOKENS),
        shape.student_size,
        max(shape.teacher_size, shape.student_size + NOISE_SIZE),
        vocab_size,
    )
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for dtype in (torch.float32, torch.bfloat16):
        torch.compiler.reset()  # what was compiled for other shapes would make these ones dynamic
        for target_kl in TARGET_KLS:
            case = make_accuracy_case(used, device, dtype, target_kl)
            common = {
                "dtype": dtype_name(dtype),
                "target_kl": target_kl,
                "kl": float(case.loss),
            }
            for name, cases in records.items():
                report(f"  accuracy in {common['dtype']} at KL {target_kl:g}: {name}")
                cases.append(common | errors_of(name, case))
            del case
            free_memory()
    return used, records


@dataclass
class Settings:
    device: str
    names: list[str]
    repeats: int
    warmups: int
    chunk_rows: int | None

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32


def time_shape(
    shape: Shape, settings: Settings
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Results by provider (on CUDA with memory), and what is known of the floor."""
    torch.compiler.reset()
    inputs = Inputs.empty(shape, settings.device, settings.dtype)
    inputs.draw(0)
    timings = Timings(inputs, settings.device)
    sizes = ChunkSizes(0, 0)

    def floor() -> Step:
        nonlocal sizes
        rows = settings.chunk_rows
        sizes = observed_chunk_sizes(inputs, shape) if rows is None else ChunkSizes(rows, rows)
        return build_floor(inputs, shape, sizes)

    timings.add(FLOOR, floor)
    for name in settings.names:
        timings.add(name, partial(build_step, name, inputs))
    timings.run(settings.warmups, settings.repeats)
    results = {name: timings.summary(name) for name in [FLOOR, *settings.names]}
    if settings.device == "cuda":
        for name in settings.names:
            if name in timings.steps:
                try:
                    results[name]["memory"] = cuda_memory(inputs, timings.steps[name])
                except Exception as error:
                    results[name]["memory"] = {"error": describe(error)}
    floor_record: dict[str, Any] = {"flops": shape.flops, **sizes._asdict()} | results.pop(FLOOR)
    if "seconds" in floor_record:
        floor_record["gflops_per_second"] = shape.flops / floor_record["seconds"]["median"] / 1e9
    return results, floor_record


def measure_shape(shape: Shape, settings: Settings) -> dict[str, Any]:
    report(f"shape {tuple(shape)}")
    results, floor_record = time_shape(shape, settings)
    free_memory()
    if settings.device == "cpu":
        for name, result in results.items():
            if "error" not in result:
                report(f"  memory: {name}")
                result["memory"] = cpu_memory(name, shape, floor_record["logit_rows"])
    runnable = [
        name
        for name in settings.names
        if settings.device == "cuda" or not PROVIDERS[name].needs_cuda
    ]
    accuracy_shape, accuracy = measure_accuracy(runnable, shape, settings.device)
    for name, cases in accuracy.items():
        results[name]["accuracy"] = cases
    return {
        "shape": shape._asdict(),
        "dtype": dtype_name(settings.dtype),
        "floor": floor_record,
        "accuracy_shape": accuracy_shape._asdict(),
        "providers": results,
    }


def installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def hardware(device: str) -> dict[str, Any]:
    cpu = platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(
            r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
        cpu = found[1] if found else cpu
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {"device": device, "cpu": cpu, "gpu": gpu, "threads": torch.get_num_threads()}


def describe_run(settings: Settings) -> dict[str, Any]:
    packages = ("torch", "liger-kernel", "triton")
    return {
        "schema_version": SCHEMA_VERSION,
        "benchmark": "divergence",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(settings.device),
        "versions": {"python": platform.python_version()}
        | {name: installed_version(name) for name in packages},
        "protocol": {
            "step": "value, gradient of the student's hidden states, gradient of the student's output layer",
            "repeats": settings.repeats,
            "warmups": settings.warmups,
            "ratios": "medians of the ratios within each repeat",
            "accuracy": "relative L2 errors against float64 autograd on the same inputs, at accuracy_shape",
        },
    }


def printed_time(seconds: float) -> str:
    milliseconds = 1000 * seconds
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def gradient_errors(result: dict[str, Any], dtype: str) -> str:
    """The larger error of the two gradients at each KL."""
    parts = []
    for case in result.get("accuracy", ()):
        if case["dtype"] == dtype:
            worst = max(
                case.get("student_hidden_grad", math.nan), case.get("student_weight_grad", math.nan)
            )
            parts.append("error" if math.isnan(worst) else f"{worst:.1e}")
    return " ".join(parts) or "-"


def table_row(label: str, result: dict[str, Any]) -> list[str]:
    if "error" in result:
        times = ["failed", "-", "-", "-"]
    else:
        seconds, ratios = result["seconds"], result["ratio_to"]
        spread = f"{printed_time(seconds['p20'])}-{printed_time(seconds['p80'])}"
        times = [printed_time(seconds["median"]), spread]
        times += [
            f"{ratios[baseline]:.2f}" if baseline in ratios else "-" for baseline in (FLOOR, NAIVE)
        ]
    extra = result.get("memory", {}).get("peak_extra_bytes")
    memory = "-" if extra is None else f"{extra / MIB:.0f}"
    return [
        label,
        *times,
        memory,
        gradient_errors(result, "float32"),
        gradient_errors(result, "bfloat16"),
    ]


def print_shape(console: Console, record: dict[str, Any]) -> None:
    floor = record["floor"]
    sizes = ", ".join(
        f"{letter}={size}" for letter, size in zip("TDEV", record["shape"].values(), strict=True)
    )
    table = Table(title=f"{sizes}, {record['dtype']}")
    table.add_column("provider", no_wrap=True)
    kls = "/".join(f"{kl:g}" for kl in TARGET_KLS)
    for column in ("median ms", "p20-p80", "x floor", "x naive", "peak extra MiB"):
        table.add_column(column, justify="right")
    for dtype in ("fp32", "bf16"):
        table.add_column(f"grad err {dtype}, KL {kls}", no_wrap=True)
    table.add_row(
        *table_row(f"four products, C={floor['logit_rows']} G={floor['gradient_rows']}", floor)
    )
    for name, result in record["providers"].items():
        table.add_row(*table_row(PROVIDERS[name].label, result))
    console.print(table)
    for name, result in {FLOOR: floor, **record["providers"]}.items():
        if "error" in result:
            console.print(f"{name}: {result['error']}")
    if "gflops_per_second" in floor:
        console.print(
            f"floor: {floor['gflops_per_second']:.4g} GF/s ({floor['flops'] / 1e9:.4g} GF)"
        )
    for name in (OURS, MAIN_GRAD):
        ratios = record["providers"].get(name, {}).get("ratio_to", {})
        peers = [
            f"{ratio:.2f} x {PROVIDERS[peer].label}"
            for peer, ratio in ratios.items()
            if peer != FLOOR
        ]
        if peers:
            console.print(f"{PROVIDERS[name].label}: {', '.join(peers)}")


def report(line: str) -> None:
    """Progress; not on stdout, which is for the table and the JSON."""
    print(line, file=sys.stderr, flush=True)


def parse_shape(text: str) -> Shape:
    try:
        sizes = [int(size) for size in text.split(",")]
        if min(sizes) < 1:
            raise ValueError
        return Shape(*sizes)
    except (ValueError, TypeError):
        raise argparse.ArgumentTypeError(
            f"expected T,D,E,V as four positive whole numbers, found {text!r}"
        ) from None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=parse_shape,
        metavar="T,D,E,V",
        help="instead of the device's own",
    )
    parser.add_argument("--repeats", type=int, help="default: 11, with --quick 2")
    parser.add_argument(
        "--threads", type=int, help="of PyTorch on the CPU; default: its own choice"
    )
    parser.add_argument(
        "--chunk-rows", type=int, help="both chunk sizes of the floor; default: those of ours"
    )
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS), default=list(PROVIDERS))
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="default: to stdout, after the tables"
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it still run?")
    # For `cpu_memory`.
    parser.add_argument("--memory-of", choices=list(PROVIDERS), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if arguments.memory_of is not None:
        print(
            json.dumps(
                measure_own_memory(arguments.memory_of, arguments.shapes[0], arguments.chunk_rows)
            )
        )
        return
    settings = Settings(
        device=arguments.device,
        names=arguments.providers,
        repeats=arguments.repeats or (2 if arguments.quick else 11),
        warmups=5 if arguments.device == "cuda" else 2,
        chunk_rows=arguments.chunk_rows,
    )
    console = Console()
    # A pipe counts as 80 columns, into which the table does not fit.
    console.width = max(console.width, 160)
    run = describe_run(settings)
    run["shapes"] = []
    for shape in arguments.shapes or (
        QUICK_SHAPES if arguments.quick else SHAPES[arguments.device]
    ):
        run["shapes"].append(measure_shape(shape, settings))
        print_shape(console, run["shapes"][-1])
    text = json.dumps(run, indent=2) + "\n"
    if arguments.json is None:
        print(text, end="")
    else:
        arguments.json.write_text(text)


if __name__ == "__main__":
    main()
