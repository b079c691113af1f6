"""Single Megatron layers on a teacher's own mesh, whose parameters are bound to streamed buffers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from mtopd.megatron.model import block_spec
from mtopd.types import MtopdError

# Transformer Engine keeps a norm inside the linear layer after it; stores use the local spec's names.
_LOCAL_NAME = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


class TeacherLayers:
    """One TransformerLayer, rotary embedding and final norm of a teacher; weights come and go through ``bind``."""

    def __init__(self, config: TransformerConfig, collection: Any, rotary_base: float, device: torch.device) -> None:
        if config.tensor_model_parallel_size > config.num_query_groups:
            # Megatron's path for this case reads the global (student's) tensor-parallel rank: wrong on another mesh.
            raise MtopdError(
                f"teacher tp {config.tensor_model_parallel_size} exceeds its {config.num_query_groups} query groups; "
                "set teacher_offload.tp to at most that"
            )
        spec = block_spec(config)
        self.layer = build_module(spec.layer_specs[0], config=config, layer_number=1, pg_collection=collection)
        self.norm = build_module(
            spec.layer_norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
        )
        self.rope = RotaryEmbedding(
            kv_channels=config.kv_channels,
            rotary_percent=1.0,
            rotary_base=rotary_base,
            use_cpu_initialization=config.use_cpu_initialization,
            cp_group=collection.cp,
        )
        for module in (self.layer, self.norm, self.rope):
            module.to(device).eval().requires_grad_(False)
        self.release()

    def release(self) -> None:
        """Let go of all weights: only bound views hold any, and they would keep a streamed buffer alive."""
        for parameter in (*self.layer.parameters(), *self.norm.parameters()):
            parameter.data = parameter.data.new_empty(0)

    def bind(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Point the layer's parameters at ``weights``; every parameter and every weight is used exactly once."""
        parameters = {_LOCAL_NAME.get(n, n): p for n, p in self.layer.named_parameters()}
        assert parameters.keys() == weights.keys(), parameters.keys() ^ weights.keys()
        for name, parameter in parameters.items():
            parameter.data = weights[name]

    def bind_norm(self, weight_E: torch.Tensor) -> None:
        (parameter,) = self.norm.parameters()
        parameter.data = weight_E

    def forward_layer(self, hidden_SBE: torch.Tensor) -> torch.Tensor:
        """[S, B, E] -> [S, B, E] through the bound layer, causal, positions 0..S-1."""
        output, _ = self.layer(hidden_SBE, attention_mask=None, rotary_pos_emb=self.rope(hidden_SBE.shape[0]))
        return torch.as_tensor(output)

    def forward_norm(self, hidden_SBE: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.norm(hidden_SBE))
