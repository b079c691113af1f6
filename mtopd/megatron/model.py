"""The student as a Megatron GPTModel whose last stage returns hidden states instead of logits."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.transformer_config import TransformerConfig

from mtopd.families import ModelFacts
from mtopd.megatron import without_te
from mtopd.megatron.parallel import Ranks
from mtopd.megatron.without_te import have_transformer_engine


class HiddenStateModel(GPTModel):
    """GPTModel whose last stage ends after the final norm.  The output layer stays allocated, tied
    and checkpointed.
    """

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states

    def output_weight(self) -> torch.Tensor:
        """[V / tp, D] rows of the output layer on the last stage, the embedding itself when tied
        there.
        """
        if self.share_embeddings_and_output_weights:
            # It returns the embedding of untied models, too: call it for tied ones only.
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def block_spec(config: TransformerConfig, vp_stage: int | None = None) -> Any:
    """Layer specs: Transformer Engine's where it is installed, Megatron's local ones where not."""
    if not have_transformer_engine():
        return without_te.local_block_spec(config, vp_stage)
    return get_gpt_decoder_block_spec(
        config, use_transformer_engine=True, normalization=config.normalization, vp_stage=vp_stage
    )


def build_chunks(
    config: TransformerConfig,
    facts: ModelFacts,
    ranks: Ranks,
    *,
    padded_vocab: int,
    freeze_router: bool = False,
) -> list[HiddenStateModel]:
    """This rank's model chunks, on its device, weights not yet loaded: one, or ``vpp`` under the
    interleaved schedule.
    """
    is_latent = config.multi_latent_attention
    assert config.sequence_parallel or not (
        config.tensor_model_parallel_size > 1 and (is_latent or config.num_moe_experts)
    ), "experts and latent attention are split over tp with sequence parallelism only"
    assert not (is_latent and config.context_parallel_size > 1), "latent attention has no cp"
    chunks = []
    for stage in range(ranks.vpp_size):
        vp_stage = stage if ranks.vpp_size > 1 else None
        chunk = HiddenStateModel(
            config=config,
            transformer_layer_spec=block_spec(config, vp_stage),
            vocab_size=padded_vocab,
            max_sequence_length=facts.max_positions,
            pre_process=parallel_state.is_pipeline_first_stage(
                ignore_virtual=False, vp_stage=vp_stage
            ),
            post_process=parallel_state.is_pipeline_last_stage(
                ignore_virtual=False, vp_stage=vp_stage
            ),
            share_embeddings_and_output_weights=facts.has_tied_embeddings,
            position_embedding_type="rope",
            rotary_base=facts.rope_theta,
            parallel_output=True,
            vp_stage=vp_stage,
        )
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(not (freeze_router and ".router." in name))
        if ranks.device.type == "cuda":
            chunk.cuda(ranks.device)
        chunks.append(chunk)
    return chunks
