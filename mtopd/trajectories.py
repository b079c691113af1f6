"""Trajectories on disk: a public format, version 1, that another harness may write too.

A folder holds any number of shards.  Shard ``<name>`` is three files; ``<name>.sealed.json`` is
written last and makes the shard visible.  It holds ``schema_version``, ``generation`` (the start of
the run that wrote it), ``num_samples`` and ``files``: for both other files their ``size`` in bytes
and ``sha256``.

``<name>.meta.parquet``, one row per sample, all that planning ever reads:

    sample_id        int64                unique over the shards of a folder
    prompt_id        string               "<source name>/<row>"
    route            map<string, string>  the fields that chose the teacher, e.g. domain
    teacher_index    int32                position of the teacher in the config
    prompt_len       int32                at least 1
    response_len     int32                at least 1; counts EOS, which is trained; nothing stands after EOS
    num_loss_tokens  int32                ones in loss_mask
    student_version  int32                the iteration whose weights sampled the response
    finish_reason    string               "stop" (the response ends with EOS) or "length"
    reward           double, nullable     the verifier's score
    token_hash       string               ``token_hash`` of the sample's tokens, hex

``<name>.tokens.arrow``, an uncompressed Arrow IPC file with the same samples in the same order,
memory-mapped:

    sample_id            int64
    prompt_ids           list<int32>
    response_ids         list<int32>
    loss_mask            list<uint8>       0 or 1 for each response token
    rollout_log_probs    list<float>       of each response token, under the student that sampled it
    version_spans        list<struct<start: int32, version: int32>>  ``version`` sampled from token ``start`` on
    teacher_prompt_ids   list<int32>, nullable  the teacher's own longer context, aligned by response index

Sealed shards are never changed.  A reader takes sealed shards only and refuses a damaged one by
file name: the metadata by its sha256, each sample's tokens by ``token_hash`` when first read,
log-probs and spans by ``verify_shard`` alone.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mtopd.files import read_json, write_atomic, write_json
from mtopd.types import MtopdError, SampleMetadata, Trajectory

SCHEMA_VERSION = 1
SEAL_SUFFIX = ".sealed.json"
FINISH_REASONS = ("stop", "length")

_METADATA_TYPES = {
    "sample_id": pa.int64(),
    "prompt_id": pa.string(),
    "route": pa.map_(pa.string(), pa.string()),
    "teacher_index": pa.int32(),
    "prompt_len": pa.int32(),
    "response_len": pa.int32(),
    "num_loss_tokens": pa.int32(),
    "student_version": pa.int32(),
    "finish_reason": pa.string(),
    "reward": pa.float64(),
    "token_hash": pa.string(),
}
_TOKEN_TYPES = {
    "sample_id": pa.int64(),
    "prompt_ids": pa.list_(pa.int32()),
    "response_ids": pa.list_(pa.int32()),
    "loss_mask": pa.list_(pa.uint8()),
    "rollout_log_probs": pa.list_(pa.float32()),
    "version_spans": pa.list_(pa.struct([("start", pa.int32()), ("version", pa.int32())])),
    "teacher_prompt_ids": pa.list_(pa.int32()),
}
METADATA_SCHEMA = pa.schema(
    [pa.field(n, t, nullable=n == "reward") for n, t in _METADATA_TYPES.items()]
)
TOKENS_SCHEMA = pa.schema(
    [pa.field(n, t, nullable=n == "teacher_prompt_ids") for n, t in _TOKEN_TYPES.items()]
)
_LENGTH_OF = {
    "prompt_ids": "prompt_len",
    "response_ids": "response_len",
    "loss_mask": "response_len",
    "rollout_log_probs": "response_len",
}


def token_hash(
    prompt_ids: npt.ArrayLike, response_ids: npt.ArrayLike, loss_mask: npt.ArrayLike
) -> str:
    """sha256, hex, over three uint64 lengths, the ids as int32 and the mask as uint8, all
    little-endian.
    """
    parts = [
        np.asarray(prompt_ids, "<i4"),
        np.asarray(response_ids, "<i4"),
        np.asarray(loss_mask, "u1"),
    ]
    digest = hashlib.sha256(struct.pack("<3Q", *map(len, parts)))
    for part in parts:
        digest.update(part.tobytes())
    return digest.hexdigest()


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
        _metadata_path(folder, name): _parquet_bytes([_metadata_row(t) for t in trajectories]),
        _tokens_path(folder, name): _arrow_bytes([_token_row(t) for t in trajectories]),
    }
    # A truncated shard's seal goes first: it must not vouch for bytes it has never seen.
    _seal_path(folder, name).unlink(missing_ok=True)
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
    write_json(_seal_path(folder, name), seal)


def _check_not_sealed(folder: Path, name: str, generation: int) -> None:
    if not _seal_path(folder, name).exists():
        return
    sealed_by = _read_seal(folder, name)["generation"]
    if sealed_by > generation or is_sealed(folder, name):
        raise MtopdError(
            f"shard {folder / name} was sealed by start {sealed_by} of the run, this is start "
            f"{generation}; "
            "sealed trajectories are never overwritten: ask is_sealed first"
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
    if not t.prompt_ids or not t.response_ids:
        return f"prompt has {len(t.prompt_ids)} and response {len(t.response_ids)} tokens; both need at least 1"
    if not len(t.loss_mask) == len(t.rollout_log_probs) == len(t.response_ids):
        return (
            f"loss_mask has {len(t.loss_mask)} and rollout_log_probs {len(t.rollout_log_probs)} "
            "entries "
            f"for {len(t.response_ids)} response tokens"
        )
    if not set(t.loss_mask) <= {0, 1}:
        return f"loss_mask has the values {sorted(set(t.loss_mask))}; only 0 and 1 are allowed"
    if not np.isfinite(t.rollout_log_probs).all():
        return "rollout_log_probs has a value that is not finite; a sampled token has a finite log-prob"
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
        "num_loss_tokens": sum(t.loss_mask),
        "student_version": t.student_version,
        "finish_reason": t.finish_reason,
        "reward": t.reward,
        "token_hash": token_hash(t.prompt_ids, t.response_ids, t.loss_mask),
    }


def _token_row(t: Trajectory) -> dict[str, Any]:
    return {
        **{name: getattr(t, name) for name in ("sample_id", *_LENGTH_OF)},
        "version_spans": [{"start": 0, "version": t.student_version}],
        "teacher_prompt_ids": None,
    }


def _parquet_bytes(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, METADATA_SCHEMA), sink)
    return sink.getvalue().to_pybytes()


def _arrow_bytes(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, TOKENS_SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(rows, TOKENS_SCHEMA))
    return sink.getvalue().to_pybytes()


def sealed_shards(folder: Path) -> list[str]:
    """Names of the shards that have a seal, sorted."""
    return sorted(path.name.removesuffix(SEAL_SUFFIX) for path in folder.glob("*" + SEAL_SUFFIX))


def is_sealed(folder: Path, name: str) -> bool:
    """Whether the shard has a seal and both files have the sealed sizes.  Reads no data."""
    if not _seal_path(folder, name).exists():
        return False
    sizes = {
        folder / file: entry["size"] for file, entry in _read_seal(folder, name)["files"].items()
    }
    return all(path.is_file() and path.stat().st_size == size for path, size in sizes.items())


def verify_shard(folder: Path, name: str) -> None:
    """Compare every byte of a sealed shard with its seal; raises MtopdError that names the damaged
    file.
    """
    for path in (_metadata_path(folder, name), _tokens_path(folder, name)):
        entry = _sealed_entry(folder, name, path)
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                raise _damaged(path, "its sha256 is not the sealed one")


def read_metadata(folder: Path) -> pa.Table:
    """The metadata of all sealed shards (``METADATA_SCHEMA``), shards by name, rows as written."""
    shards = {name: read_shard_metadata(folder, name) for name in sealed_shards(folder)}
    if not shards:
        raise MtopdError(
            f"{folder} has no sealed shard of trajectories; run the rollout of this iteration first"
        )
    owner: dict[int, str] = {}
    for name, table in shards.items():
        for sample_id in table["sample_id"].to_pylist():
            if sample_id in owner:
                raise MtopdError(
                    f"sample_id {sample_id} is in {_metadata_path(folder, owner[sample_id])} and "
                    "again in "
                    f"{_metadata_path(folder, name)}; it must be unique: remove one of the shards, "
                    "its seal first"
                )
            owner[sample_id] = name
    return pa.concat_tables(shards.values())


def sample_metadata(metadata: pa.Table) -> list[SampleMetadata]:
    """What ``planning`` needs of ``read_metadata``'s table."""
    fields = ["sample_id", "teacher_index", "prompt_len", "response_len", "num_loss_tokens"]
    return [SampleMetadata(**row) for row in metadata.select(fields).to_pylist()]


