"""The student as a Megatron GPTModel whose last stage returns hidden states instead of logits."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import enum
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from mtopd.dtypes import torch_dtype
from mtopd.families import ModelFacts
from mtopd.megatron import without_te
from mtopd.megatron.parallel import Ranks
from mtopd.megatron.without_te import have_transformer_engine
from mtopd.types import MtopdError


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Rows of the embedding in Megatron: a multiple of 128, and of 8 on every tp rank.

    Megatron's own rule, 128 on every rank, would leave whole ranks of a small vocabulary with
    nothing but padding.
    """
    multiple = math.lcm(128, 8 * tp)
    return -(-vocab_size // multiple) * multiple


# What a run fixes by other keys, or by how it computes; the rest of Megatron's options passes
# through.
_OURS = {
    **{
        f"{name}_parallel_size": f"student.parallel.{ours}"
        for name, ours in (
            ("tensor_model", "tp"),
            ("pipeline_model", "pp"),
            ("virtual_pipeline_model", "vpp"),
            ("context", "cp"),
            ("expert_model", "ep"),
            ("expert_tensor", "etp"),
        )
    },
    **dict.fromkeys(("params_dtype", "pipeline_dtype", "bf16", "fp16"), "student.dtype"),
    **{
        name: f"train.optimizer.{name}"
        for name in ("lr", "min_lr", "weight_decay", "adam_beta1", "adam_beta2")
    },
    "clip_grad": "train.optimizer.clip_grad",
    **dict.fromkeys(
        (
            "calculate_per_token_loss",
            "variable_seq_lengths",
            "grad_reduce_in_fp32",
            "average_in_collective",
        ),
        "nothing: 1/N is in the token weights, summed in float32",
    ),
    **dict.fromkeys(
        ("use_megatron_fsdp", "use_custom_fsdp", "use_torch_fsdp2"),
        "use_distributed_optimizer instead",
    ),
}

KINDS = (TransformerConfig, DistributedDataParallelConfig, OptimizerConfig)


@dataclasses.dataclass(frozen=True)
class MegatronFields:
    """The user's verbatim ``student.megatron`` table, sorted by the Megatron dataclass that has the
    field.
    """

    transformer: Mapping[str, Any]
    ddp: Mapping[str, Any]
    optimizer: Mapping[str, Any]


def sort_fields(user: Mapping[str, Any]) -> MegatronFields:
    """A field that two dataclasses have (``use_distributed_optimizer``) goes to both.

    Raises MtopdError for a field that no dataclass has or that another key sets.  Values are
    coerced to the field's type (YAML reads 2e-3 as a string).
    """
    known = [{f.name: f for f in dataclasses.fields(kind)} for kind in KINDS]
    tables: tuple[dict[str, Any], ...] = ({}, {}, {})
    for name, value in user.items():
        if name in _OURS:
            raise MtopdError(f"student.megatron.{name} is not set here; set {_OURS[name]}")
        if not any(name in fields for fields in known):
            near = difflib.get_close_matches(name, [n for fields in known for n in fields], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise MtopdError(
                f"student.megatron.{name} is not a field of Megatron's TransformerConfig, "
                f"DistributedDataParallelConfig or OptimizerConfig{hint}"
            )
        for table, fields in zip(tables, known, strict=True):
            if name in fields:
                table[name] = _coerce(value, fields[name].default, name)
    return MegatronFields(*tables)


@contextlib.contextmanager
def megatron_refuses() -> Iterator[None]:
    """Megatron checks how its options go together when it builds its configs: a refusal there is
    the user's to mend.
    """
    try:
        yield
    except (ValueError, AssertionError) as error:
        raise MtopdError(f"Megatron refuses the options under student.megatron: {error}") from error


def _coerce(value: Any, default: Any, name: str) -> Any:
    """YAML's string as what the field's default is: a number, a dtype, a member of an enumeration."""
    if not isinstance(value, str):
        return value
    needed = "a number"
    try:
        if isinstance(default, enum.Enum):
            needed = f"one of {', '.join(type(default).__members__)}"
            return type(default)[value]
        if isinstance(default, torch.dtype):
            needed = "a dtype such as float32 or bfloat16"
            return torch_dtype(value)
        if isinstance(default, bool):
            needed = "true or false"
            return {"true": True, "false": False}[value.lower()]
        if isinstance(default, int):
            return int(float(value))
        return float(value) if isinstance(default, float) else value
    except (ValueError, KeyError):
        raise MtopdError(f"student.megatron.{name} needs {needed}, found {value!r}") from None


def config_overrides(
    device: torch.device, user: Mapping[str, Any] | None = None, *, interleaved: bool = False
) -> dict[str, Any]:
    """TransformerConfig fields for this backend, then the user's
    (``sort_fields(...).transformer``).
    """
    return {
        # gradients are sums: 1/N is in the token weights, see planning
        "calculate_per_token_loss": True,
        "sequence_parallel": False,
        # a train step has one sequence length for all its micro-batches
        "variable_seq_lengths": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # Between the same two ranks an interleaved schedule's batched sends and receives are paired
        # by their order, which mixes activations with gradients.
        "batch_p2p_comm": not interleaved,
        "overlap_p2p_comm": interleaved,
        # True frees a tensor that gloo may still be sending: silently wrong numbers under
        # interleaved schedules.
        "deallocate_pipeline_outputs": device.type == "cuda",
        "use_cpu_initialization": device.type == "cpu",
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": device.type == "cuda" and have_transformer_engine(),
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
        **(user or {}),
    }


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
            return (
                self.shared_embedding_or_output_weight()
            )  # gives the embedding even when untied: ask only when tied
        return self.output_layer.weight


def block_spec(config: TransformerConfig, vp_stage: int | None = None) -> Any:
    """Layer specs: Transformer Engine's where it is installed, Megatron's local ones where not."""
    if not have_transformer_engine():
        return without_te.block_spec(config, vp_stage)
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

    Raises MtopdError for a layout that this architecture is not trained on.
    """
    _check_axes(config)
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


def _check_axes(config: TransformerConfig) -> None:
    tp, cp, latent = (
        config.tensor_model_parallel_size,
        config.context_parallel_size,
        config.multi_latent_attention,
    )
    if tp > 1 and (latent or config.num_moe_experts) and not config.sequence_parallel:
        # Megatron sums the replicated projections' gradients, and trains experts, only with it.
        raise MtopdError(
            f"tp {tp} with {'latent attention' if latent else 'experts'} needs sequence "
            "parallelism: set "
            "student.megatron.sequence_parallel=true"
        )
    if cp > 1 and latent:
        raise MtopdError(
            f"cp {cp} with latent attention is not supported; set student.parallel.cp=1"
        )
