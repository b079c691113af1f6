"""What a family is made of: the facts of a model, and what several families have in common."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mtopd.planning import Architecture, ModelSizes

if TYPE_CHECKING:
    from transformers import PretrainedConfig


_MOST = 10_000  # layers, experts


@dataclass(frozen=True)
class ModelFacts:
    """Numbers of one model, under the same names for every family."""

    num_layers: int
    hidden_size: int
    ffn_size: int  # what one token goes through: its experts' rows and the shared ones'
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    value_head_dim: int  # differs from head_dim under latent attention
    vocab_size: int
    max_positions: int
    rope_theta: float
    has_tied_embeddings: bool
    is_latent_attention: bool = False  # MLA
    num_experts: int = 0  # routed ones of a layer that has experts
    experts_per_token: int = 0  # of them
    num_dense_layers: int = 0  # of a model with experts: its first layers, which have none
    num_further_heads: int = 0  # that predict further tokens (MTP)
    # FFN columns of a layer, 0 where no layer has such a part
    dense_ffn_size: int = 0
    expert_ffn_size: int = 0
    shared_ffn_size: int = 0
    # Attention weights of a layer: those that tp splits, and those that every tp rank holds
    split_attention_params: int = 0
    common_attention_params: int = 0

    @property
    def architecture(self) -> Architecture:
        """The numbers from which planning prices the model."""
        return Architecture(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            ffn_size=self.ffn_size,
            attention_size=self.num_attention_heads * self.value_head_dim,
            key_value_size=self.num_key_value_heads * self.value_head_dim,
            vocab_size=self.vocab_size,
        )

    @property
    def sizes(self) -> ModelSizes:
        """The numbers from which planning says what a rank holds."""
        return ModelSizes(
            num_layers=self.num_layers,
            num_dense_layers=self.num_dense_layers if self.num_experts else self.num_layers,
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            has_tied_embeddings=self.has_tied_embeddings,
            split_attention_params=self.split_attention_params,
            common_attention_params=self.common_attention_params,
            dense_ffn_size=self.dense_ffn_size,
            num_experts=self.num_experts,
            expert_ffn_size=self.expert_ffn_size,
            shared_ffn_size=self.shared_ffn_size,
            active_ffn_size=self.ffn_size,
            attention_size=self.num_attention_heads * self.value_head_dim,
            key_value_size=self.num_key_value_heads * self.value_head_dim,
            num_attention_heads=self.num_attention_heads,
        )

    @property
    def tp_counts(self) -> dict[str, int]:
        """What tensor parallelism divides, and how many there are: a size that works divides all."""
        heads = {"attention heads": self.num_attention_heads}
        if not self.is_latent_attention:
            heads = {"key-value heads": self.num_key_value_heads, **heads}
        ffn = {
            "columns in an FFN": self.dense_ffn_size,
            "columns in the shared experts": self.shared_ffn_size,
        }
        return heads | {what: count for what, count in ffn.items() if count}

    def num_experts_of(self, layer: int) -> int:
        """Routed experts of a layer, 0 in a dense one."""
        return self.num_experts if layer >= self.num_dense_layers else 0

    def check_numbers(self) -> None:
        """Raises ValueError unless sizes are sizes that go together: a config may say anything."""
        for name in ("hidden_size", "num_layers", "num_attention_heads", "num_key_value_heads",
                     "head_dim", "value_head_dim", "ffn_size", "vocab_size", "max_positions"):  # fmt: skip
            found = getattr(self, name)
            if type(found) is not int or not 1 <= found < 2**31:
                raise ValueError(f"{name} is {found!r}; it must be a whole number above 0")
        if self.num_layers > _MOST or self.num_experts > _MOST:
            raise ValueError(f"{self.num_layers} layers of {self.num_experts} experts are too many")
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"a token has {self.experts_per_token} of {self.num_experts} experts "
                "(num_experts_per_tok)"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} attention heads are no multiple of the "
                f"{self.num_key_value_heads} key-value heads"
            )
        if not (math.isfinite(self.rope_theta) and self.rope_theta > 0):
            raise ValueError(f"rope_theta is {self.rope_theta}; it must be a number above 0")

    def is_behind_last(self, name: str) -> bool:
        """Whether an HF tensor is of a layer behind the last: a head that predicts further tokens
        (MTP), or what a model that was made shallower left in its files.
        """
        match = re.match(r"model\.layers\.(\d+)\.", name)
        return match is not None and int(match[1]) >= self.num_layers

    def is_further_head(self, name: str) -> bool:
        """Whether an HF tensor is of a head that predicts further tokens (MTP): checkpoints keep
        them as layers behind the last.
        """
        match = re.match(r"model\.layers\.(\d+)\.", name)
        first = self.num_layers
        return match is not None and first <= int(match[1]) < first + self.num_further_heads


@dataclass(frozen=True)
class Family:
    """What is known of one HF ``model_type``.

    ``layer_names`` are Megatron's (local spec), relative to the layer, of its parameters and
    weight-carrying buffers less the experts, in the order in which a teacher store has them.
    """

    facts: Callable[[PretrainedConfig], ModelFacts]
    # TransformerConfig fields where mbridge says nothing, or something else than the checkpoint's
    # own code does.
    megatron_fields: Callable[[PretrainedConfig], dict[str, Any]]
    # Why a variant is refused, a line a reason: options that Megatron's layers do not have, or
    # compute differently.
    refusals: Callable[[PretrainedConfig], Iterator[str]]
    layer_names: Callable[[ModelFacts, int], list[str]]
    fp32_names: tuple[str, ...] = ()  # of layer_names: float32 whatever the model's dtype is
    further_heads: str | None = None  # the HF config's field that counts them


def dense_facts(hf_config: PretrainedConfig) -> ModelFacts:
    heads = hf_config.num_attention_heads
    head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads
    return ModelFacts(
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        ffn_size=hf_config.intermediate_size,
        num_attention_heads=heads,
        num_key_value_heads=hf_config.num_key_value_heads,
        head_dim=head_dim,
        value_head_dim=head_dim,
        vocab_size=hf_config.vocab_size,
        max_positions=hf_config.max_position_embeddings,
        rope_theta=float(hf_config.rope_parameters["rope_theta"]),  # transformers 5 keeps it there
        has_tied_embeddings=bool(hf_config.tie_word_embeddings),
        dense_ffn_size=hf_config.intermediate_size,
        split_attention_params=2
        * hf_config.hidden_size
        * head_dim
        * (heads + hf_config.num_key_value_heads),
    )


def common_fields(hf_config: PretrainedConfig, **more: Any) -> dict[str, Any]:
    """``more``: what a family adds to the fields that all have."""
    return {
        "moe_grouped_gemm": False,  # stores and layers name experts one by one
        "moe_shared_expert_overlap": False,
        "moe_token_dispatcher_type": "alltoall",
        "moe_aux_loss_coeff": 0.0,
        "moe_expert_capacity_factor": None,  # no token is dropped
        "moe_router_bias_update_rate": 0.0,
        **more,
    }


def common_refusals(
    hf_config: PretrainedConfig, *, rope_types: Sequence[str] = ("default",), **only: Any
) -> Iterator[str]:
    """``only``: the one value that is supported of a family's own HF options."""
    only = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, **only}
    if getattr(hf_config, "use_sliding_window", False):
        only["sliding_window"] = None
    for name, value in only.items():
        if (found := getattr(hf_config, name, value)) != value:
            yield (
                f"model_type {hf_config.model_type!r} with {name} {found!r} is not supported; only "
                f"{value!r} is"
            )
    rope = hf_config.rope_parameters
    if (share := rope.get("partial_rotary_factor")) not in (None, 1):
        yield (
            f"partial_rotary_factor {share!r} of model_type {hf_config.model_type!r} is not supported: "
            "transformers ignores it under the default rope and fails on it under yarn, so the file "
            "says another model than the one that answers; leave it out where all of a head turns"
        )
    kind = rope.get("rope_type", "default")
    if kind not in rope_types:
        yield f"rope_type {kind!r} of model_type {hf_config.model_type!r} is not supported"


def names_of_layer(
    facts: ModelFacts,
    layer: int,
    *,
    attention: Sequence[str] = ("linear_qkv.weight",),
    beside_experts: Sequence[str] = ("router.weight",),
) -> list[str]:
    dense = ("linear_fc1.weight", "linear_fc2.weight")
    return [
        "input_layernorm.weight",
        *(f"self_attention.{name}" for name in (*attention, "linear_proj.weight")),
        "pre_mlp_layernorm.weight",
        *(f"mlp.{name}" for name in (beside_experts if facts.num_experts_of(layer) else dense)),
    ]
