"""FP8 folders made of plain ones, and beside them the folders that they stand for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

BLOCK = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [24, 40],  # divides no side of the models here: last blocks are not whole
    "modules_to_not_convert": ["lm_head", "model.layers.0.self_attn.o_proj"],
}
UNQUANTISED = "model.layers.0.self_attn.o_proj.weight"


def compressed(strategy: str, **weights: Any) -> dict[str, Any]:
    """As llm-compressor writes it."""
    form = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
    inputs = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    group = {
        "input_activations": inputs,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": form | {"dynamic": False, "group_size": None, "block_structure": None} | weights,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "model.layers.0.self_attn.o_proj"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "sparsity_config": {"format": "dense"},
    }


def cut(matrix: torch.Tensor, height: int, width: int, scale_dtype: torch.dtype) -> Any:
    """Codes, scales, and what they stand for in float64: a loop over blocks."""
    rows, columns = matrix.shape
    codes = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn)
    weight = torch.zeros(rows, columns, dtype=torch.float64)
    tops, lefts = range(0, rows, height), range(0, columns, width)
    scales = torch.zeros(len(tops), len(lefts), dtype=scale_dtype)
    for i, top in enumerate(tops):
        for j, left in enumerate(lefts):
            place = slice(top, top + height), slice(left, left + width)
            scales[i, j] = matrix[place].abs().max() / 448
            codes[place] = (matrix[place] / scales[i, j].float()).to(torch.float8_e4m3fn)
            weight[place] = codes[place].double() * scales[i, j].double()
    return codes, scales, weight


def quantise(
    plain: Path,
    fp8: Path,
    whole: Path,
    config: dict[str, Any],
    *,
    dtype: str = "bfloat16",
    scale_dtype: torch.dtype = torch.float32,
) -> None:
    """Write ``fp8``, and ``whole`` with the scales multiplied in, of a folder whose dtype is float32."""
    for folder in (fp8, whole):
        shutil.copytree(plain, folder)
        values = json.loads((folder / "config.json").read_text()) | {"dtype": dtype}
        if folder == fp8:
            values["quantization_config"] = config
        (folder / "config.json").write_text(json.dumps(values))
    stored, expected = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    to = getattr(torch, dtype)
    for name, tensor in load_file(plain / "model.safetensors").items():
        if "_proj" not in name or tensor.dim() != 2 or name == UNQUANTISED:
            is_fp32 = name.endswith("e_score_correction_bias")  # in DeepSeek's files, too
            stored[name] = expected[name] = tensor if is_fp32 else tensor.to(to)
            continue
        rows, columns = tensor.shape
        if "weight_block_size" in config:
            height, width = config["weight_block_size"]
            suffix = "_scale_inv"
        else:
            strategy = config["config_groups"]["group_0"]["weights"]["strategy"]
            height, width = {"channel": (1, columns), "tensor": (rows, columns)}[strategy]
            suffix = "_scale"
        codes, scales, weight = cut(tensor, height, width, scale_dtype)
        if suffix == "_scale" and height > 1:
            scales = scales.reshape(1)
        stored |= {name: codes, name + suffix: scales}
        # A product of float32 is the float64 one, rounded to float32.
        expected[name] = weight.float().to(to)
    for folder, tensors in ((fp8, stored), (whole, expected)):
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
