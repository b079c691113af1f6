"""What a model family is: a table for each ``model_type``, and the facts that others ask of a model.

Nothing outside this package asks an HF config for a number, or compares a ``model_type``.  A family
is added here, in FAMILIES; nothing registers itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mtopd.families.base import Family, ModelFacts
from mtopd.families.deepseek import DEEPSEEK_V3
from mtopd.families.gqa import LLAMA, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE
from mtopd.types import MtopdError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "FAMILIES",
    "Family",
    "ModelFacts",
    "check_variant",
    "drop_further_heads",
    "model_facts",
]

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "mixtral": MIXTRAL,
    "deepseek_v3": DEEPSEEK_V3,
}


def model_facts(hf_config: PretrainedConfig) -> ModelFacts:
    return FAMILIES[hf_config.model_type].facts(hf_config)


def check_variant(hf_config: PretrainedConfig, where: str = "") -> None:
    """Raises MtopdError for options of a family that Megatron's layers do not have, or compute
    differently.  ``where``: the file that holds the config.
    """
    for reason in FAMILIES[hf_config.model_type].refusals(hf_config):
        raise MtopdError(f"{where}: {reason}" if where else reason)


def drop_further_heads(hf_config: PretrainedConfig) -> None:
    """Make ``hf_config`` that of a checkpoint without heads that predict further tokens (MTP)."""
    field = FAMILIES[hf_config.model_type].further_heads
    if field is not None and hasattr(hf_config, field):
        setattr(hf_config, field, 0)
