"""What SGLang 0.5.23 lacks on a CPU without AMX, given from outside: its files stay as they are.

Imported before anything of sglang, by the zygote alone.  The order matters: transformers and sglang
look for torchvision and sgl_kernel when they are imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Sequence
from typing import Any

os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # the seeded sampler would be compiled at first use

import numpy as np
import torch

# 1. PyPI's torchvision has CUDA operators, which cannot load beside a CPU torch; it only has to be
# importable, and its import looks these two up.
_TORCHVISION = torch.library.Library("torchvision", "DEF")
for _schema in (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
):
    _TORCHVISION.define(_schema)


# 2. The CPU build of sgl_kernel is not on PyPI.  Without its operators SGLang takes plain torch for
# every layer; the package only has to be importable, and what is called by mistake raises.
class _Absent:
    """A name of the absent package: attributes nest, a call raises."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> _Absent:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return _Absent(f"{self._name}.{attribute}")

    def __call__(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError(f"{self._name}: this CPU has no such kernel")


class _AbsentModule(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012
    __version__ = "0.4.10"

    def __getattr__(self, name: str) -> _Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.__name__}.{name}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != "sgl_kernel":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _AbsentModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__ == "sgl_kernel":
            vars(module)["assign_req_to_token_pool_cpu"] = _assign_req_to_token_pool


def _assign_req_to_token_pool(
    requests: torch.Tensor,
    pool: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    locations: torch.Tensor,
    _pool_width: int,
) -> None:
    """Rows of the cache's table: the one kernel that is called."""
    done = 0
    for row, start, end in zip(requests.tolist(), starts.tolist(), ends.tolist(), strict=True):
        pool[row, start:end] = locations[done : done + end - start].to(pool.dtype)
        done += end - start


sys.meta_path.append(_Finder())

# 3. Per-request random streams (--enable-deterministic-inference) hash by an operator of the same
# package; torch_native is not among the backends they take; batch-invariant kernels are Triton's.
# In float32 logits differ by about 1e-6 with the batch: that moves a token only at a near tie.
from sglang.srt import batch_invariant_ops  # noqa: E402
from sglang.srt.arg_groups import choices  # noqa: E402

_SGL_KERNEL = torch.library.Library("sgl_kernel", "DEF")
_SGL_KERNEL.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor columns) -> Tensor")


def _rotate(value: np.ndarray, bits: int) -> np.ndarray:
    return (value << np.uint32(bits)) | (value >> np.uint32(32 - bits))


def _mix(state: np.ndarray, word: np.ndarray) -> np.ndarray:
    word = _rotate(word * np.uint32(0xCC9E2D51), 15) * np.uint32(0x1B873593)
    return _rotate(state ^ word, 13) * np.uint32(5) + np.uint32(0xE6546B64)


def _murmur_hash32(
    seed: torch.Tensor, positions: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """[n] 64-bit seeds, [n] positions, [m] columns -> [n, m] uint32: MurmurHash3 of the words
    (seed's low half, its high half, position, column).
    """
    seed_n = seed.view(torch.int64).numpy().view(np.uint64)
    words = (seed_n & np.uint64(0xFFFFFFFF), seed_n >> np.uint64(32), positions.numpy())
    state = np.zeros(len(seed_n), np.uint32)
    for word in words:
        state = _mix(state, word.astype(np.uint32))
    hashed = _mix(state[:, None], columns.numpy().astype(np.uint32)[None]) ^ np.uint32(16)
    for bits, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        hashed = (hashed ^ (hashed >> np.uint32(bits))) * np.uint32(factor)
    return torch.from_numpy(hashed ^ (hashed >> np.uint32(16)))


_SGL_KERNEL.impl("murmur_hash32_cpu", _murmur_hash32, "CPU")
choices.add_deterministic_attention_backend_choices(["torch_native"])
choices.add_radix_supported_deterministic_attention_backend_choices(["torch_native"])
batch_invariant_ops.enable_batch_invariant_mode = lambda *_, **__: None
