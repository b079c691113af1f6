"""An HF checkpoint becomes a teacher store.  Memory is bounded by one layer (or the embedding)."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from mtopd.convert.bridge import Bridge, load_hf_config
from mtopd.run_dir import publish_tree
from mtopd.safetensors_file import read_header
from mtopd.teacher_offload.store import TeacherStore, layer_path, open_store, write_manifest, write_store_file
from mtopd.types import MtopdError

_STORED = {torch.float32: "F32", torch.bfloat16: "BF16"}
_LAYER_PARAMETERS = (  # of a Megatron TransformerLayer built from its local spec
    "input_layernorm.weight",
    "self_attention.q_layernorm.weight",
    "self_attention.k_layernorm.weight",
    "pre_mlp_layernorm.weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
)


class HFTensors:
    """Tensors of an HF folder by name, one at a time.  Every file's header is checked before it is opened."""

    def __init__(self, folder: Path) -> None:
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise MtopdError(f"{folder} has no safetensors files; other weight formats can run code and are not read")
        self._file_of = {entry.name: path for path in paths for entry in read_header(path)}
        self._open: dict[Path, Any] = {}
        self._folder = folder

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __getitem__(self, name: str) -> torch.Tensor:
        path = self._file_of.get(name)
        if path is None:
            raise MtopdError(f"{self._folder} has no tensor {name!r}, which its config.json calls for")
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt", device="cpu")
        tensor: torch.Tensor = self._open[path].get_tensor(name)
        return tensor

    def __enter__(self) -> HFTensors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.clear()


def add_teacher(
    name: str,
    source: Path,
    target: Path,
    *,
    slices: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TeacherStore:
    """Write the store of the HF checkpoint ``source`` to ``target`` (which must not exist), whole or not at all.

    ``slices`` is the largest tensor-parallel size that can load it without a copy; any divisor of it can load it.
    Raises MtopdError when the checkpoint is damaged, unsupported, or cannot be cut into ``slices``.
    """
    from mtopd.tokenizer import load_tokenizer, tokenizer_hash, vocab_size

    if target.exists():
        raise MtopdError(f"{target} exists; remove it first, or choose another name")
    hf_config = load_hf_config(source)
    tokenizer = load_tokenizer(source)
    for what, size in (("key-value heads", hf_config.num_key_value_heads), ("FFN rows", hf_config.intermediate_size)):
        if slices < 1 or size % slices:
            raise MtopdError(f"{source} has {size} {what}, which {slices} slices do not divide; choose a divisor")
    if (known := vocab_size(tokenizer)) > hf_config.vocab_size:
        raise MtopdError(
            f"{source}: the tokenizer has {known} ids, the model only {hf_config.vocab_size} rows for them"
        )
    dtype = getattr(torch, str(hf_config.dtype).removeprefix("torch.")) if hf_config.dtype else torch.float32
    if dtype not in _STORED:
        raise MtopdError(f"{source} is stored as {dtype}; float32 and bfloat16 can be stored")
    bridge = Bridge(hf_config, dtype=dtype, padded_vocab_size=hf_config.vocab_size, tp=1)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        with HFTensors(source) as tensors:
            files = _write_files(partial, bridge, tensors, hf_config, slices, _STORED[dtype], dtype, progress)
        tokenizer.save_pretrained(partial / "tokenizer")
        manifest = {
            "name": name,
            "architecture": hf_config.to_dict(),
            "vocab_size": known,
            "tokenizer_hash": tokenizer_hash(tokenizer),
            "hidden_size": hf_config.hidden_size,
            "num_layers": hf_config.num_hidden_layers,
            "slices": slices,
            "stored_dtype": _STORED[dtype],
            "tied_embeddings": bool(hf_config.tie_word_embeddings),
            "head": {"scale": 1.0, "softcap": None, "bias": False},
            "base": None,
        }
        write_manifest(partial, manifest, files)
        publish_tree(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return open_store(target)


def _write_files(
    folder: Path,
    bridge: Bridge,
    tensors: HFTensors,
    hf_config: Any,
    slices: int,
    stored: str,
    dtype: torch.dtype,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    files: dict[str, Any] = {}
    total = hf_config.num_hidden_layers + 2

    def write(path: str, parts: list[tuple[str, torch.Tensor]]) -> None:
        files[path] = write_store_file(folder / path, [(n, _bits(t.to(dtype)), stored) for n, t in parts])
        progress(min(len(files), total), total)

    write("embedding.safetensors", _row_slices(tensors["model.embed_tokens.weight"], slices))
    for layer in range(hf_config.num_hidden_layers):
        write(layer_path(layer), _layer_parts(bridge, tensors, layer, slices))
    write("final_norm.safetensors", [("common/weight", tensors["model.norm.weight"])])
    if not hf_config.tie_word_embeddings:
        write("head.safetensors", _row_slices(tensors["lm_head.weight"], slices))
    return files


def _layer_parts(bridge: Bridge, tensors: HFTensors, layer: int, slices: int) -> list[tuple[str, torch.Tensor]]:
    common: list[tuple[str, torch.Tensor]] = []
    sliced: list[list[tuple[str, torch.Tensor]]] = [[] for _ in range(slices)]

    def cut(name: str, weight: torch.Tensor) -> None:
        for part, piece in zip(sliced, weight.chunk(slices), strict=True):
            part.append((name, piece))

    for name in _LAYER_PARAMETERS:
        full_name = f"decoder.layers.{layer}.{name}"
        weight = bridge.to_megatron(full_name, [tensors[n] for n in bridge.hf_names(full_name)])
        if name == "self_attention.linear_qkv.weight":
            cut(name, weight)  # rows stand by query group: a slice is a whole number of groups
        elif name == "mlp.linear_fc1.weight":
            gate, up = weight.chunk(2)
            cut(f"{name}.gate", gate)
            cut(f"{name}.up", up)
        elif name in ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight"):
            cut(f"{name}.T", weight.T)
        else:
            common.append((f"common/{name}", weight))
    return common + [(f"slice.{i:04d}/{name}", piece) for i, part in enumerate(sliced) for name, piece in part]


def _row_slices(matrix_VE: torch.Tensor, slices: int) -> list[tuple[str, torch.Tensor]]:
    rows = -(-matrix_VE.shape[0] // slices)
    padded = torch.nn.functional.pad(matrix_VE, (0, 0, 0, rows * slices - matrix_VE.shape[0]))
    return [(f"slice.{i:04d}/weight", part) for i, part in enumerate(padded.split(rows))]


def _bits(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
