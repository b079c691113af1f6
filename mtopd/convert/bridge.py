"""HF <-> Megatron weight maps.  The only file that imports mbridge.

mbridge 0.15.1 was written against transformers 4 and Transformer Engine parameter names; the adapters for
transformers 5 and for Megatron's local layer spec stand here and nowhere else.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mtopd.types import MtopdError

SUPPORTED_MODEL_TYPES = ("qwen3",)


def load_hf_config(folder: Path) -> Any:
    """The HF config of a checkpoint folder; never runs code from it.

    Raises MtopdError when the folder has no readable config.json or its architecture is not supported.
    """
    from transformers import AutoConfig

    path = folder / "config.json"
    if not path.is_file():
        raise MtopdError(f"{folder} is not an HF checkpoint: it has no config.json")
    try:
        model_type = json.loads(path.read_text()).get("model_type")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise MtopdError(f"{path} is not a valid HF config ({error})") from None
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise MtopdError(f"{path} has model_type {model_type!r}; supported are {', '.join(SUPPORTED_MODEL_TYPES)}")
    return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def hf_config_from_dict(values: Mapping[str, Any]) -> Any:
    """The HF config object of an architecture that a teacher store describes."""
    from transformers import AutoConfig

    values = dict(values)
    model_type = values.pop("model_type", None)
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise MtopdError(
            f"architecture has model_type {model_type!r}; supported are {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    return AutoConfig.for_model(model_type, **values)


def rope_theta(hf_config: Any) -> float:
    """Base of the rotary embedding; transformers 5 keeps it in rope_parameters.  Scaled ropes are refused."""
    parameters = hf_config.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind != "default":
        raise MtopdError(f"rope_type {kind!r} is not supported yet; only 'default' is")
    return float(parameters["rope_theta"])


class _TransformerEngineNames:
    """A local-spec GPTModel seen under the Transformer Engine parameter names that mbridge's maps use."""

    def __init__(self, model: torch.nn.Module, tensors: Iterable[tuple[str, torch.Tensor]] | None = None) -> None:
        self._model = model
        self._tensors = tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {te_name(k): v for k, v in self._model.state_dict().items() if isinstance(v, torch.Tensor)}

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        tensors = self._tensors if self._tensors is not None else self._model.named_parameters()
        return ((te_name(name), tensor) for name, tensor in tensors)


def te_name(local_name: str) -> str:
    """Local-spec parameter name -> Transformer Engine's, where the norms live inside the following linear layer."""
    name = re.sub(
        r"(layers\.\d+\.)input_layernorm\.weight", r"\1self_attention.linear_qkv.layer_norm_weight", local_name
    )
    return re.sub(r"(layers\.\d+\.)pre_mlp_layernorm\.weight", r"\1mlp.linear_fc1.layer_norm_weight", name)


class Bridge:
    """Maps one HF architecture to a Megatron TransformerConfig and weights both ways.

    ``parallel`` (sizes) is given for a model on its own mesh (a teacher); without it Megatron's global state counts.
    """

    def __init__(
        self,
        hf_config: Any,
        *,
        dtype: torch.dtype,
        padded_vocab_size: int,
        overrides: Mapping[str, Any] | None = None,
        tp: int | None = None,
    ) -> None:
        from mbridge.core.bridge import _MODEL_REGISTRY
        from mbridge.core.parallel_states import ParallelStates

        adapted = copy.deepcopy(hf_config)
        adapted.rope_theta = rope_theta(hf_config)
        bridge_class = _MODEL_REGISTRY[hf_config.model_type]
        # mbridge writes the tied mapping into a class attribute: a later untied model of this process would inherit it.
        own_class = type(
            bridge_class.__name__, (bridge_class,), {"_DIRECT_MAPPING": dict(bridge_class._DIRECT_MAPPING)}
        )
        self._bridge = own_class(
            adapted,
            dtype=dtype,
            parallel_states=ParallelStates(tp_size=tp) if tp is not None else None,
            make_vocab_size_divisible_by=1,
        )
        self._bridge.vocab_size, self._bridge.padded_vocab_size = hf_config.vocab_size, padded_vocab_size
        self._bridge.set_extra_args(**(overrides or {}))

    @property
    def transformer_config(self) -> Any:
        return self._bridge.config

    def load(self, model: torch.nn.Module, folder: Path) -> None:
        """Fill a Megatron model from an HF folder.  Collective over tp."""
        with torch.no_grad():
            self._bridge.load_weights([_TransformerEngineNames(model)], str(folder))

    def export(
        self, model: torch.nn.Module, tensors: Iterable[tuple[str, torch.Tensor]] | None = None
    ) -> dict[str, torch.Tensor]:
        """All HF tensors of a Megatron model, on every rank.  Collective over tp and pp.

        ``tensors`` (local-spec name, tensor with the parameter's tp attributes) replaces the parameters, e.g. by
        their gradients: the map is linear, so the gradient of an HF tensor comes out.
        """
        with torch.no_grad():
            pairs = self._bridge.export_weights([_TransformerEngineNames(model, tensors)])
            return {name: tensor.detach().clone() for name, tensor in pairs}

    def hf_names(self, local_name: str) -> list[str]:
        """HF tensors that make up one Megatron parameter of a whole (tp 1) model."""
        return list(self._bridge._weight_name_mapping_mcore_to_hf(te_name(local_name)))

    def to_megatron(self, local_name: str, hf_tensors: list[torch.Tensor]) -> torch.Tensor:
        """Join HF tensors into the Megatron parameter of a whole (tp 1) model."""
        return self._bridge._weight_to_mcore_format(te_name(local_name), hf_tensors)
