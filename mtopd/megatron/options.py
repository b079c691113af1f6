"""Megatron's options by name: the one file that knows them.

The user's ``student.megatron`` table passes through to Megatron's own dataclasses, but every
option is known by name, and an option that would do nothing, or something else than it says, is
refused.  An option belongs to one of:

    _SET_ELSEWHERE    another key of the config sets it
    OF_THE_MODEL      the checkpoint's config.json decides it
    UNSUPPORTED       a run does not do it, with the reason
    FREE_MEGATRON     where and when something is computed: a later start may change it
    NUMERIC           what is computed: it stays as the run began

Of those that pass, ``NEEDS_TRANSFORMER_ENGINE`` do nothing, or end in an error, without it, and
``LAYOUT_DEPENDENT`` make a train step depend on the layout.  ``config_overrides`` are the defaults
of a run.  Importing this file imports neither Megatron nor torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import enum
import fnmatch
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
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
    **dict.fromkeys(
        ("params_dtype", "pipeline_dtype", "bf16", "fp16", "enable_autocast", "autocast_dtype"),
        "student.dtype",
    ),
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

# What the checkpoint's config.json decides: another value would train another model than the one
# that answers, and than an export says it is.  * stands for any letters.
OF_THE_MODEL = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "normalization",
    "layernorm_epsilon",
    "layernorm_zero_centered_gamma",
    "apply_residual_connection_post_layernorm",
    "qk_layernorm",
    "qk_l2_norm",
    "add_bias_linear",
    "add_qkv_bias",
    "gated_linear_unit",
    "glu_linear_offset",
    "activation_func",
    "activation_func_clamp_value",
    "softmax_scale",
    "softmax_type",
    "window_size",
    "window_attn_skip_freq",
    "attention_output_gate",
    "no_rope_freq",
    "mrope_section",
    # positions and latent attention
    "rotary_*",
    "rope_type",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale*",
    "multi_latent_attention",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    # experts
    "num_moe_experts",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate",
    "moe_layer_freq",
    "moe_latent_size",
    "moe_router_topk*",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_pre_softmax",
    "moe_router_score_function",
    "moe_router_enable_expert_bias",
    "moe_apply_probs_on_input",
    # other kinds of layers
    "experimental_attention_variant",
    "dsa_*",
    "linear_*",
    "mamba_*",
    "use_mamba_mem_eff_path",
    "is_hybrid_model",
    "heterogeneous_block_specs",
)

# What a run does not do, why, and which options ask for it; only Megatron's default passes.
UNSUPPORTED = {
    "rollouts record no routes that a step could replay": ("moe_enable_routing_replay",),
    "a run routes as the model does": ("moe_router_force_load_balancing",),
    "training in 8 or 4 bits is not supported": (
        "fp8*",
        "fp4*",
        "activation_func_fp8_input_store",
        "first_last_layers_bf16",
        "num_layers_at_*_in_bf16",
        "tp_only_amax_red",
        "moe_router_padding_for_*",
        "use_kitchen*",
        "kitchen_*",
        "quant_recipe",
        "keep_fp8_transpose_cache",
        "reuse_grad_buf_for_mxfp8_param_ag",
        "disable_parameter_transpose_cache",
    ),
    "heads that predict further tokens are not trained; student.mtp says what becomes of them": (
        "mtp_*",
    ),
    "the user buffers of Transformer Engine that it needs are not made": ("tp_comm_*",),
    "the loss is computed without Megatron's output layer": (
        "cross_entropy_*",
        "defer_embedding_wgrad_compute",
        "wgrad_deferral_limit",
    ),
    "all weights come from student.model": (
        "init_*",
        "*_init_method*",
    ),
    "graphs and registered buffers keep addresses, which change when optimizer state waits in host "
    "memory during a teacher pass": (
        "cuda_graph_*",
        "enable_cuda_graph",
        "external_cuda_graph",
        "nccl_ub",
        "disable_symmetric_registration",
    ),
    "the trainer sets it": (
        "timers",
        "finalize_model_grads_func",
        "grad_scale_func",
        "*_sync_func",
        "_cpu_offloading_context",
    ),
    "Megatron's timers, which it is for, do not run": ("barrier_with_L1_time",),
    "Megatron-Core does not read it": (
        "async_tensor_model_parallel_allreduce",
        "moe_extended_tp",
        "moe_token_dropping",
        "moe_per_layer_logging",
        "transformer_impl",
        "hetereogenous_dist_checkpoint",
        "use_te_rng_tracker",
    ),
    "an update that goes on while weights are gathered is untried": (
        "overlap_param_gather_with_optimizer_step",
    ),
    "its process groups are not made": (
        "hierarchical_context_parallel_sizes",
        "pipeline_model_parallel_comm_backend",
        "num_distributed_optimizer_instances",
    ),
    "it belongs to Megatron's own data sets": (
        "hybrid_context_parallel",
        "max_seqlen_per_dp_cp_rank",
    ),
    "it is for inference": (
        "flash_decode",
        "inference_*",
        "use_inference_optimized_layers",
        "mlp_chunks_for_prefill",
        "cache_mla_latents",
    ),
    "the trainer does not clip or log attention's logits": ("qk_clip*", "log_max_attention_logit"),
    "layers have SwiGLU": ("use_fused_weighted_squared_relu",),
    "a checkpoint holds the state of AdamW": (
        "optimizer",
        "sgd_momentum",
        "muon_*",
        "decoupled_weight_decay",
    ),
    "teacher_offload.offload_student moves optimizer state": (
        "optimizer_cpu_offload",
        "optimizer_offload_fraction",
        "use_torch_optimizer_for_cpu_offload",
        "overlap_cpu_optimizer_d2h_h2d",
        "pin_cpu_*",
    ),
    "nothing is trained in float16": (
        "loss_scale*",
        "initial_loss_scale",
        "min_loss_scale",
        "hysteresis",
    ),
    "no line of metrics.jsonl has it": ("log_num_zeros_in_grad",),
    "it belongs to Megatron's FSDP; use_distributed_optimizer is the way here": (
        "data_parallel_sharding_strategy",
        "outer_dp_sharding_strategy",
        "gradient_reduce_div_fusion",
        "suggested_communication_unit_size",
        "preserve_fp32_weights",
        "fsdp_*",
    ),
}

# What is computed, or how exactly: a run keeps it.
NUMERIC = (
    "hidden_dropout",
    "attention_dropout",
    "attention_backend",
    "attention_softmax_in_fp32",
    "apply_query_key_layer_scaling",
    "fp32_residual_connection",
    "deterministic_mode",
    "batch_invariant_mode",
    "disable_bf16_reduced_precision_matmul",
    "gradient_accumulation_fusion",
    "bias_*_fusion",
    "masked_softmax_fusion",
    "apply_rope_fusion",
    "moe_permute_fusion",
    "moe_router_fusion",
    "persist_layer_norm",
    "memory_efficient_layer_norm",
    "fused_single_qkv_rope",
    "use_te_activation_func",
    "test_mode",
    # experts
    "moe_router_load_balancing_type",
    "moe_router_dtype",
    "moe_router_bias_update_rate",
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
    "moe_input_jitter_eps",
    "moe_expert_capacity_factor",
    "moe_pad_expert_input_to_capacity",
    "moe_token_drop_policy",
    "moe_grouped_gemm",
    "moe_use_legacy_grouped_gemm",
    # gradients and optimizer
    "reduce_scatter_with_fp32_accumulation",
    "decoupled_lr",
    "decoupled_min_lr",
    "apply_wd_to_qk_layernorm",
    "adam_eps",
    "use_precision_aware_optimizer",
    "store_param_remainders",
    "main_*_dtype",
    "exp_avg_*",
)

# Read by Transformer Engine's layers and optimizers alone.
NEEDS_TRANSFORMER_ENGINE = (
    "attention_backend",
    "attention_softmax_in_fp32",
    "apply_query_key_layer_scaling",
    "batch_invariant_mode",
    "cp_comm_type",
    "symmetric_ar_type",
    "fused_single_qkv_rope",
    "use_te_activation_func",
    "apply_rope_fusion",
    "masked_softmax_fusion",
    "moe_permute_fusion",
    "moe_router_fusion",
    "moe_grouped_gemm",
    "moe_use_legacy_grouped_gemm",
    "delay_wgrad_compute",
    "overlap_moe_expert_parallel_comm",
    "cpu_offloading*",
    "fine_grained_activation_offloading",
    "use_precision_aware_optimizer",
)

# Where and when something is computed, and nothing of what: a later start may change these.
# * stands for any letters.  (A checkpoint itself demands that use_distributed_optimizer stays.)
FREE_MEGATRON = (
    # layout and split
    "sequence_parallel",
    "cp_comm_type",
    "microbatch_group_size_per_vp_stage",
    "pipeline_model_parallel_layout",
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
    "overlap_p2p_comm*",
    "batch_p2p_*",
    "use_ring_exchange_p2p",
    "symmetric_ar_type",
    "delay_wgrad_compute",
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
    "config_logger_dir",
)

# Options that make a train step depend on how tokens meet in batches, not the same numbers on
# another layout; with what each may be, the default first.  A kind of balancing that is a loss does
# nothing at moe_aux_loss_coeff 0.
LAYOUT_DEPENDENT: dict[str, tuple[object, ...]] = {
    # what is dropped follows from the generators of the ranks
    "hidden_dropout": (0.0,),
    "attention_dropout": (0.0,),
    "moe_aux_loss_coeff": (0.0,),
    "moe_z_loss_coeff": (None,),
    "moe_router_load_balancing_type": ("none", "aux_loss", "seq_aux_loss", "global_aux_loss"),
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


def recomputes_layers(user: Mapping[str, object]) -> bool:
    return user.get("recompute_granularity") == "full"


def has_distributed_optimizer(user: Mapping[str, object]) -> bool:
    return bool(user.get("use_distributed_optimizer"))


def has_sequence_parallel(user: Mapping[str, object]) -> bool:
    return bool(user.get("sequence_parallel"))


@cache
def megatron_dataclasses() -> tuple[type[Any], ...]:
    """TransformerConfig with the fields of latent attention, DistributedDataParallelConfig,
    OptimizerConfig; importing them takes seconds.
    """
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    return MLATransformerConfig, DistributedDataParallelConfig, OptimizerConfig


@dataclasses.dataclass(frozen=True)
class MegatronFields:
    """The user's ``student.megatron`` table, sorted by the Megatron dataclass that has the field."""

    transformer: Mapping[str, Any]
    ddp: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    # what the checkpoint decides: compared with it (``check_model_fields``), then left out
    of_the_model: Mapping[str, Any]

    @property
    def names(self) -> list[str]:
        return sorted({*self.transformer, *self.ddp, *self.optimizer})


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def sort_fields(user: Mapping[str, object]) -> MegatronFields:
    """A field that two dataclasses have (``use_distributed_optimizer``) goes to both.

    Raises MtopdError for a field that no dataclass has, that another key sets, or that would do
    nothing here.  Values are coerced to the field's type (YAML reads 2e-3 as a string).
    """
    tables: tuple[dict[str, object], ...] = ({}, {}, {}, {})
    of_the_model = tables[-1]  # the others belong to the dataclasses in order
    if not user:  # importing Megatron takes seconds
        return MegatronFields(*tables)
    known = [{f.name: f for f in dataclasses.fields(kind)} for kind in megatron_dataclasses()]
    for name, value in user.items():
        if name in _SET_ELSEWHERE:
            raise MtopdError(f"student.megatron.{name} is not set here; set {_SET_ELSEWHERE[name]}")
        if not any(name in fields for fields in known):
            close = difflib.get_close_matches(name, [n for fields in known for n in fields], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise MtopdError(
                f"student.megatron.{name} is not a field of Megatron's TransformerConfig, "
                f"DistributedDataParallelConfig or OptimizerConfig{hint}"
            )
        defaults = [fields[name].default for fields in known if name in fields]
        values = [_coerce(value, default, name) for default in defaults]
        if matches(name, OF_THE_MODEL):
            of_the_model[name] = values[0]
            continue
        if values[0] not in defaults:
            _check_supported(name, values[0])
        for table, fields in zip(tables, known, strict=False):
            if name in fields:
                table[name] = values.pop(0)
    return MegatronFields(*tables)


def _check_supported(name: str, value: object) -> None:
    """Raises MtopdError for what a run does not do."""
    for reason, patterns in UNSUPPORTED.items():
        if matches(name, patterns):
            raise MtopdError(
                f"student.megatron.{name}={value!r} is refused: {reason}; leave it out"
            )
    if not matches(name, (*FREE_MEGATRON, *NUMERIC)):  # of another version of Megatron
        raise MtopdError(f"student.megatron.{name} is not known to this version of mtopd")
    if matches(name, NEEDS_TRANSFORMER_ENGINE):
        from mtopd.megatron.without_te import have_transformer_engine

        if not have_transformer_engine():
            raise MtopdError(
                f"student.megatron.{name}={value!r} needs Transformer Engine, which is not "
                "installed; leave it out, or pip install mtopd[gpu]"
            )


def check_model_fields(
    fields: MegatronFields, transformer_config: object, where: str | Path
) -> None:
    """Raises MtopdError for a value that is not what the checkpoint ``where`` has."""
    for name, value in fields.of_the_model.items():
        needed = getattr(transformer_config, name, None)
        needed = getattr(needed, "__name__", needed)  # of an activation: as YAML can say it
        if value != needed:
            raise MtopdError(
                f"student.megatron.{name}={value!r}: config.json of {where} decides it, it is "
                f"{needed!r}; leave it out"
            )


@contextlib.contextmanager
def megatron_refuses(given: Collection[str]) -> Iterator[None]:
    """Megatron checks how its options go together when it builds its configs, layers and
    optimizers: a refusal there is the user's to resolve, if any options were ``given``.

    Without any, or where our own code fails, the error passes: that is a fault of ours.  The
    refusal is the cause of the MtopdError.
    """
    try:
        yield
    except Exception as error:
        if not given or not _is_of_megatron(error):
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise MtopdError(
            f"Megatron refuses the options under student.megatron ({', '.join(sorted(given))}): "
            f"{said}"
        ) from error


def _is_of_megatron(error: Exception) -> bool:
    """Whether Megatron, not code of ours that it called, raised ``error`` or called what did."""
    import torch

    # MtopdError says itself what is wrong; memory, disks and networks are no matter of options.
    others = (MtopdError, OSError, torch.OutOfMemoryError, torch.distributed.DistError)
    if isinstance(error, others):
        return False
    modules = [
        frame.f_globals.get("__name__", "").partition(".")[0]
        for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    known = [module for module in modules if module in ("mtopd", "megatron")]
    return bool(known) and known[-1] == "megatron"


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
