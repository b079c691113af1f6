"""Run megatron-core on CPU with gloo.  The only place that knows how; does nothing when CUDA is
used.

Megatron names "cuda" literally in its schedules, RNG tracker and streams.  On CPU those calls are
answered here: torch.cuda's entry points become no-ops or CPU equivalents, and one torch function
mode rewrites device="cuda". The change holds for the process: afterwards
torch.cuda.current_device() returns a torch.device.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
}
_M_MMAP_THRESHOLD = -3  # of glibc's mallopt
_MMAP_BYTES = 4 << 20
_installed: list[TorchFunctionMode] = []  # keeps the mode alive; also says that it is on


def _names_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # DDP groups buffers by this string and asks for the cuda spelling.
            return _CUDA_TYPE_NAMES.get(args[0].dtype) or func(*args)
        if func is torch.Tensor.record_stream:
            return None
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is torch.Tensor.to and any(_names_cuda(a) for a in args):
            args = tuple("cpu" if _names_cuda(a) else a for a in args)
        return func(*args, **kwargs)


class _Stream:
    """Enough of torch.cuda.Stream and Event for DDP and p2p code: everything has already happened."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...
    def wait_stream(self, *_: object) -> None: ...
    def synchronize(self) -> None: ...
    def wait_event(self, *_: object) -> None: ...
    def record(self, *_: object) -> None: ...
    def wait(self, *_: object) -> None: ...
    def record_event(self, *_: object) -> _Stream:
        return self


def install() -> None:
    """Answer Megatron's CUDA calls on CPU.  Call once per process, before anything of Megatron is
    built.
    """
    if _installed:
        return
    # Megatron's jit_fuser is torch.compile: minutes of compiling for nothing on CPU.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    # By default glibc stops giving freed blocks back once large ones have come and gone: every
    # streamed teacher would then leave memory behind (1010 MiB instead of 680 after 12 teachers).
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
    # Megatron pulls in torch._dynamo, which refuses to register functions of torch.cuda that are
    # already replaced.
    import megatron.core.tensor_parallel.random as megatron_random

    # Megatron passes current_device() on as device=..., where an index would mean a GPU.
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.set_device = cuda.synchronize = cuda.empty_cache = lambda *args, **kwargs: None
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _Stream()
    cuda.stream = lambda stream=None: contextlib.nullcontext()
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    # Tensor-parallel ranks draw from states of their own, swapped into torch's one generator.
    rng: Any = megatron_random
    rng._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: (
        torch.get_rng_state()
    )
    rng._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    _install_dispatcher()
    # of torch's checkpoint reader, about ShardedTensor, which megatron-core chooses
    warnings.filterwarnings("ignore", "Please use DTensor", FutureWarning)
    mode = _CudaMeansCpu()
    mode.__enter__()
    _installed.append(mode)


@contextlib.contextmanager
def no_device_rewrite() -> Iterator[None]:
    """Around code, or a function, that never writes device="cuda": the mode would only cost it
    time, 2 us for each torch call.
    """
    with torch._C.DisableTorchFunction() if _installed else contextlib.nullcontext():
        yield


def _install_dispatcher() -> None:
    """The experts' all-to-all needs its split sizes as host integers; upstream converts only what
    is on CUDA.
    """
    from megatron.core.transformer.moe import token_dispatcher

    dispatcher: Any = token_dispatcher
    dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
    )
