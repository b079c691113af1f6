"""Trajectories on disk, in a public format (``mtopd.trajectories.format``): shards that are written
once, sealed, and read memory-mapped.
"""

from mtopd.trajectories.format import (
    FINISH_REASONS,
    check_seals,
    load_shard,
    seal_hashes,
    sealed_shards,
    shard_is_sealed,
    teacher_prompt_hash,
    token_hash,
)
from mtopd.trajectories.read import (
    TokenFields,
    TokenStore,
    read_metadata,
    read_shard_metadata,
    sample_metadata,
    verify_shards,
)
from mtopd.trajectories.write import write_shard

__all__ = [
    "FINISH_REASONS",
    "TokenFields",
    "TokenStore",
    "check_seals",
    "load_shard",
    "read_metadata",
    "read_shard_metadata",
    "sample_metadata",
    "seal_hashes",
    "sealed_shards",
    "shard_is_sealed",
    "teacher_prompt_hash",
    "token_hash",
    "verify_shards",
    "write_shard",
]
