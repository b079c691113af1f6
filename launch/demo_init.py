"""The demo's starting point: a tokenizer over its prompts and a random model, in one HF folder.

    python -m launch.demo_init FOLDER CONFIG SEED

There is no model hub in the demo: everything is trained from this folder.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch


def main(folder: Path, config_path: Path, seed: int) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from mtopd.char_tokenizer import build_char_tokenizer
    from mtopd.config_file import load_config
    from mtopd.config_specialist import SpecialistConfig
    from mtopd.data import load_source
    from mtopd.progress import quiet_libraries
    from mtopd.tokenizer import vocab_size

    quiet_libraries()
    config = load_config(config_path, [], SpecialistConfig)
    sources = [s.model_copy(update={"train_size": 400}) for s in config.data.sources]
    questions = {s.name: [row.question for row in load_source(s)[0].rows[:300]] for s in sources}
    partial = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer = build_char_tokenizer(questions, partial)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "qwen3",
            vocab_size=vocab_size(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        dtype=torch.float32,
    )
    scale_weights(model)
    model.save_pretrained(partial)
    partial.rename(folder)
    print(
        f"{folder}: {vocab_size(tokenizer)} tokens, {sum(p.numel() for p in model.parameters()):,} "
        "parameters"
    )


def scale_weights(model: torch.nn.Module) -> None:
    """A matrix with fan-in n at std 1/sqrt(n); what writes to the residual stream halved, for two
    layers.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                scale = 0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                parameter.normal_(std=scale * parameter.shape[1] ** -0.5)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
