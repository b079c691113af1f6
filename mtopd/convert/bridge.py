"""HF <-> Megatron weight maps.  The only file that imports mbridge.

mbridge 0.15.1 was written against transformers 4 and Transformer Engine parameter names; the
adapters for transformers 5 and for Megatron's local layer spec stand here and nowhere else.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mtopd.planning import Architecture
from mtopd.types import MtopdError


def rope_theta(hf_config: Any) -> float:
    """Base of the rotary embedding; transformers 5 keeps it in rope_parameters.

    Raises MtopdError for scaled ropes that Megatron does not compute as transformers does; yarn
    under latent attention is the one it does.
    """
    parameters = hf_config.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind != "default" and not (kind == "yarn" and hf_config.model_type == "deepseek_v3"):
        raise MtopdError(
            f"rope_type {kind!r} of model_type {hf_config.model_type!r} is not supported"
        )
    return float(parameters["rope_theta"])


def architecture(hf_config: Any) -> Architecture:
    """The numbers from which planning prices the model; of experts, those that one token goes
    through.
    """
    heads, head_dim = hf_config.num_attention_heads, getattr(hf_config, "head_dim", None)
    head_dim = getattr(hf_config, "v_head_dim", None) or head_dim or hf_config.hidden_size // heads
    ffn = hf_config.intermediate_size
    if experts := getattr(hf_config, "num_experts_per_tok", None):
        experts += getattr(hf_config, "n_shared_experts", 0)
        ffn = experts * getattr(hf_config, "moe_intermediate_size", ffn)
    return Architecture(
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        ffn_size=ffn,
        attention_size=heads * head_dim,
        key_value_size=hf_config.num_key_value_heads * head_dim,
        vocab_size=hf_config.vocab_size,
    )


def _refuse_variants(hf_config: Any) -> None:
    """Raise MtopdError for options of an architecture that Megatron's layers do not have, or
    compute differently.
    """
    wanted: dict[str, Any] = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    if getattr(hf_config, "use_sliding_window", hf_config.model_type == "mixtral"):
        wanted["sliding_window"] = None
    if hf_config.model_type == "qwen3_moe":
        wanted |= {"mlp_only_layers": [], "decoder_sparse_step": 1}
    if hf_config.model_type == "deepseek_v3":
        wanted |= {"rope_interleave": True, "norm_topk_prob": True, "rms_norm_eps": 1e-6}
        if hf_config.q_lora_rank is None:
            raise MtopdError(
                "q_lora_rank is None: latent attention without a compressed query is not supported"
            )
        if hf_config.num_experts_per_tok == 1:
            raise MtopdError(
                "num_experts_per_tok is 1: Megatron does not normalise the weight of a single "
                "expert"
            )
        if hf_config.n_group > 1 and hf_config.num_experts_per_tok // hf_config.topk_group != 2:
            raise MtopdError(
                f"{hf_config.num_experts_per_tok} experts of {hf_config.topk_group} groups a "
                "token: Megatron ranks "
                "groups as the checkpoint's code does only for two experts a group"
            )
    for name, value in wanted.items():
        if (found := getattr(hf_config, name, value)) != value:
            raise MtopdError(
                f"model_type {hf_config.model_type!r} with {name} {found!r} is not supported; only "
                f"{value!r} is"
            )


def _architecture_fields(hf_config: Any) -> dict[str, Any]:
    """TransformerConfig fields where mbridge says nothing, or something else than the checkpoint's
    own code does.
    """
    fields: dict[str, Any] = {
        "moe_grouped_gemm": False,  # stores and layers name experts one by one
        "moe_shared_expert_overlap": False,
        "moe_token_dispatcher_type": "alltoall",
        "moe_aux_loss_coeff": 0.0,
        "moe_expert_capacity_factor": None,  # no token is dropped
        "moe_router_bias_update_rate": 0.0,
    }
    if hf_config.model_type == "qwen3_moe":
        fields["moe_router_pre_softmax"] = not hf_config.norm_topk_prob
    elif hf_config.model_type == "mixtral":
        fields["moe_router_pre_softmax"] = False
    elif hf_config.model_type == "deepseek_v3":
        fields |= {
            "attention_backend": "auto",
            # what Megatron's own attention takes the width of a head from
            "kv_channels": hf_config.v_head_dim,
            # only the last hidden state of the decoder is asked of a teacher
            "mtp_num_layers": None,
            **_yarn_fields(hf_config.rope_parameters),
        }
        if hf_config.n_group > 1:
            fields |= {
                "moe_router_num_groups": hf_config.n_group,
                "moe_router_group_topk": hf_config.topk_group,
            }
    return fields


def _yarn_fields(rope: Mapping[str, Any]) -> dict[str, Any]:
    if rope.get("rope_type", "default") == "default":
        return {
            "rope_type": "rope",
            "rotary_scaling_factor": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        }
    scales = rope.get("mscale"), rope.get("mscale_all_dim")
    as_megatron = (
        bool(scales[0]) == bool(scales[1])
        and not rope.get("attention_factor")
        and rope.get("truncate", True)
    )
    if not (as_megatron and rope.get("factor")):
        raise MtopdError(
            "yarn needs a factor, both or none of mscale and mscale_all_dim, no attention_factor "
            "and truncate on; "
            f"found {dict(rope)}"
        )
    return {
        "rope_type": "yarn",
        "rotary_scaling_factor": float(rope["factor"]),
        "original_max_position_embeddings": int(rope["original_max_position_embeddings"]),
        "beta_fast": float(rope.get("beta_fast") or 32),
        "beta_slow": float(rope.get("beta_slow") or 1),
        "mscale": float(scales[0] or 1.0),
        "mscale_all_dim": float(scales[1] or 0.0),
    }


class _Transformers4Config:
    """An HF config as mbridge knows them: rope_theta at the top, no rope_scaling, a head_dim,
    ``in`` allowed.
    """

    rope_scaling = None

    def __init__(self, hf_config: Any) -> None:
        self._hf_config = hf_config
        self.rope_theta = rope_theta(hf_config)
        self.head_dim = (
            getattr(hf_config, "head_dim", None)
            or hf_config.hidden_size // hf_config.num_attention_heads
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hf_config, name)

    def __contains__(self, name: str) -> bool:
        return hasattr(self, name)


class _TransformerEngineNames:
    """A local-spec GPTModel seen under the Transformer Engine parameter names that mbridge's maps
    use.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        bridge: Bridge,
        tensors: Iterable[tuple[str, torch.Tensor]] | None = None,
    ) -> None:
        self._model = model
        self._bridge = bridge
        self._tensors = tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {
            self._te_name(k): v
            for k, v in self._model.state_dict().items()
            if isinstance(v, torch.Tensor)
        }

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        tensors = self._tensors if self._tensors is not None else self._model.named_parameters()
        return ((self._te_name(name), tensor) for name, tensor in tensors)

    def _te_name(self, name: str) -> str:
        # Parameters are named by their place in the chunk; the kind of a layer is known by its
        # place in the model.
        match = re.match(r"decoder\.layers\.(\d+)\.", name)
        layers: Any = self._model.decoder
        return self._bridge.te_name(
            name, layers.layers[int(match[1])].layer_number - 1 if match else None
        )


