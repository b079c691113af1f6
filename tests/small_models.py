"""Small real models in HF format, with a real tokenizer: what the tests train, stream and compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

WORDS = ["abc", "hello", "table", "stone", "river", "cloud", "grass", "plant"]


def tokenizer_folder(folder: Path) -> Path:
    from mtopd.tokenizer import build_char_tokenizer

    build_char_tokenizer({"spell": [f"Spell this word backward: {w}" for w in WORDS]}, folder)
    return folder


def save_model(
    folder: Path, *, seed: int, hidden: int = 64, layers: int = 4, tied: bool = True, vocab: int | None = None
) -> Any:
    """A random Qwen3 whose logits are spread enough that two of them are more than 1 nat apart; returns the model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from mtopd.tokenizer import load_tokenizer, vocab_size

    tokenizer = load_tokenizer(tokenizer_folder(folder))
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=vocab or vocab_size(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(1.0 + 0.1 * noise)
            elif "embed" in name or "lm_head" in name:
                parameter.copy_(0.25 * noise)
            else:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    return model


def write_prompts(path: Path, count: int = 24, domains: tuple[str, ...] = ("a", "b")) -> Path:
    """JSONL prompts over the test tokenizer, routed by domain."""
    rows = [
        {
            "prompt": f"Spell this word backward: {WORDS[i % len(WORDS)]}{i}",
            "answer": WORDS[i % len(WORDS)][::-1],
            "domain": domains[i % len(domains)],
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
