"""Single Megatron layers on a teacher's own mesh, whose weights are bound to streamed buffers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from mtopd.megatron.model import block_spec

# Transformer Engine keeps a norm inside the linear layer after it; stores use the local spec's
# names.
_LOCAL_NAME = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


class TeacherLayers:
    """One TransformerLayer of each kind a teacher has (dense, mixture of experts), rotary embedding
    and final norm.

    Weights come with ``bind`` and ``bind_norm`` and go with ``release``; released, no module holds
    any.  Under expert parallelism ``forward_layer`` is collective: every rank of an ep group makes
    the same number of calls.
    """

    def __init__(
        self, config: TransformerConfig, collection: Any, rotary_base: float, device: torch.device
    ) -> None:
        # Beyond the query groups Megatron reads the global (student's) tensor-parallel rank: wrong
        # on this mesh.  The slices of a store divide them.
        is_latent = config.multi_latent_attention
        tp = config.tensor_model_parallel_size
        assert (config.num_attention_heads if is_latent else config.num_query_groups) % tp == 0
        assert not config.apply_query_key_layer_scaling, (
            "the number of a layer must not change its result"
        )
        config = copy.copy(config)
        config.perform_initialization = False  # all weights are bound
        spec = block_spec(config)
        with torch.device("meta"):  # no weight of a teacher is ever allocated here
            # Megatron uses one spec object for all layers of a kind.
            built = {
                id(layer): build_module(
                    layer, config=config, layer_number=1, pg_collection=collection
                )
                for layer in spec.layer_specs
            }
            self.norm = build_module(
                spec.layer_norm,
                config=config,
                hidden_size=config.hidden_size,
                eps=config.layernorm_epsilon,
            )
        self._kinds = [built[id(layer)] for layer in spec.layer_specs]  # by layer index
        self.layer = self._kinds[0]  # the layer last bound
        self._rope = None  # latent attention has rotary embeddings of its own
        if not config.multi_latent_attention:
            self._rope = RotaryEmbedding(
                kv_channels=config.kv_channels,
                rotary_percent=1.0,
                rotary_base=rotary_base,
                use_cpu_initialization=config.use_cpu_initialization,
                cp_group=collection.cp,
            ).to(device)
        self._modules = [*built.values(), self.norm]
        for module in self._modules:
            _replace_weights(module, device, config.params_dtype)
            module.to(device).eval().requires_grad_(False)

    def release(self) -> None:
        """Let go of all weights: only bound views hold any, and they would keep a streamed buffer
        alive.
        """
        for module in self._modules:
            _empty(module)

    def bind(self, layer_index: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Point the modules of a layer at ``weights``, by local-spec name; each weight is used
        exactly once.

        This rank's experts are ``mlp.experts.local_experts.<i>.linear_fc1.weight``, i from 0.  A
        weight in the teacher's dtype (float32 for a router's expert bias) is not copied.
        """
        layer = self._kinds[layer_index]
        if layer is not self.layer:
            _empty(self.layer)
            self.layer = layer
        tensors = {_LOCAL_NAME.get(name, name): tensor for name, tensor in _weights(self.layer)}
        assert tensors.keys() == weights.keys(), tensors.keys() ^ weights.keys()
        for name, tensor in tensors.items():
            tensor.data = weights[name].to(tensor.dtype)

    def bind_norm(self, weight_E: torch.Tensor) -> None:
        (parameter,) = self.norm.parameters()
        parameter.data = weight_E.to(parameter.dtype)

    def forward_layer(self, hidden_SBE: torch.Tensor) -> torch.Tensor:
        """[S, B, E] -> [S, B, E] through the layer last bound, causal, positions 0..S-1."""
        rotary = self._rope(hidden_SBE.shape[0]) if self._rope is not None else None
        output, _ = self.layer(hidden_SBE, attention_mask=None, rotary_pos_emb=rotary)
        return torch.as_tensor(output)

    def forward_norm(self, hidden_SBE: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.norm(hidden_SBE))


def _replace_weights(module: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Empty weights on ``device`` in place of those the module was built with.

    Parameters in the model's ``dtype``: torch's norms are built in float32 whatever it is.
    """
    for child in module.modules():
        for name, _ in list(child.named_parameters(recurse=False)):
            empty = torch.empty(0, dtype=dtype, device=device)
            setattr(child, name, torch.nn.Parameter(empty, requires_grad=False))
        for name, buffer in list(child.named_buffers(recurse=False)):
            if name not in child._non_persistent_buffers_set:
                setattr(child, name, torch.empty(0, dtype=buffer.dtype, device=device))


def _empty(module: torch.nn.Module) -> None:
    for _, tensor in _weights(module):
        tensor.data = tensor.data.new_empty(0)


def _weights(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and the buffers that carry weights, such as a router's expert bias."""
    yield from module.named_parameters()
    for prefix, child in module.named_modules():
        for name, buffer in child.named_buffers(prefix=prefix, recurse=False):
            if name.rpartition(".")[2] not in child._non_persistent_buffers_set:
                yield name, buffer
