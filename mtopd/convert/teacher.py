"""An HF checkpoint becomes a teacher store, file by file.  Memory is bounded by one layer (or the
embedding).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from mtopd.convert.bridge import Bridge
from mtopd.convert.layer_parts import Parts, layer_parts
from mtopd.convert.probe import transformers_probe
from mtopd.dtypes import safetensors_name
from mtopd.families import check_variant
from mtopd.hf_checkpoint import HFTensors, check_checkpoint, load_hf_config
from mtopd.planning import choose_slices
from mtopd.teacher_offload import names
from mtopd.teacher_offload.store import TeacherStore, check_files, open_store
from mtopd.teacher_offload.store_writer import StoreWriter, Tensor
from mtopd.types import MtopdError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def add_teacher(
    name: str,
    source: Path,
    target: Path,
    *,
    slices: int | Literal["auto"],
    logit_scale: float = 1.0,
    softcap: float | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> TeacherStore:
    """Write the store of the HF checkpoint ``source`` to ``target``, whole or not at all.

    ``slices`` is the largest tensor-parallel size that can load it without a copy; any divisor of
    it can load it; "auto": as many as the model has, up to 8. ``logit_scale`` and ``softcap`` tell
    what the checkpoint's own code does to logits after the output layer. The manifest's "probe"
    holds log-probs of a few tokens by transformers' own code.  Started again after a kill it goes
    on where it was; where the store is there already, from the same source, it is opened. Raises
    MtopdError when the checkpoint is damaged, unsupported, or cannot be cut into ``slices``.
    """
    from mtopd.tokenizer import (
        end_token,
        further_tokens,
        load_tokenizer,
        tokenizer_hash,
        vocab_size,
    )

    for what, given in (("logit scale", logit_scale), ("softcap", softcap)):
        if given is not None and not 0 < given < math.inf:
            raise MtopdError(f"the {what} is {given}; it must be a positive number")
    hf_config = load_hf_config(source)
    check_variant(hf_config, str(source / "config.json"))
    facts = check_checkpoint(source, say)
    slices = choose_slices(slices, facts.tp_counts, str(source))
    tokenizer = load_tokenizer(source)
    known = min(vocab_size(tokenizer), facts.vocab_size)
    if behind := further_tokens(tokenizer, known):
        if words := [token for token in behind if token not in tokenizer.get_added_vocab()]:
            raise MtopdError(
                f"{source}: the tokenizer has {vocab_size(tokenizer)} ids, the model only {known} rows "
                f"for them, none for {words[0]!r}: one of the two is another model's"
            )
        # A pad token that somebody added, for one.
        say(
            f"{source}: the model has no rows for {', '.join(map(repr, behind[:3]))}, added to its "
            "tokenizer: it never answers with them"
        )
    tensors = HFTensors(source)
    dtype = tensors.dtype("model.embed_tokens.weight")  # config.json may say another
    for end in ("model.norm.weight", "lm_head.weight"):  # written in the embedding's dtype
        if end in tensors and tensors.dtype(end).itemsize > dtype.itemsize:
            raise MtopdError(
                f"{tensors.file(end)}: {end} is {tensors.dtype(end)}, the embedding {dtype}; it "
                "would be rounded: save the checkpoint in one dtype"
            )
    bridge = Bridge(hf_config, dtype=dtype, padded_vocab_size=facts.vocab_size, tp=1)
    manifest = {
        "name": name,
        "architecture": hf_config.to_dict(),
        "vocab_size": known,
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "eos_token": end_token(tokenizer),
        "hidden_size": facts.hidden_size,
        "num_layers": facts.num_layers,
        "slices": slices,
        "stored_dtype": safetensors_name(dtype),
        "tied_embeddings": facts.has_tied_embeddings,
        "head": {"scale": logit_scale, "softcap": softcap, "bias": False},
        "base": None,
    }
    identity = _sha256(json.dumps([manifest, tensors.identity()], sort_keys=True).encode())
    if target.exists():
        return _finished(target, identity)
    with StoreWriter(target, identity) as writer:
        num_experts = _write_files(writer, bridge, tensors, slices, dtype, progress)
        manifest["num_experts"] = num_experts
        manifest["tokenizer_sha256"] = _save_tokenizer(tokenizer, writer.folder / "tokenizer")
        manifest["probe"] = transformers_probe(source, tensors, scale=logit_scale, softcap=softcap)
        return writer.publish(manifest)


def _finished(target: Path, identity: str) -> TeacherStore:
    """The store at ``target``, if it came from the same source: the same command was given again."""
    advice = "remove it first with `mtopd teachers rm`, or choose another name"
    if not (target / names.MANIFEST).is_file():
        raise MtopdError(f"{target} exists and is no teacher store; {advice}")
    store = check_files(open_store(target))
    if store.manifest.get("source") != identity:
        raise MtopdError(
            f"{target} exists and holds another teacher ({store.name!r}, or of another source); "
            f"{advice}"
        )
    return store


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> dict[str, str]:
    """Write the tokenizer's files; sha256 of each by path."""
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # of a full disk, tokenizers says so in a bare Exception
        raise MtopdError(
            f"cannot write {folder}: {error}; make room and start the same command again"
        ) from error
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): _sha256(path.read_bytes()) for path in files}


def _write_files(
    writer: StoreWriter,
    bridge: Bridge,
    tensors: HFTensors,
    slices: int,
    dtype: torch.dtype,
    progress: Callable[[int, int], None],
) -> int:
    """All safetensors files; returns the number of experts of a layer that has them, 0 for a dense
    teacher.
    """
    facts = bridge.facts
    total = facts.num_layers + 2 + (not facts.has_tied_embeddings)
    done, num_experts = 0, 0

    def step() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    def matrix(path: str, name: str) -> None:
        if path not in writer:
            writer.write(path, _stored(_row_slices(tensors[name].to(dtype), slices)))
        step()

    matrix(names.EMBEDDING, "model.embed_tokens.weight")
    for layer in range(facts.num_layers):
        if names.layer_path(layer) not in writer:
            parts, experts = layer_parts(bridge, tensors, layer, slices)
            if experts:  # before the layer's file: its record stands for both
                writer.write(names.experts_path(layer), _stored(experts))
            writer.write(names.layer_path(layer), _stored(parts))
            del parts, experts
        num_experts = max(num_experts, writer.num_sections(names.experts_path(layer)))
        step()
    if names.FINAL_NORM not in writer:
        weight = tensors["model.norm.weight"].to(dtype)
        writer.write(
            names.FINAL_NORM, _stored([(names.stored_name(names.COMMON, "weight"), weight)])
        )
    step()
    if not facts.has_tied_embeddings:
        matrix(names.HEAD, "lm_head.weight")
    return num_experts


def _row_slices(matrix_VE: torch.Tensor, slices: int) -> Parts:
    """Rows in order, the same number for each slice; zero rows end the last ones.  Views where no
    zeros are needed.
    """
    rows, width = -(-matrix_VE.shape[0] // slices), matrix_VE.shape[1]
    parts = [matrix_VE[i * rows : (i + 1) * rows] for i in range(slices)]
    padded = [
        part if len(part) == rows else torch.cat([part, part.new_zeros(rows - len(part), width)])
        for part in parts
    ]
    return [
        (names.stored_name(names.slice_section(i), "weight"), part) for i, part in enumerate(padded)
    ]


def _stored(parts: Parts) -> list[Tensor]:
    return [(name, _bits(tensor), safetensors_name(tensor.dtype)) for name, tensor in parts]


def _bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
