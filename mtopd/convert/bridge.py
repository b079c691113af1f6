"""HF <-> Megatron weight maps.  The only file that imports mbridge.

mbridge 0.15.1 was written against transformers 4 and Transformer Engine parameter names; the
adapters for transformers 5 and for Megatron's local layer spec stand here and nowhere else.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mtopd.config import ParallelConfig
from mtopd.families import FAMILIES, ModelFacts, check_variant
from mtopd.hf_checkpoint import HFTensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class _Transformers4Config:
    """An HF config as mbridge knows them: rope_theta at the top, no rope_scaling, a head_dim,
    ``in`` allowed.
    """

    rope_scaling = None

    def __init__(self, hf_config: PretrainedConfig, facts: ModelFacts) -> None:
        self._hf_config = hf_config
        self.rope_theta = facts.rope_theta
        self.head_dim = facts.head_dim

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hf_config, name)

    def __contains__(self, name: str) -> bool:
        return hasattr(self, name)


class _TransformerEngineNames:
    """A local-spec GPTModel seen under the Transformer Engine parameter names that mbridge's maps
    use.
    """

    def __init__(self, model: torch.nn.Module, bridge: Bridge) -> None:
        self._model = model
        self._bridge = bridge
        # Once: mbridge asks for all of it for every tensor that it loads.
        self._named = {
            self._te_name(name): tensor
            for name, tensor in model.state_dict().items()
            if isinstance(tensor, torch.Tensor)
        }

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._named

    def _te_name(self, name: str) -> str:
        # Parameters are named by their place in the chunk; the kind of a layer is known by its
        # place in the model.
        match = re.match(r"decoder\.layers\.(\d+)\.", name)
        layers: Any = self._model.decoder
        return self._bridge.te_name(
            name, layers.layers[int(match[1])].layer_number - 1 if match else None
        )


class _Reader:
    """What mbridge asks of a checkpoint folder, read by our rule of which files count."""

    def __init__(self, folder: Path) -> None:
        self._tensors = HFTensors(folder)

    def load_one_hf_weight(self, name: str) -> torch.Tensor:
        return self._tensors[name]


@dataclasses.dataclass(frozen=True)
class Tie:
    """A tensor of a whole Megatron model and the HF tensors that it is made of.

    ``split`` gives a tp rank's shard as its parts of the HF tensors, in the order of ``hf``: views
    whose elements, in their order, are those of the part.  The parts of tp ranks follow one another
    along ``tp_axis``; where that is None every tp rank has the whole.
    """

    megatron: str  # as Transformer Engine spells it
    hf: tuple[str, ...]
    split: Callable[[torch.Tensor], Sequence[torch.Tensor]]
    tp_axis: int | None
    is_expert: bool = False  # over the ranks of ep and expert tp
    rows: int | None = None  # of the HF tensor, where Megatron's has padding behind them


# Ends of local-spec names of what tp splits, and along which axis
_TP_AXIS = {
    "embedding.word_embeddings.weight": 0,
    "output_layer.weight": 0,
    "linear_qkv.weight": 0,
    "linear_qkv.bias": 0,
    "linear_q_up_proj.weight": 0,
    "linear_kv_up_proj.weight": 0,
    "linear_proj.weight": 1,
    "linear_fc1.weight": 0,
    "linear_fc2.weight": 1,
}


class Bridge:
    """Maps one HF architecture to a Megatron TransformerConfig, and weights: into Megatron with
    ``load``, out of it by ``ties``, which ``weight_stream`` gathers by.

    ``tp`` and ``ep`` are given for a model on its own mesh (a teacher), ``layout`` for one that is
    described before its process groups exist; without them Megatron's global state counts. Raises
    MtopdError for variants of the architecture that Megatron does not compute as transformers does.
    """

    def __init__(
        self,
        hf_config: PretrainedConfig,
        *,
        dtype: torch.dtype,
        padded_vocab_size: int,
        overrides: Mapping[str, Any] | None = None,
        tp: int | None = None,
        ep: int = 1,
        layout: ParallelConfig | None = None,
    ) -> None:
        from mbridge.core.bridge import _MODEL_REGISTRY
        from mbridge.core.parallel_states import ParallelStates

        check_variant(hf_config)
        self.family = FAMILIES[hf_config.model_type]
        self.facts = self.family.facts(hf_config)
        experts = self.facts.num_experts
        assert ep == 1 or (experts and experts % ep == 0), (ep, experts)
        bridge_class = _MODEL_REGISTRY[hf_config.model_type]
        known = {field.name for field in dataclasses.fields(bridge_class.TransformerConfigClass)}
        fields = {**self.family.megatron_fields(hf_config), **(overrides or {})}

        def build_base_config(bridge: Any, **values: Any) -> Any:
            # mbridge also passes fields that Megatron has renamed since.
            return bridge_class._build_base_config(
                bridge, **{k: v for k, v in {**values, **fields}.items() if k in known}
            )

        states = ParallelStates(tp_size=tp, ep_size=ep) if tp is not None else None
        if layout is not None:
            states = ParallelStates(
                tp_size=layout.tp,
                pp_size=layout.pp,
                vpp_size=layout.vpp if layout.vpp > 1 else None,
                cp_size=layout.cp,
                ep_size=layout.ep,
                etp_size=layout.expert_tp,
            )
        # The last of several pipeline stages has a copy of the tied embedding; of some families
        # mbridge does not know that.
        embedding = "model.embed_tokens.weight"
        tied = {"output_layer.weight": embedding} if self.facts.has_tied_embeddings else {}
        # A class of its own: mbridge writes the tied mapping into a class attribute, and a later
        # untied model of this process would inherit it.
        own_class = type(
            bridge_class.__name__,
            (bridge_class,),
            {
                "_DIRECT_MAPPING": {**bridge_class._DIRECT_MAPPING, **tied},
                "_build_base_config": build_base_config,
                "_get_safetensor_io": lambda _, folder: _Reader(Path(folder)),
            },
        )
        self._bridge = own_class(
            _Transformers4Config(hf_config, self.facts),
            dtype=dtype,
            parallel_states=states,
            make_vocab_size_divisible_by=1,
        )
        self._bridge.vocab_size, self._bridge.padded_vocab_size = (
            self.facts.vocab_size,
            padded_vocab_size,
        )
        self._as_stored = copy.copy(self._bridge)
        self._as_stored.dtype = None  # joins tensors without converting them

    @property
    def transformer_config(self) -> Any:
        return self._bridge.config

    def load(self, chunks: Sequence[torch.nn.Module], folder: Path) -> None:
        """Fill a Megatron model's chunks from an HF folder, a tensor at a time.  Collective over tp."""
        named = [_TransformerEngineNames(chunk, self) for chunk in chunks]
        with torch.no_grad():
            # Otherwise the first rank of a tp group would hold what all of them load.
            self._bridge.load_weights(named, str(folder), memory_efficient=True)

    # -- names -------------------------------------------------------------------------------------
    def ties(self, layer: int | None) -> list[Tie]:
        """What a layer's tensors are made of; None: those outside layers.  Heads that predict further
        tokens are no part of the trained model.
        """
        facts = self.facts
        if layer is None:
            head = [] if facts.has_tied_embeddings else ["output_layer.weight"]
            ends = ["embedding.word_embeddings.weight", "decoder.final_layernorm.weight", *head]
            return [self._tie(name) for name in ends]
        experts = [
            f"mlp.experts.local_experts.{expert}.{name}"
            for expert in range(facts.num_experts_of(layer))
            for name in ("linear_fc1.weight", "linear_fc2.weight")
        ]
        names = [*self.family.layer_names(facts, layer), *experts]
        return [self._tie(f"decoder.layers.{layer}.{name}") for name in names]

    def _tie(self, local_name: str) -> Tie:
        facts = self.facts
        group = facts.num_attention_heads // facts.num_key_value_heads
        heads = [group * facts.head_dim, facts.head_dim, facts.head_dim]  # rows of a query group

        def whole(shard: torch.Tensor) -> Sequence[torch.Tensor]:
            return [shard]

        def gate_and_up(shard: torch.Tensor) -> Sequence[torch.Tensor]:
            return shard.chunk(2)

        def query_key_value(shard: torch.Tensor) -> Sequence[torch.Tensor]:
            return shard.unflatten(0, (-1, sum(heads))).split(heads, dim=1)

        end = next((end for end in _TP_AXIS if local_name.endswith(end)), "")
        split = whole
        if end == "linear_fc1.weight":
            split = gate_and_up
        elif end.startswith("linear_qkv."):
            split = query_key_value
        has_padding = not local_name.startswith("decoder.")
        return Tie(
            megatron=self.te_name(local_name),
            hf=tuple(self.hf_names(local_name)),
            split=split,
            tp_axis=_TP_AXIS.get(end),
            is_expert=".local_experts." in local_name,
            rows=facts.vocab_size if has_padding else None,
        )

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
        if self.facts.is_latent_attention:
            name = re.sub(
                r"(q|kv)_layernorm\.weight$", r"linear_\1_up_proj.layer_norm_weight", name
            )
        elif name == "input_layernorm.weight":
            name = "self_attention.linear_qkv.layer_norm_weight"
        if name == "pre_mlp_layernorm.weight" and not self.facts.num_experts_of(layer):
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
