"""What a model family is: a table for each ``model_type``, and the facts that others ask of a model.

Nothing outside this package asks an HF config for a number, or compares a ``model_type``.  A family
is added here, in FAMILIES; nothing registers itself.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    "dropouts",
    "model_facts",
    "rope_less_theta",
    "rope_scaling",
    "without_further_heads",
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


def without_further_heads(hf_config: PretrainedConfig) -> dict[str, object]:
    """Fields of config.json of a checkpoint without heads that predict further tokens (MTP)."""
    field = FAMILIES[hf_config.model_type].further_heads
    return {field: 0} if field is not None and hasattr(hf_config, field) else {}


def dropouts(hf_config: PretrainedConfig) -> dict[str, float]:
    """What the checkpoint's config says of dropout in training, by its name there."""
    names = (name for name in vars(hf_config) if name.endswith("dropout"))
    return {name: value for name in names if (value := getattr(hf_config, name))}


def rope_less_theta(rope: Mapping[str, object]) -> dict[str, object]:
    """How positions are scaled, in whichever table of config.json it stands; the kind has a former
    spelling.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    others = {name: value for name, value in rope.items() if name not in ("rope_theta", "type")}
    return {**others, "rope_type": kind}


def rope_scaling(rope_parameters: Mapping[str, object]) -> dict[str, object]:
    """What transformers 4 calls ``rope_scaling``; empty where positions are not scaled."""
    scaling = {name: value for name, value in rope_parameters.items() if name != "rope_theta"}
    return scaling if scaling.get("rope_type", "default") != "default" else {}