@dataclass(frozen=True, slots=True)
class TokenFields:
    """One sample's per-token fields, as read-only views of the memory-mapped file."""

    prompt_ids: npt.NDArray[np.int32]
    response_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.uint8]
    rollout_log_probs: npt.NDArray[np.float32]
    version_spans: tuple[tuple[int, int], ...]  # (first response token, student version)
    teacher_prompt_ids: npt.NDArray[np.int32] | None


class _Batch:
    """The columns of one mapped record batch as arrays: a sample is a few slices, not a few Arrow
    scalars.
    """

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._length = len(batch)
        columns = [batch.column(name) for name in TOKENS_SCHEMA.names[1:]]
        self._starts = [column.offsets.to_numpy() for column in columns]
        spans = columns[4].values
        self._values = [column.values.to_numpy() for i, column in enumerate(columns) if i != 4]
        self._spans = [spans.field(name).to_numpy() for name in ("start", "version")]
        self._has_context = columns[5].is_valid().to_numpy(zero_copy_only=False)

    def __len__(self) -> int:
        return self._length

    def fields(self, row: int) -> TokenFields:
        prompt, response, mask, log_probs, spans, context = (
            slice(starts[row], starts[row + 1]) for starts in self._starts
        )
        starts, versions = (values[spans].tolist() for values in self._spans)
        return TokenFields(
            prompt_ids=self._values[0][prompt],
            response_ids=self._values[1][response],
            loss_mask=self._values[2][mask],
            rollout_log_probs=self._values[3][log_probs],
            version_spans=tuple(zip(starts, versions, strict=True)),
            teacher_prompt_ids=self._values[4][context] if self._has_context[row] else None,
        )


