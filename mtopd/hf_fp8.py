"""FP8 weights of an HF folder: codes of a byte each, and scales that make numbers of them.

A weight is its code, as float32, times the scale of its block, rounded once to the dtype that
config.json names: what DeepSeek's own conversion does.  A block's size is what config.json says:
the ratio of the shapes is another one where the last block is not whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mtopd.dtypes import dtype_name, torch_dtype
from mtopd.safetensors_file import TensorEntry
from mtopd.types import MtopdError

CODES = "F8_E4M3"
READ = (
    "FP8 in blocks (quant_method fp8, with weight_block_size) and FP8 of compressed-tensors "
    "(float-quantized, strategy channel or tensor)"
)
_SCALE_DTYPES = ("F32", "BF16", "F16")
_BAND = 128  # rows that are float32 at a time

Block = tuple[int | None, int | None]  # rows and columns of a scale; None: all of them
Entries = dict[str, tuple[Path, TensorEntry]]


def not_read(path: Path, field: str, what: str) -> MtopdError:
    return MtopdError(
        f"{path} has a {field}: quantised weights are not read where {what}, only {READ}; convert the "
        f"checkpoint to bfloat16 or float32 first, with the scales multiplied in, and remove {field}"
    )


@dataclass(frozen=True, slots=True)
class Fp8:
    """How a folder's weights are stored, from its config.json."""

    block: Block
    suffix: str  # of a scale's name, behind its weight's
    has_input_scales: bool  # activations are rounded by scales that stand in the files, too
    dtype: torch.dtype

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.block == (None, None):
            return (1,)
        return self._grid(shape)

    def weight(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The numbers; beside them only a band of rows is in memory as float32."""
        rows, columns = codes.shape
        height, width = self.block[0] or max(rows, 1), self.block[1] or columns
        grid = scales.float().view(self._grid(codes.shape))
        found = torch.empty(codes.shape, dtype=self.dtype)
        for start in range(0, rows, _BAND):
            stop = min(start + _BAND, rows)
            of_rows = grid[torch.arange(start, stop) // height]
            factors = of_rows.repeat_interleave(width, dim=1)[:, :columns]
            found[start:stop] = codes[start:stop].float() * factors
        return found

    def _grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(
            -(-size // step) if step else 1 for size, step in zip(shape, self.block, strict=True)
        )


# -- config ----------------------------------------------------------------------------------------


def fp8_of(path: Path, values: Mapping[str, Any]) -> Fp8 | None:
    """What config.json at ``path`` says of its weights; None: they are not quantised.  Raises
    MtopdError for every other way of storing them.
    """
    found = values.get("quantization_config")
    if found is None:
        return None
    if not isinstance(found, dict):
        raise _not_read(path, f"it is {str(found)[:40]!r}, no table")
    method = found.get("quant_method")
    if method == "fp8":
        block, suffix = _block(path, found), "_scale_inv"
        is_static = found.get("activation_scheme") == "static"
    elif method == "compressed-tensors":
        block, is_static = _compressed(path, found)
        suffix = "_scale"
    else:
        raise _not_read(path, f"quant_method is {str(method)[:40]!r}")
    return Fp8(block, suffix, is_static, _dtype(path, values))


def _not_read(path: Path, what: str) -> MtopdError:
    return not_read(path, "quantization_config", what)


def _block(path: Path, found: Mapping[str, Any]) -> Block:
    if (form := found.get("fmt", "e4m3")) != "e4m3":
        raise _not_read(path, f"fmt is {str(form)[:40]!r}")
    block = found.get("weight_block_size")
    if (
        not isinstance(block, list)
        or len(block) != 2
        or not all(type(size) is int and size > 0 for size in block)
    ):
        raise _not_read(path, f"weight_block_size is {str(block)[:40]}, not [rows, columns]")
    return block[0], block[1]


def _compressed(path: Path, found: Mapping[str, Any]) -> tuple[Block, bool]:
    """The block of a scale, and whether activations have scales in the files."""
    groups = found.get("config_groups")
    parts = [*groups.values()] if isinstance(groups, dict) else []
    sparse = found.get("sparsity_config") or {}
    if not (parts and all(isinstance(part, dict) for part in [*parts, sparse])):
        raise _not_read(path, "config_groups or sparsity_config are not tables")
    if (kind := sparse.get("format", "dense")) != "dense":
        raise _not_read(path, f"sparsity_config.format is {str(kind)[:40]!r}")
    strategies = set()
    for form in (found, *parts):
        if (name := form.get("format") or "float-quantized") != "float-quantized":
            raise _not_read(path, f"format is {str(name)[:40]!r}")
    for part in parts:
        weights = part.get("weights")
        weights = weights if isinstance(weights, dict) else {}
        needed = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
        # Only what it is by itself may be left out.
        given = {"symmetric": True, "dynamic": False} | weights
        for name, value in needed.items():
            if given.get(name) != value:
                raise _not_read(path, f"weights have {name} {str(given.get(name))[:40]}")
        strategies.add(str(weights.get("strategy")))
    if strategies not in ({"channel"}, {"tensor"}):
        raise _not_read(path, f"weights have strategy {' and '.join(sorted(strategies))[:80]}")
    inputs = [part.get("input_activations") for part in parts]
    is_static = any(isinstance(i, dict) and i.get("dynamic", False) is False for i in inputs)
    return ((1, None) if strategies == {"channel"} else (None, None)), is_static


def _dtype(path: Path, values: Mapping[str, Any]) -> torch.dtype:
    given = values.get("dtype") or values.get("torch_dtype")
    name = dtype_name(given) if isinstance(given, str) else None
    if name not in ("bfloat16", "float32", "float16"):
        raise MtopdError(
            f"{path} has dtype {str(given)[:40]} beside its quantization_config; the weights need one "
            "that they are rounded to: bfloat16 or float32"
        )
    return torch.float32 if name == "float16" else torch_dtype(name)


# -- files -----------------------------------------------------------------------------------------


def take_scales(fp8: Fp8, folder: Path, entries: Entries) -> tuple[Entries, Entries]:
    """Take out of ``entries`` what is no weight: scales by the name of their weight, and scales of
    activations.  Raises MtopdError unless every weight of codes has its scale, and every scale its
    weight.
    """
    scales, inputs = Entries(), Entries()
    for name, (path, entry) in entries.items():
        if entry.dtype != CODES:
            continue
        if name + fp8.suffix not in entries:
            raise MtopdError(
                f"{path}: tensor {name!r} is {CODES}, but there is no tensor {name + fp8.suffix!r} of "
                "its scales; the checkpoint is not complete: fetch it again"
            )
        scales[name] = entries[name + fp8.suffix]
        _check_pair(fp8, entry, *scales[name])
        given = name.removesuffix("weight") + "input_scale"
        if fp8.has_input_scales and given in entries:
            inputs[given] = entries[given]
    if not scales:
        raise MtopdError(
            f"{folder / 'config.json'} has a quantization_config, but no tensor of the files is {CODES};"
            " if the scales are multiplied in already, remove quantization_config, else "
            "fetch the files again"
        )
    for _, entry in scales.values():
        del entries[entry.name]
    for name in inputs:
        del entries[name]
    for name, (path, _) in entries.items():
        if name.endswith((fp8.suffix, ".input_scale")):
            raise MtopdError(
                f"{path}: tensor {name!r} is a scale that no {CODES} weight takes by config.json; a "
                "scale that is ignored would make another model: fetch both again"
            )
    return scales, inputs


def _check_pair(fp8: Fp8, codes: TensorEntry, path: Path, scale: TensorEntry) -> None:
    if len(codes.shape) != 2:
        raise MtopdError(
            f"{path}: tensor {codes.name!r} is {CODES} of shape {codes.shape}, only matrices are read; "
            "convert the checkpoint to bfloat16 or float32 first"
        )
    if scale.dtype not in _SCALE_DTYPES:
        raise MtopdError(
            f"{path}: scale {scale.name!r} is {scale.dtype}, read are {', '.join(_SCALE_DTYPES)}; "
            "convert the checkpoint to bfloat16 or float32 first"
        )
    if scale.shape != (wanted := fp8.scale_shape(codes.shape)):
        raise MtopdError(
            f"{path}: scale {scale.name!r} has shape {scale.shape}, a weight of {codes.shape} takes "
            f"{wanted} by quantization_config of config.json; one of them is of another checkpoint: "
            "fetch both again"
        )


def check_scales(scales: torch.Tensor, name: str, path: Path) -> None:
    """Raises MtopdError for what no weight can be multiplied with."""
    if (wrong := ~(scales.isfinite() & (scales > 0))).any():
        raise MtopdError(
            f"{path}: scale {name!r} has {int(wrong.sum())} of {wrong.numel()} values that are not "
            f"positive numbers, the first at {wrong.nonzero()[0].tolist()}; the file is damaged: fetch "
            "it again"
        )
