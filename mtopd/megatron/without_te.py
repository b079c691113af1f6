"""What Transformer Engine would bring, for machines without it, with a GPU or not: norm, attention,
and repairs of Megatron code that assumes Transformer Engine is installed.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from mtopd.megatron.context_parallel import zigzag_chunks
from mtopd.types import MtopdError


@functools.cache
def have_transformer_engine() -> bool:
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        return False
    return True


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, whose weight says when its gradient is a part: under sequence parallelism
    each tp rank has some of the positions, and Megatron sums the gradients of weights that say so.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object
    ) -> None:
        super().__init__(hidden_size, eps=eps)
        weight: Any = self.weight
        weight.sequence_parallel = config.sequence_parallel


class CausalAttention(MegatronModule):
    """Causal attention by torch's scaled_dot_product_attention: grouped queries, latent attention
    (values narrower than keys), context parallelism, packed samples.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        if config.window_size is not None or config.softmax_type != "vanilla":
            raise MtopdError(
                "window_size and softmax_type need Transformer Engine, which is not installed"
            )
        assert attention_type == "self" and attn_mask_type.name == "causal", (
            attention_type,
            attn_mask_type,
        )
        self._softmax_scale = softmax_scale
        self._dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self._cp_group = (
            getattr(pg_collection, "cp", None) or parallel_state.get_context_parallel_group()
        )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """[S, B, heads, width] each -> [S, B, heads x value width]; packed [T, heads, width] -> [T,
        heads x ...].

        Under context parallelism the rows are this rank's two ranges of the zigzag,
        ``zigzag_chunks``.
        """
        assert attention_mask is None and attention_bias is None, "causal attention alone"
        if packed_seq_params is None:
            return self._attend(query, key, value).flatten(2)
        # Sample by sample: a block-diagonal mask would cost the square of the whole pack.
        ends = packed_seq_params.cu_seqlens_q.tolist()
        samples = [
            self._attend(*(x[start:stop].unsqueeze(1) for x in (query, key, value)))
            for start, stop in itertools.pairwise(ends)
        ]
        return torch.cat(samples).flatten(1)

    def _attend(
        self, query_SBHC: torch.Tensor, key_SBGC: torch.Tensor, value_SBGC: torch.Tensor
    ) -> torch.Tensor:
        """[S, B, H, width of a value]"""
        mask = None
        cp_size = self._cp_group.size()
        if cp_size > 1:
            # Backward is a reduce-scatter: every rank's queries add to the gradient of every key.
            key_SBGC, value_SBGC = (
                gather_from_sequence_parallel_region(
                    x.contiguous(), tensor_parallel_output_grad=True, group=self._cp_group
                )
                for x in (key_SBGC, value_SBGC)
            )
            position_S = torch.arange(len(key_SBGC), device=query_SBHC.device)
            # Keys come by rank, not by position: the mask compares the positions of both.
            position_by_rank = [
                torch.cat(
                    [position_S[chunk] for chunk in zigzag_chunks(len(position_S), rank, cp_size)]
                )
                for rank in range(cp_size)
            ]
            local_position = position_by_rank[self._cp_group.rank()]
            mask = local_position[:, None] >= torch.cat(position_by_rank)[None, :]
        # Heads are split over tp: the tracked generator gives each tp rank a dropout of its own.
        dropout = self._dropout if self.training else 0.0
        with tensor_parallel.get_cuda_rng_tracker().fork() if dropout else contextlib.nullcontext():
            output_BHSC = F.scaled_dot_product_attention(
                query_SBHC.permute(1, 2, 0, 3),
                key_SBGC.permute(1, 2, 0, 3),
                value_SBGC.permute(1, 2, 0, 3),
                attn_mask=mask,
                is_causal=mask is None,
                dropout_p=dropout,
                scale=self._softmax_scale,
                enable_gqa=query_SBHC.shape[2] != key_SBGC.shape[2],
            )
        return output_BHSC.permute(2, 0, 1, 3)


def local_block_spec(
    config: TransformerConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Megatron's local layer specs with the modules above."""
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=config.normalization, vp_stage=vp_stage
    )
    spec.layer_norm = RMSNorm
    for layer in spec.layer_specs:
        attention = layer.submodules.self_attention.submodules
        for part in (layer.submodules, attention):
            for name in (
                "input_layernorm",
                "pre_mlp_layernorm",
                "q_layernorm",
                "k_layernorm",
                "kv_layernorm",
            ):
                # Megatron's own wrapper refuses sequence parallelism; IdentityOp stays.
                if getattr(getattr(part, name, None), "__name__", "") == "WrappedTorchNorm":
                    setattr(part, name, RMSNorm)
        attention.core_attention = CausalAttention
        if config.multi_latent_attention:
            # The local spec splits the down-projections over tp and gathers their output over the
            # global group: wrong on a teacher's mesh.  Replicated, as Transformer Engine has them,
            # nothing is gathered.
            attention.linear_q_down_proj = attention.linear_kv_down_proj = Linear
    return spec


def install() -> None:
    """Repair Megatron code that uses Transformer Engine without looking whether it is installed.  Once
    per process; does nothing when it is.
    """
    if have_transformer_engine():
        return
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        utils: Any = moe_utils
        # The router in float32 compares the name with None, and it exists only with the import.
        utils.te_general_gemm = None
    attention: Any = multi_latent_attention
    # Without it TELinear is a stand-in that isinstance() refuses; HAVE_TE is asked first.
    attention.HAVE_TE = isinstance(attention.TELinear, type)

    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    restore = DistributedOptimizer._set_main_param_and_optimizer_states
    describe = DistributedOptimizer.state_dict
    # Installed before: a second wrapper around the first would hide the step from it.
    if getattr(restore, "keeps_step", False):
        return

    def restore_but_step(
        self: DistributedOptimizer,
        model_param: torch.nn.Parameter,
        tensors: dict[str, torch.Tensor],
    ) -> None:
        """torch's AdamW counts steps in a tensor of each parameter: checkpoints do not hold it, and
        loading has given all parameters one and the same, which would then count once for each of
        them.
        """
        group, place = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][place]]
        step = state.pop("step", None)
        restore(self, model_param, tensors)
        if step is not None:
            state["step"] = step.clone()

    def describe_if_empty(self: DistributedOptimizer) -> dict[str, object]:
        """An optimizer of experts has no parameter, and so no step, on a pipeline stage of dense
        layers: it has one while its state is read.
        """
        state = self.optimizer.state
        if state:
            return describe(self)
        state["nothing"] = {"step": torch.zeros(())}
        try:
            return describe(self)
        finally:
            del state["nothing"]

    restore_but_step.keeps_step = True  # type: ignore[attr-defined]
    DistributedOptimizer._set_main_param_and_optimizer_states = restore_but_step
    DistributedOptimizer.state_dict = describe_if_empty
