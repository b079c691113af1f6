"""Reference log-probs of a checkpoint, by transformers' own modelling code: a path independent of
Megatron's.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mtopd.families import model_facts
from mtopd.hf_checkpoint import Tensors, fill, load_hf_config, stored_names
from mtopd.tokenizer_files import said
from mtopd.types import MtopdError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

NUM_TOKENS = 16
NUM_TARGETS = 4  # of each position: the most likely id, then drawn ones
UNIFORM = 1e-4  # nats: log-probs this close to -ln V say nothing


@torch.no_grad()
def transformers_probe(
    source: Path, tensors: Tensors, *, scale: float = 1.0, softcap: float | None = None
) -> dict[str, Any]:
    """Log-probs of a few next tokens under the checkpoint ``source``, in float32: what its Megatron
    form must give.

    ``{"by": "transformers", "input_ids": [T], "targets": [T][K], "log_probs": [T][K]}``; token ids
    are drawn below the tokenizer's vocab_size, and only those ids take part in the softmax.  Never
    more than one module (embedding, layer, norm, head) is in memory.  Raises MtopdError when a
    tensor is missing, misshapen or not finite in its effect, and when every token is predicted with
    probability 1/V: such a checkpoint is empty.
    """
    from mtopd.tokenizer import load_tokenizer, vocab_size

    hf_config = load_hf_config(source)
    known = min(vocab_size(load_tokenizer(source)), model_facts(hf_config).vocab_size)
    rng = np.random.default_rng(0)
    input_ids = rng.integers(known, size=NUM_TOKENS)
    model = _streamed_model(hf_config, tensors)
    try:
        output = model(torch.from_numpy(input_ids)[None], use_cache=False)
    except MtopdError:
        raise
    except Exception as error:  # of a config whose values do not go together
        raise MtopdError(
            f"{source}: transformers cannot run the model of this config.json ({said(error)}); "
            "export it again"
        ) from error
    logits = output.logits[0, :, :known] * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_probs = torch.log_softmax(logits, -1)
    if not log_probs.isfinite().all():
        raise MtopdError(
            f"{source}: its log-probs are not finite; the checkpoint is damaged, export it again"
        )
    if (log_probs + math.log(known)).abs().max() < UNIFORM:
        raise MtopdError(
            f"{source} predicts every token with probability 1/{known} (log-prob -ln V = "
            f"{-math.log(known):.3f}): its "
            "weights are empty; export the checkpoint again"
        )
    drawn = torch.from_numpy(rng.integers(known, size=(NUM_TOKENS, NUM_TARGETS - 1)))
    targets = torch.cat([log_probs.argmax(-1, keepdim=True), drawn], -1)
    return {
        "by": "transformers",
        "input_ids": input_ids.tolist(),
        "targets": targets.tolist(),
        "log_probs": log_probs.gather(-1, targets).tolist(),
    }


def _streamed_model(hf_config: PretrainedConfig, tensors: Tensors) -> PreTrainedModel:
    """The causal model, whose modules take their weights from ``tensors`` when called and drop them
    after.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            hf_config, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    base = model.base_model
    base.rotary_emb = type(base.rotary_emb)(hf_config)  # computed, not stored
    head = "model.embed_tokens" if hf_config.tie_word_embeddings else "lm_head"
    modules = {"model.embed_tokens": base.embed_tokens, "model.norm": base.norm}
    modules |= {f"model.layers.{i}": layer for i, layer in enumerate(base.layers)}
    for prefix, module in [*modules.items(), (head, model.lm_head)]:

        def load(module: torch.nn.Module, args: object, prefix: str = prefix) -> None:
            module.to_empty(device="cpu")
            for name, tensor in module.state_dict().items():
                fill(tensor, stored_names(model, f"{prefix}.{name}", tensor), tensors)

        def drop(module: torch.nn.Module, args: object, output: object) -> None:
            module.to("meta")

        module.register_forward_pre_hook(load)
        module.register_forward_hook(drop)
    return model