class TokenStore:
    """The samples of all sealed shards of a folder, by sample id.

    Opening checks structure, sizes and lengths; content is checked when a sample is first read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.metadata = read_metadata(folder)  # as ``read_metadata`` gives it
        self._row_of = {
            sample_id: row for row, sample_id in enumerate(self.metadata["sample_id"].to_pylist())
        }
        self._hash, self._num_loss = (
            self.metadata[name].to_pylist() for name in ("token_hash", "num_loss_tokens")
        )
        self._places: list[tuple[_Batch, int]] = []  # of each row
        self._paths: list[Path] = []  # of the tokens file, for each row
        for name in sealed_shards(folder):
            table = _map_tokens(folder, name, self.metadata.slice(len(self._paths)))
            self._paths += [_tokens_path(folder, name)] * len(table)
            for batch in map(_Batch, table.to_batches()):
                self._places += [(batch, row) for row in range(len(batch))]
        self._verified: dict[int, TokenFields] = {}

    @cached_property
    def samples(self) -> dict[int, SampleMetadata]:
        """What ``planning`` needs, by sample id, in the order of the shards."""
        return {sample.sample_id: sample for sample in sample_metadata(self.metadata)}

    def tokens(self, sample_id: int) -> TokenFields:
        """The token fields of a sample; the first call for a sample compares them with its token
        hash.
        """
        fields = self._verified.get(sample_id)
        if fields is None:
            row = self._row(sample_id)
            batch, place = self._places[row]
            fields = batch.fields(place)
            self._verify(sample_id, row, fields)
            self._verified[sample_id] = fields
        return fields

    def get(self, sample_id: int) -> Trajectory:
        """The trajectory as it was written."""
        fields = self.tokens(sample_id)
        if fields.teacher_prompt_ids is not None:
            raise MtopdError(
                f"sample {sample_id} of {self._folder} has teacher_prompt_ids, which a Trajectory "
                "cannot hold; this "
                "version scores the student's own context only: write the shard without them"
            )
        (row,) = self.metadata.slice(self._row(sample_id), 1).to_pylist()
        return Trajectory(
            sample_id=sample_id,
            prompt_id=row["prompt_id"],
            route=dict(row["route"]),
            teacher_index=row["teacher_index"],
            prompt_ids=tuple(fields.prompt_ids.tolist()),
            response_ids=tuple(fields.response_ids.tolist()),
            loss_mask=tuple(fields.loss_mask.tolist()),
            rollout_log_probs=tuple(fields.rollout_log_probs.tolist()),
            student_version=row["student_version"],
            finish_reason=row["finish_reason"],
            reward=row["reward"],
        )

    def _row(self, sample_id: int) -> int:
        if sample_id not in self._row_of:
            raise MtopdError(
                f"sample {sample_id} is in no sealed shard of {self._folder}; plan from its own "
                "metadata"
            )
        return self._row_of[sample_id]

    def _verify(self, sample_id: int, row: int, fields: TokenFields) -> None:
        if token_hash(fields.prompt_ids, fields.response_ids, fields.loss_mask) != self._hash[row]:
            raise _damaged(
                self._paths[row], f"the tokens of sample {sample_id} do not match their hash"
            )
        if fields.loss_mask.max() > 1 or fields.loss_mask.sum() != self._num_loss[row]:
            raise _damaged(
                self._paths[row],
                f"loss_mask of sample {sample_id} must hold {self._num_loss[row]} ones, else zeros",
            )


def _metadata_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.meta.parquet"


def _tokens_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.tokens.arrow"


def _seal_path(folder: Path, name: str) -> Path:
    return folder / (name + SEAL_SUFFIX)


def _damaged(path: Path, what: str) -> MtopdError:
    return MtopdError(
        f"{path} is damaged: {what}; remove the shard, its seal first, and roll it out again"
    )


def _read_seal(folder: Path, name: str) -> dict[str, Any]:
    path = _seal_path(folder, name)
    seal = read_json(path)
    version = seal.get("schema_version") if isinstance(seal, dict) else None
    if version != SCHEMA_VERSION:
        raise MtopdError(
            f"{path} has schema_version {version!r}; this version of mtopd reads {SCHEMA_VERSION}"
        )
    files = [_metadata_path(folder, name).name, _tokens_path(folder, name).name]
    if not {"generation", "num_samples", "files"} <= seal.keys() or sorted(seal["files"]) != files:
        raise _damaged(
            path, f"it must hold generation, num_samples and files with {' and '.join(files)}"
        )
    return seal


def _sealed_entry(folder: Path, name: str, path: Path) -> dict[str, Any]:
    """The seal's entry of one file, after comparing sizes."""
    entry = _read_seal(folder, name)["files"][path.name]
    size = path.stat().st_size if path.is_file() else None
    if size != entry["size"]:
        raise _damaged(path, f"it has {size or 'no'} bytes, sealed were {entry['size']}")
    return entry


