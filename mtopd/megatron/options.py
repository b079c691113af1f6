"""Megatron's options by name: the one file that knows them.

The user's ``student.megatron`` table passes through to Megatron's own dataclasses, but for the
options that another key of the config sets.  A few more have to be known by name: those that a
later start may change (``FREE_MEGATRON``), those that make a train step depend on the layout
(``LAYOUT_DEPENDENT``), those that divide the layers among pipeline stages, and the defaults of a
run (``config_overrides``).  Importing this file imports neither Megatron nor torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import enum
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from mtopd.dtypes import torch_dtype
from mtopd.types import MtopdError

if TYPE_CHECKING:
    import torch

# What a run fixes by other keys, or by how it computes; the rest of Megatron's options passes
# through.
_SET_ELSEWHERE = {
    **{
        f"{name}_parallel_size": f"student.parallel.{key}"
        for name, key in (
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

# Where and when something is computed, and nothing of what: a later start may change these.
# * stands for any letters.  (A checkpoint itself demands that use_distributed_optimizer stays.)
FREE_MEGATRON = (
    # layout and split
    "sequence_parallel",
    "cp_comm_type",
    "hierarchical_context_parallel_sizes",
    "microbatch_group_size_per_vp_stage",
    "pipeline_model_parallel_*",
    "num_layers_in_*_pipeline_stage",
    "account_for_*_in_pipeline_split",
    # memory
    "recompute_*",
    "num_microbatches_with_partial_activation_checkpoints",
    "distribute_saved_activations",
    "cpu_offloading*",
    "fine_grained_activation_offloading",
    "offload_modules",
    "min_offloaded_tensor_size",
    "moe_layer_recompute",
    "deallocate_pipeline_outputs",
    "clone_scatter_output_in_embedding",
    "use_distributed_optimizer",
    "use_cpu_initialization",
    "perform_initialization",
    # communication
    "overlap_grad_reduce",
    "overlap_param_gather",
    "align_param_gather",
    "bucket_size",
    "pad_buckets_*",
    "nccl_ub",
    "overlap_p2p_comm*",
    "batch_p2p_*",
    "use_ring_exchange_p2p",
    "tp_comm_*",
    "symmetric_ar_type",
    "delay_wgrad_compute",
    "defer_embedding_wgrad_compute",
    "wgrad_deferral_limit",
    "overlap_moe_expert_parallel_comm",
    "ep_overlap_*",
    "moe_shared_expert_overlap",
    "moe_token_dispatcher_type",
    "moe_enable_deepep",
    "moe_deepep_*",
    "moe_flex_dispatcher_backend",
    "moe_hybridep_*",
    # checks and logs
    "check_for_*",
    "barrier_with_L1_time",
    "config_logger_dir",
)

# Options that make a train step depend on how tokens meet in batches, not the same numbers on
# another layout; with what each may be, the default first.  A kind of balancing that is a loss does
# nothing at moe_aux_loss_coeff 0.
LAYOUT_DEPENDENT: dict[str, tuple[object, ...]] = {
    "moe_aux_loss_coeff": (0.0,),
    "moe_z_loss_coeff": (None,),
    "moe_router_load_balancing_type": ("none", "aux_loss", "seq_aux_loss", "global_aux_loss"),
    "moe_router_force_load_balancing": (False,),
    "moe_input_jitter_eps": (None,),
    "moe_expert_capacity_factor": (None,),
    "moe_token_drop_policy": ("probs",),
    "moe_router_bias_update_rate": (0.0,),
}
_FIRST_STAGE, _LAST_STAGE = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
)
_UNEVEN_SPLIT = {_FIRST_STAGE, _LAST_STAGE, "pipeline_model_parallel_layout"}


def splits_unevenly(user: Mapping[str, object]) -> bool:
    """Whether the user says how many layers a pipeline stage has."""
    return bool(_UNEVEN_SPLIT & user.keys())


def split_options(layers: Sequence[int]) -> list[str]:
    """The options, as the command line takes them, that give pipeline stages these ``layers``."""
    first, *middle, last = layers
    options = [f"{_FIRST_STAGE}={first}", f"{_LAST_STAGE}={last}"]
    if len({first, *middle}) == 1:  # one option alone says it
        del options[0]
    elif len({*middle, last}) == 1:
        del options[1]
    return [f"student.megatron.{option}" for option in options]


def has_sequence_parallel(user: Mapping[str, object]) -> bool:
    return bool(user.get("sequence_parallel"))


@cache
def megatron_dataclasses() -> tuple[type[Any], ...]:
    """TransformerConfig, DistributedDataParallelConfig, OptimizerConfig; importing them takes
    seconds.
    """
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig, DistributedDataParallelConfig, OptimizerConfig


@dataclasses.dataclass(frozen=True)
class MegatronFields:
    """The user's verbatim ``student.megatron`` table, sorted by the Megatron dataclass that has the
    field.
    """

    transformer: Mapping[str, Any]
    ddp: Mapping[str, Any]
    optimizer: Mapping[str, Any]


def sort_fields(user: Mapping[str, object]) -> MegatronFields:
    """A field that two dataclasses have (``use_distributed_optimizer``) goes to both.

    Raises MtopdError for a field that no dataclass has or that another key sets.  Values are
    coerced to the field's type (YAML reads 2e-3 as a string).
    """
    tables: tuple[dict[str, object], ...] = ({}, {}, {})
    if not user:  # importing Megatron takes seconds
        return MegatronFields(*tables)
    known = [{f.name: f for f in dataclasses.fields(kind)} for kind in megatron_dataclasses()]
    for name, value in user.items():
        if name in _SET_ELSEWHERE:
            raise MtopdError(f"student.megatron.{name} is not set here; set {_SET_ELSEWHERE[name]}")
        if not any(name in fields for fields in known):
            matches = difflib.get_close_matches(name, [n for fields in known for n in fields], n=1)
            hint = f"; did you mean {matches[0]!r}?" if matches else ""
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
    the user's to resolve.
    """
    try:
        yield
    except MtopdError:  # says itself what is wrong
        raise
    except (ValueError, AssertionError) as error:
        raise MtopdError(f"Megatron refuses the options under student.megatron: {error}") from error


def _coerce(value: object, default: object, name: str) -> object:
    """YAML's string as what the field's default is: a number, a dtype, a member of an enumeration."""
    import torch

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
    device: torch.device, user: Mapping[str, object] | None = None, *, interleaved: bool = False
) -> dict[str, Any]:
    """TransformerConfig fields for this backend, then the user's
    (``sort_fields(...).transformer``).
    """
    from mtopd.megatron.without_te import have_transformer_engine

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
