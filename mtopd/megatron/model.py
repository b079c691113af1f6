"""The student as a Megatron GPTModel whose last stage returns hidden states instead of logits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_config import TransformerConfig

from mtopd.megatron.parallel import Ranks
from mtopd.types import MtopdError


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Rows of the embedding in Megatron: a multiple of 128, and of 8 on every tp rank.

    Megatron's own rule, 128 on every rank, would leave whole ranks of a small vocabulary with nothing but padding.
    """
    multiple = math.lcm(128, 8 * tp)
    return -(-vocab_size // multiple) * multiple


def have_transformer_engine() -> bool:
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        return False
    return True


def config_overrides(device: torch.device, user: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """TransformerConfig fields for this backend, then the user's verbatim ``megatron`` table.

    Raises MtopdError for a field Megatron does not have.  Values are coerced to the field's type (YAML reads 2e-3
    as a string).
    """
    fields: dict[str, Any] = {
        "calculate_per_token_loss": True,  # gradients are sums: 1/N is in the token weights, see planning
        "sequence_parallel": False,
        "variable_seq_lengths": False,  # a train step has one sequence length for all its micro-batches
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "batch_p2p_comm": True,
        "overlap_p2p_comm": False,
        # True frees a tensor that gloo may still be sending: silently wrong numbers under interleaved schedules.
        "deallocate_pipeline_outputs": device.type == "cuda",
        "use_cpu_initialization": device.type == "cpu",
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": device.type == "cuda" and have_transformer_engine(),
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
    }
    fields.update(coerce_fields(TransformerConfig, user or {}, "student.megatron"))
    return fields


def coerce_fields(kind: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check names against a Megatron dataclass and turn YAML's strings into the field's number or bool."""
    import difflib

    known = {f.name: f for f in dataclasses.fields(kind)}
    result: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise MtopdError(f"{where}.{name} is not a field of Megatron's {kind.__name__}{hint}")
        default = known[name].default
        if isinstance(value, str) and isinstance(default, int | float) and not isinstance(default, bool):
            try:
                value = type(default)(float(value)) if isinstance(default, int) else float(value)
            except ValueError:
                raise MtopdError(f"{where}.{name} needs a number, found {value!r}") from None
        result[name] = value
    return result


class HiddenStateModel(GPTModel):
    """GPTModel whose last stage ends after the final norm.  The output layer stays allocated, tied and checkpointed."""

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states

    def output_weight(self) -> torch.Tensor:
        """[V / tp, D] rows of the output layer on the last stage, the embedding itself when tied there."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()  # gives the embedding even when untied: ask only when tied
        return self.output_layer.weight


class LatentDotProductAttention(DotProductAttention):
    """Megatron's own attention where keys are wider than values; ``config.kv_channels`` is the width of a value."""

    def __init__(self, *args: Any, k_channels: int | None = None, v_channels: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Megatron builds it twice, first without the widths.
        assert v_channels in (None, self.config.kv_channels), (v_channels, self.config.kv_channels)


def block_spec(config: TransformerConfig) -> Any:
    """Layer specs: Transformer Engine's where it is installed, Megatron's local ones where not."""
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=have_transformer_engine(), normalization=config.normalization
    )
    if config.multi_latent_attention and not have_transformer_engine():
        # The local spec splits the down-projections over tp and gathers their output over the global group: wrong on
        # a teacher's mesh.  Replicated, as Transformer Engine has them, nothing is gathered.
        for layer in spec.layer_specs:
            attention = layer.submodules.self_attention.submodules
            attention.linear_q_down_proj = attention.linear_kv_down_proj = Linear
            attention.core_attention = LatentDotProductAttention
    return spec


def build_model(
    config: TransformerConfig, hf_config: Any, ranks: Ranks, *, rotary_base: float, padded_vocab: int
) -> HiddenStateModel:
    """This rank's stage of the student, on its device, weights not yet loaded."""
    model = HiddenStateModel(
        config=config,
        transformer_layer_spec=block_spec(config),
        vocab_size=padded_vocab,
        max_sequence_length=hf_config.max_position_embeddings,
        pre_process=ranks.pp_rank == 0,
        post_process=ranks.is_last_stage,
        share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=rotary_base,
        parallel_output=True,
    )
    if ranks.device.type == "cuda":
        model.cuda(ranks.device)
    return model
