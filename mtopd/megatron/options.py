"""Names of Megatron's options, by what mtopd has to know of them.  Imports no Megatron.

``FREE_MEGATRON``: options that say where and when something is computed, and nothing of what; a
later start of a run may change them.
"""

from __future__ import annotations

# * stands for any letters.  (A checkpoint itself demands that use_distributed_optimizer stays.)
FREE_MEGATRON = (
    # layout and split
    *(
        "sequence_parallel",
        "cp_comm_type",
        "hierarchical_context_parallel_sizes",
        "microbatch_group_size_per_vp_stage",
    ),
    *(
        "pipeline_model_parallel_*",
        "num_layers_in_*_pipeline_stage",
        "account_for_*_in_pipeline_split",
    ),
    # memory
    *(
        "recompute_*",
        "num_microbatches_with_partial_activation_checkpoints",
        "distribute_saved_activations",
    ),
    *(
        "cpu_offloading*",
        "fine_grained_activation_offloading",
        "offload_modules",
        "min_offloaded_tensor_size",
    ),
    *("moe_layer_recompute", "deallocate_pipeline_outputs", "clone_scatter_output_in_embedding"),
    *("use_distributed_optimizer", "use_cpu_initialization", "perform_initialization"),
    # communication
    *(
        "overlap_grad_reduce",
        "overlap_param_gather",
        "align_param_gather",
        "bucket_size",
        "pad_buckets_*",
        "nccl_ub",
    ),
    *(
        "overlap_p2p_comm*",
        "batch_p2p_*",
        "use_ring_exchange_p2p",
        "tp_comm_*",
        "symmetric_ar_type",
    ),
    *("delay_wgrad_compute", "defer_embedding_wgrad_compute", "wgrad_deferral_limit"),
    *(
        "overlap_moe_expert_parallel_comm",
        "ep_overlap_*",
        "moe_shared_expert_overlap",
        "moe_token_dispatcher_type",
    ),
    *("moe_enable_deepep", "moe_deepep_*", "moe_flex_dispatcher_backend", "moe_hybridep_*"),
    # checks and logs
    *("check_for_*", "barrier_with_L1_time", "config_logger_dir"),
)
