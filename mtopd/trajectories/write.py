"""Write a shard of trajectories and seal it."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mtopd.files import write_atomic, write_json
from mtopd.trajectories.format import (
    FINISH_REASONS,
    LENGTH_OF,
    METADATA_SCHEMA,
    SCHEMA_VERSION,
    TOKENS_SCHEMA,
    load_shard,
    metadata_path,
    seal_path,
    shard_is_sealed,
    teacher_prompt_hash,
    token_hash,
    tokens_path,
)
from mtopd.types import MtopdError, Numbers, Trajectory


def write_shard(
    folder: Path, name: str, trajectories: Sequence[Trajectory], generation: int
) -> None:
    """Write and seal a shard.  A sealed shard is never overwritten; an unsealed or truncated one is
    written anew.

    Raises ValueError for a trajectory that breaks the format, MtopdError where the shard belongs to
    somebody else.
    """
    _check_trajectories(name, trajectories)
    _check_not_sealed(folder, name, generation)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        metadata_path(folder, name): _parquet_bytes([_metadata_row(t) for t in trajectories]),
        tokens_path(folder, name): _arrow_bytes(_token_columns(trajectories)),
    }
    # A truncated shard's seal goes first: it must not vouch for bytes it has never seen.
    seal_path(folder, name).unlink(missing_ok=True)
    for path, data in contents.items():
        write_atomic(path, data)
    seal = {
        "schema_version": SCHEMA_VERSION,
        "generation": generation,
        "num_samples": len(trajectories),
        "files": {
            p.name: {"size": len(d), "sha256": hashlib.sha256(d).hexdigest()}
            for p, d in contents.items()
        },
    }
    write_json(seal_path(folder, name), seal)


def _check_not_sealed(folder: Path, name: str, generation: int) -> None:
    if not seal_path(folder, name).exists():
        return
    sealed_by = load_shard(folder, name).generation
    if sealed_by > generation or shard_is_sealed(folder, name):
        raise MtopdError(
            f"shard {folder / name} was sealed by start {sealed_by} of the run, this is start "
            f"{generation}; "
            "sealed trajectories are never overwritten: ask shard_is_sealed first"
        )


def _check_trajectories(name: str, trajectories: Sequence[Trajectory]) -> None:
    if not name or "/" in name or name.startswith("."):
        raise ValueError(
            f"'{name}' cannot name a shard; use a plain file name that does not start with a dot"
        )
    if not trajectories:
        raise ValueError(f"shard '{name}' has no trajectories; do not write it")
    if len({t.sample_id for t in trajectories}) < len(trajectories):
        raise ValueError(f"shard '{name}' has two trajectories with one sample_id")
    for trajectory in trajectories:
        if (reason := _broken_invariant(trajectory)) is not None:
            raise ValueError(
                f"trajectory {trajectory.sample_id} ({trajectory.prompt_id}): {reason}"
            )


def _broken_invariant(t: Trajectory) -> str | None:
    if not len(t.prompt_ids) or not len(t.response_ids):
        return f"prompt has {len(t.prompt_ids)} and response {len(t.response_ids)} tokens; both need at least 1"
    if not len(t.loss_mask) == len(t.rollout_log_probs) == len(t.response_ids):
        return (
            f"loss_mask has {len(t.loss_mask)} and rollout_log_probs {len(t.rollout_log_probs)} "
            "entries "
            f"for {len(t.response_ids)} response tokens"
        )
    values = np.unique(_array(t.loss_mask)).tolist()
    if not {*values} <= {0, 1}:
        return f"loss_mask has the values {values}; only 0 and 1 are allowed"
    if not np.isfinite(_array(t.rollout_log_probs)).all():
        return "rollout_log_probs has a value that is not finite; a sampled token has a finite log-prob"
    if t.teacher_prompt_ids is not None and not t.teacher_prompt_ids:
        return "teacher_prompt_ids is empty; give None where the teacher reads the student's prompt"
    starts, versions = zip(*spans_of(t), strict=True)
    if starts[0] != 0 or not _ascend([*starts, len(t.response_ids)]):
        return f"version_spans begin at the tokens {starts}; they begin at 0 and ascend, within the response"
    if versions[-1] != t.student_version:
        return f"student_version is {t.student_version}, the last of version_spans {versions[-1]}"
    if t.finish_reason not in FINISH_REASONS:
        return f"finish_reason is '{t.finish_reason}'; use one of {', '.join(FINISH_REASONS)}"
    return None


def _metadata_row(t: Trajectory) -> dict[str, Any]:
    return {
        "sample_id": t.sample_id,
        "prompt_id": t.prompt_id,
        "route": sorted(t.route.items()),
        "teacher_index": t.teacher_index,
        "prompt_len": len(t.prompt_ids),
        "response_len": len(t.response_ids),
        "num_loss_tokens": int(np.count_nonzero(_array(t.loss_mask))),
        "student_version": t.student_version,
        "oldest_version": min(version for _, version in spans_of(t)),
        "finish_reason": t.finish_reason,
        "reward": t.reward,
        "token_hash": token_hash(t.prompt_ids, _array(t.response_ids), _array(t.loss_mask)),
        "teacher_prompt_len": len(t.teacher_prompt_ids or ()),
        "teacher_prompt_hash": teacher_prompt_hash(t.teacher_prompt_ids)
        if t.teacher_prompt_ids is not None
        else "",
    }


def spans_of(t: Trajectory) -> tuple[tuple[int, int], ...]:
    """(first token, student version) of each run of tokens."""
    return t.version_spans or ((0, t.student_version),)


def _array(numbers: Numbers) -> npt.NDArray[Any]:
    return np.asarray(numbers)


def _ascend(numbers: Sequence[int]) -> bool:
    return all(a < b for a, b in itertools.pairwise(numbers))


def _token_columns(trajectories: Sequence[Trajectory]) -> list[pa.Array]:
    """In the order of the schema.  A token is never an object of its own."""
    contexts = [t.teacher_prompt_ids for t in trajectories]
    columns: dict[str, pa.Array] = {
        "sample_id": pa.array([t.sample_id for t in trajectories], pa.int64()),
        "teacher_prompt_ids": pa.array(contexts, pa.list_(pa.int32())),
    }
    for name in LENGTH_OF:
        dtype = TOKENS_SCHEMA.field(name).type.value_type.to_pandas_dtype()
        arrays = [_array(getattr(t, name)).astype(dtype) for t in trajectories]
        columns[name] = _lists(map(len, arrays), pa.array(np.concatenate(arrays)))
    spans = [spans_of(t) for t in trajectories]
    flat = np.array([span for of_sample in spans for span in of_sample], np.int32)
    structs = pa.StructArray.from_arrays([flat[:, 0], flat[:, 1]], ["start", "version"])
    columns["version_spans"] = _lists(map(len, spans), structs)
    return [columns[name] for name in TOKENS_SCHEMA.names]


def _lists(lengths: Iterable[int], values: pa.Array) -> pa.Array:
    offsets = np.cumsum([0, *lengths]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def _parquet_bytes(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, METADATA_SCHEMA), sink)
    return sink.getvalue().to_pybytes()


def _arrow_bytes(columns: list[pa.Array]) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, TOKENS_SCHEMA) as writer:
        writer.write_table(pa.Table.from_arrays(columns, schema=TOKENS_SCHEMA))
    return sink.getvalue().to_pybytes()