def read_shard_metadata(folder: Path, name: str) -> pa.Table:
    path = _metadata_path(folder, name)
    entry = _sealed_entry(folder, name, path)
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise _damaged(path, "its sha256 is not the sealed one")
    try:
        # Another harness may mark its columns nullable or use wider integers: the cast admits both,
        # but no null.
        table = pq.read_table(pa.BufferReader(data), columns=METADATA_SCHEMA.names).cast(
            METADATA_SCHEMA
        )
    except (pa.ArrowException, ValueError) as error:
        raise MtopdError(
            f"{path} is no version {SCHEMA_VERSION} metadata: {error}; see mtopd.trajectories"
        ) from error
    if (found := len(table)) != (sealed := _read_seal(folder, name)["num_samples"]):
        raise _damaged(path, f"it has {found} samples, sealed were {sealed}")
    return table


def _map_tokens(folder: Path, name: str, metadata: pa.Table) -> pa.Table:
    """The tokens of a shard, memory-mapped; ``metadata`` begins with the shard's rows."""
    path = _tokens_path(folder, name)
    _sealed_entry(folder, name, path)
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(path, f"it is no whole Arrow IPC file ({error})") from error
    if (
        reason := _format_difference(
            table, metadata.slice(0, _read_seal(folder, name)["num_samples"])
        )
    ) is not None:
        raise MtopdError(
            f"{path} does not fit version {SCHEMA_VERSION} of the format: {reason}; see "
            "mtopd.trajectories"
        )
    # One schema for all shards, whatever their writers said of nulls; copies nothing.
    return pa.Table.from_arrays([table[name] for name in TOKENS_SCHEMA.names], schema=TOKENS_SCHEMA)


def _format_difference(tokens: pa.Table, metadata: pa.Table) -> str | None:
    """What is wrong with the structure of a tokens table, given the metadata it must belong to."""
    for field in TOKENS_SCHEMA:
        index = tokens.schema.get_field_index(field.name)  # -1 when there is none or more than one
        if index < 0 or tokens.schema.types[index] != field.type:
            return f"it needs one column {field.name} of type {field.type} and has {tokens.schema.types}"
        chunks = tokens[field.name].chunks
        if any(chunk.null_count for chunk in chunks) and not field.nullable:
            return f"column {field.name} has nulls"
        if pa.types.is_list(field.type) and any(chunk.values.null_count for chunk in chunks):
            return f"column {field.name} has nulls inside its lists"
    if not tokens["sample_id"].equals(metadata["sample_id"]):
        return "its sample ids are not those of the metadata, in that order"
    for column, length in _LENGTH_OF.items():
        if not pc.list_value_length(tokens[column]).equals(metadata[length]):
            return f"the lengths of {column} are not the metadata's {length}"
        if pc.min(metadata[length]).as_py() < 1:
            return f"{length} is 0; it must be at least 1"
    return None