class Bridge:
    """Maps one HF architecture to a Megatron TransformerConfig and weights both ways.

    ``tp`` and ``ep`` are given for a model on its own mesh (a teacher); without them Megatron's
    global state counts. Raises MtopdError for variants of the architecture that Megatron does not
    compute as transformers does, and for an ``ep`` that does not divide the experts.
    """

    def __init__(
        self,
        hf_config: Any,
        *,
        dtype: torch.dtype,
        padded_vocab_size: int,
        overrides: Mapping[str, Any] | None = None,
        tp: int | None = None,
        ep: int = 1,
    ) -> None:
        from mbridge.core.bridge import _MODEL_REGISTRY
        from mbridge.core.parallel_states import ParallelStates
        from mbridge.core.safetensor_io import SafeTensorIO

        _refuse_variants(hf_config)
        bridge_class = _MODEL_REGISTRY[hf_config.model_type]
        known = {field.name for field in dataclasses.fields(bridge_class.TransformerConfigClass)}
        fields = {**_architecture_fields(hf_config), **(overrides or {})}

        def build_base_config(bridge: Any, **values: Any) -> Any:
            experts = values.get("num_moe_experts") or 0
            if ep > 1 and (not experts or experts % ep):
                raise MtopdError(
                    f"the teacher has {experts} experts, which cannot be split over ep {ep}; "
                    "set teachers[i].parallel.ep to a divisor, 1 for a dense teacher"
                )
            # mbridge also passes fields that Megatron has renamed since.
            return bridge_class._build_base_config(
                bridge, **{k: v for k, v in {**values, **fields}.items() if k in known}
            )

        # A class of its own: mbridge writes the tied mapping into a class attribute, and a later
        # untied model of this process would inherit it.
        own_class = type(
            bridge_class.__name__,
            (bridge_class,),
            {
                "_DIRECT_MAPPING": dict(bridge_class._DIRECT_MAPPING),
                "_build_base_config": build_base_config,
                # DeepSeek's own reader takes bfloat16 models only.
                "_get_safetensor_io": lambda _, folder: SafeTensorIO(folder),
            },
        )
        self._bridge = own_class(
            _Transformers4Config(hf_config),
            dtype=dtype,
            parallel_states=ParallelStates(tp_size=tp, ep_size=ep) if tp is not None else None,
            make_vocab_size_divisible_by=1,
        )
        self._bridge.vocab_size, self._bridge.padded_vocab_size = (
            hf_config.vocab_size,
            padded_vocab_size,
        )
        self._as_stored = copy.copy(self._bridge)
        self._as_stored.dtype = None  # joins tensors without converting them

    @property
    def transformer_config(self) -> Any:
        return self._bridge.config

    def load(self, chunks: Sequence[torch.nn.Module], folder: Path) -> None:
        """Fill a Megatron model's chunks from an HF folder.  Collective over tp."""
        with torch.no_grad():
            self._bridge.load_weights(
                [_TransformerEngineNames(chunk, self) for chunk in chunks], str(folder)
            )

    def export(
        self,
        chunks: Sequence[torch.nn.Module],
        tensors: Sequence[Iterable[tuple[str, torch.Tensor]] | None] | None = None,
    ) -> dict[str, torch.Tensor]:
        """All HF tensors of a Megatron model, on every rank.  Collective over tp and pp.

        ``tensors`` (local-spec name, tensor with the parameter's tp attributes) replaces the
        parameters, e.g. by their gradients: the map is linear, so the gradient of an HF tensor
        comes out.
        """
        with torch.no_grad():
            views = [
                _TransformerEngineNames(chunk, self, given)
                for chunk, given in zip(chunks, tensors or [None] * len(chunks), strict=True)
            ]
            pairs = self._bridge.export_weights(views)
            return {name: tensor.detach().clone() for name, tensor in pairs}

    # -- names -------------------------------------------------------------------------------------
    def num_experts(self, layer: int) -> int:
        """Routed experts of a layer, 0 in a dense one."""
        config = self.transformer_config
        pattern = config.moe_layer_freq
        is_moe = pattern[layer] if isinstance(pattern, list) else layer % pattern == 0
        return config.num_moe_experts if config.num_moe_experts and is_moe else 0

    def layer_parameters(self, layer: int) -> list[str]:
        """Local-spec names, relative to the layer, of its parameters and weight-carrying buffers
        less the experts.
        """
        config = self.transformer_config
        if config.multi_latent_attention:
            attention = ["q_layernorm.weight", "kv_layernorm.weight"]
            attention += [f"linear_{n}_proj.weight" for n in ("q_down", "kv_down", "q_up", "kv_up")]
        else:
            attention = ["q_layernorm.weight", "k_layernorm.weight"] if config.qk_layernorm else []
            attention += [
                "linear_qkv.weight",
                *(["linear_qkv.bias"] if config.add_qkv_bias else []),
            ]
        if self.num_experts(layer):
            mlp = [
                "router.weight",
                *(["router.expert_bias"] if config.moe_router_enable_expert_bias else []),
            ]
            if config.moe_shared_expert_intermediate_size:
                mlp += ["shared_experts.linear_fc1.weight", "shared_experts.linear_fc2.weight"]
        else:
            mlp = ["linear_fc1.weight", "linear_fc2.weight"]
        return [
            "input_layernorm.weight",
            *(f"self_attention.{n}" for n in [*attention, "linear_proj.weight"]),
            "pre_mlp_layernorm.weight",
            *(f"mlp.{n}" for n in mlp),
        ]

    def te_name(self, local_name: str, layer: int | None = None) -> str:
        """Local-spec parameter name -> Transformer Engine's, where most norms live in the linear
        layer after them.

        ``layer`` is the layer's number in the whole model where the name counts from a pipeline
        stage's first.
        """
        match = re.fullmatch(r"(decoder\.layers\.(\d+)\.)(.*)", local_name)
        if match is None:
            return local_name
        prefix, layer, name = match[1], int(match[2]) if layer is None else layer, match[3]
        name = re.sub(
            r"^mlp\.experts\.local_experts\.(\d+)\.(linear_fc\d)\.weight$",
            r"mlp.experts.\2.weight\1",
            name,
        )
        if self.transformer_config.multi_latent_attention:
            name = re.sub(
                r"(q|kv)_layernorm\.weight$", r"linear_\1_up_proj.layer_norm_weight", name
            )
        elif name == "input_layernorm.weight":
            name = "self_attention.linear_qkv.layer_norm_weight"
        if name == "pre_mlp_layernorm.weight" and not self.num_experts(layer):
            name = "mlp.linear_fc1.layer_norm_weight"
        return prefix + name

    def hf_names(self, local_name: str) -> list[str]:
        """HF tensors that make up one Megatron parameter of a whole (tp 1, ep 1) model."""
        return list(self._bridge._weight_name_mapping_mcore_to_hf(self.te_name(local_name)))

    def to_megatron(self, local_name: str, hf_tensors: list[torch.Tensor]) -> torch.Tensor:
        """Join HF tensors into the Megatron parameter of a whole (tp 1, ep 1) model, in the dtype
        they have.
        """
        return self._as_stored._weight_to_mcore_format(self.te_name(local_name), hf_tensors)
