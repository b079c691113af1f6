"""What this machine has, and which path each part of a run takes with it.

A package that is not installed is looked up in the metadata only, never imported.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

Row = tuple[str, str, str]  # what, found, path taken

_MISSING = "missing"
_COMPILERS = ("c++", "g++", "clang++")


def print_report(console: Console) -> None:
    """Print one row for each thing a run depends on."""
    table = Table("", "found", "path taken")
    for what, found, path in (*_software(), *_devices(), *_machine()):
        table.add_row(what, Text(found, style="yellow" if found == _MISSING else ""), Text(path))
    console.print(table)


def _software() -> Iterator[Row]:
    yield "Python", platform.python_version(), ""
    yield "torch", _version("torch"), "tensors, process groups, the launcher of the ranks"
    yield "megatron-core", _version("megatron-core"), "the student and every teacher layer"
    yield "Transformer Engine", _version("transformer-engine"), _layer_specs()
    yield "mbridge", _version("mbridge"), "weights between HF and Megatron"
    yield "transformers", _version("transformers"), "tokenizers, the embedded rollout engine"
    yield (
        "aiohttp",
        _version("aiohttp"),
        _with_extra("aiohttp", "sglang", "the client of SGLang servers, rollout.engine sglang"),
    )
    yield (
        "triton",
        _version("triton"),
        _with_extra("triton", "gpu", "the divergence's row kernels on CUDA"),
    )
    yield "zarr", _version("zarr"), "the hidden cache's format"
    yield (
        "obstore",
        _version("obstore"),
        _with_extra("obstore", "s3", "teacher stores behind URLs, e.g. s3://"),
    )


def _devices() -> Iterator[Row]:
    import torch

    from mtopd.megatron.devices import explain

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = sorted({torch.cuda.get_device_name(i) for i in range(count)})
    yield (
        "CUDA devices",
        f"{count}: {', '.join(names)}" if count else "none",
        "one GPU for each rank; on CPU where no rank sees one",
    )
    for num_ranks in sorted({max(count, 1), count + 1}):
        device, why = explain(count, num_ranks)
        yield f"{num_ranks} ranks a node" if num_ranks > 1 else "1 rank a node", device, why


def _machine() -> Iterator[Row]:
    import psutil
    import torch

    from mtopd.kernels.rows import select_row_kernels

    compiler = next((path for path in map(shutil.which, _COMPILERS) if path), _MISSING)
    chosen = select_row_kernels("auto", "cpu", torch.float32).NAME
    path = (
        "compiled at first use"
        if chosen == "cpu"
        else "plain torch, which is slow: there is no compiler, or no ninja"
    )
    yield "C++ compiler", compiler, f"the divergence's row kernels on CPU: {path}"
    yield "CPU cores", str(len(os.sched_getaffinity(0))), "one for each CPU rank"
    memory = psutil.virtual_memory()
    yield (
        "memory",
        f"{memory.available / 2**30:.1f} GiB free of {memory.total / 2**30:.1f} GiB",
        _host_budget(),
    )
    yield (
        "disk",
        f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB free",
        f"run directories under {Path.cwd()}",
    )


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return _MISSING


def _with_extra(distribution: str, extra: str, path: str) -> str:
    return f"{path}; pip install mtopd[{extra}]" if _version(distribution) == _MISSING else path


def _layer_specs() -> str:
    local = "Megatron's local layer specs"
    if _version("transformer-engine") == _MISSING:
        return _with_extra("transformer-engine", "gpu", local)
    from mtopd.megatron.without_te import have_transformer_engine

    return (
        "Transformer Engine's layer specs"
        if have_transformer_engine()
        else f"{local}: it is there but does not import"
    )


def _host_budget() -> str:
    from mtopd.config import OffloadConfig

    return f"teachers are read ahead into {OffloadConfig().host_budget / 2**30:.0f} GiB for each rank by default"
