"""Read sealed shards: metadata as a table, tokens as views of the memory-mapped files."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mtopd.trajectories.format import (
    LENGTH_OF,
    METADATA_SCHEMA,
    SCHEMA_VERSION,
    TOKENS_SCHEMA,
    Shard,
    damaged,
    load_shard,
    sealed_shards,
    teacher_prompt_hash,
    token_hash,
)
from mtopd.types import MtopdError, SampleMetadata, Trajectory


def verify_shards(folder: Path, names: Sequence[str] | None = None) -> None:
    """Compare every byte of these sealed shards, by default all, with their seals, and every sample's
    tokens with its ``token_hash`` and ``teacher_prompt_hash``, which name its cached rows.  Raises
    MtopdError that names the damaged file, or the sample.
    """
    shards = _load_shards(folder, names)
    for shard in shards:
        for path in (shard.metadata_path, shard.tokens_path):
            shard.check_size(path)
            with open(path, "rb") as file:
                shard.check_sha256(path, hashlib.file_digest(file, "sha256").hexdigest())
    for shard, metadata in zip(shards, _read_tables(shards), strict=True):
        # Another harness may have written the hashes.
        columns = ("sample_id", "token_hash", "teacher_prompt_hash")
        sealed = zip(*(metadata[name].to_pylist() for name in columns), strict=True)
        for batch in map(_Batch, _map_tokens(shard, metadata).to_batches()):
            for row in range(len(batch)):
                (sample_id, *expected), fields = next(sealed), batch.fields(row)
                context = fields.teacher_prompt_ids
                found = [
                    token_hash(fields.prompt_ids, fields.response_ids, fields.loss_mask),
                    "" if context is None else teacher_prompt_hash(context),
                ]
                if found != expected:
                    what = f"the tokens of sample {sample_id} do not match their hash"
                    raise damaged(shard.tokens_path, what)


def read_metadata(folder: Path) -> pa.Table:
    """The metadata of all sealed shards (``METADATA_SCHEMA``), shards by name, rows as written."""
    return pa.concat_tables(_read_tables(_load_shards(folder)))


def read_shard_metadata(folder: Path, name: str) -> pa.Table:
    return _read_table(load_shard(folder, name))


def sample_metadata(metadata: pa.Table) -> list[SampleMetadata]:
    """What ``planning`` needs of ``read_metadata``'s table."""
    names = [field.name for field in dataclasses.fields(SampleMetadata)]
    return [SampleMetadata(**row) for row in metadata.select(names).to_pylist()]


@dataclass(frozen=True, slots=True)
class TokenFields:
    """One sample's per-token fields, as read-only views of the memory-mapped file."""

    prompt_ids: npt.NDArray[np.int32]
    response_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.uint8]
    rollout_log_probs: npt.NDArray[np.float32]
    version_spans: tuple[tuple[int, int], ...]  # (first response token, student version)
    teacher_prompt_ids: npt.NDArray[np.int32] | None

    def versions(self) -> npt.NDArray[np.int64]:
        """[T], the student that sampled each response token, or the turn before it."""
        starts, versions = map(np.array, zip(*self.version_spans, strict=True))
        return np.repeat(versions, np.diff([*starts, len(self.response_ids)]))

    def loss_mask_since(self, oldest: int) -> npt.NDArray[np.uint8]:
        """[T], ``loss_mask`` with 0 for tokens of students before ``oldest``."""
        if min(version for _, version in self.version_spans) >= oldest:
            return self.loss_mask
        return np.where(self.versions() >= oldest, self.loss_mask, np.uint8(0))


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
    """The samples of sealed shards of a folder, by default of all, by sample id.

    Opening checks structure, sizes, lengths and loss masks; ``verify_shards`` checks every byte.
    """

    def __init__(self, folder: Path, names: Sequence[str] | None = None) -> None:
        self._folder = folder
        shards = _load_shards(folder, names)
        # Every byte, by the checksums that opening compares with.
        self.seals = [(s.name, s.num_samples, sorted(map(repr, s.files.items()))) for s in shards]
        tables = _read_tables(shards)
        self.shards: dict[str, list[int]] = {  # sample ids by name, as they stand in ``samples``
            shard.name: table["sample_id"].to_pylist()
            for shard, table in zip(shards, tables, strict=True)
        }
        self.metadata = pa.concat_tables(tables)  # as ``read_metadata`` gives it
        sample_ids = itertools.chain.from_iterable(self.shards.values())
        self._row_of = {sample_id: row for row, sample_id in enumerate(sample_ids)}
        self._fields: dict[int, TokenFields] = {}
        self._places: list[tuple[_Batch, int]] = []  # of each row
        for shard, metadata in zip(shards, tables, strict=True):
            for batch in map(_Batch, _map_tokens(shard, metadata).to_batches()):
                self._places += [(batch, row) for row in range(len(batch))]

    @cached_property
    def samples(self) -> dict[int, SampleMetadata]:
        """What ``planning`` needs, by sample id, in the order of the shards."""
        return {sample.sample_id: sample for sample in sample_metadata(self.metadata)}

    def tokens(self, sample_id: int) -> TokenFields:
        """Looked up once: every phase asks for a sample's fields again."""
        fields = self._fields.get(sample_id)
        if fields is None:
            batch, row = self._places[self._row(sample_id)]
            fields = self._fields[sample_id] = batch.fields(row)
        return fields

    def get(self, sample_id: int) -> Trajectory:
        """The trajectory as it was written."""
        fields = self.tokens(sample_id)
        context = fields.teacher_prompt_ids
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
            version_spans=fields.version_spans if len(fields.version_spans) > 1 else (),
            finish_reason=row["finish_reason"],
            reward=row["reward"],
            teacher_prompt_ids=None if context is None else tuple(context.tolist()),
        )

    def _row(self, sample_id: int) -> int:
        if sample_id not in self._row_of:
            raise MtopdError(
                f"sample {sample_id} is in no sealed shard of {self._folder}; plan from its own "
                "metadata"
            )
        return self._row_of[sample_id]


def _load_shards(folder: Path, names: Sequence[str] | None = None) -> list[Shard]:
    names = sealed_shards(folder) if names is None else names
    shards = [load_shard(folder, name) for name in names]
    if not shards:
        raise MtopdError(
            f"{folder} has no sealed shard of trajectories; run the rollout of this iteration first"
        )
    return shards


def _read_tables(shards: Sequence[Shard]) -> list[pa.Table]:
    """The metadata of each shard; a sample id stands in one of them only."""
    tables = [_read_table(shard) for shard in shards]
    owner: dict[int, Shard] = {}
    for shard, table in zip(shards, tables, strict=True):
        for sample_id in table["sample_id"].to_pylist():
            if sample_id in owner:
                raise MtopdError(
                    f"sample_id {sample_id} is in {owner[sample_id].metadata_path} and again in "
                    f"{shard.metadata_path}; it must be unique: remove one of the shards, its seal "
                    "first"
                )
            owner[sample_id] = shard
    return tables


def _read_table(shard: Shard) -> pa.Table:
    path = shard.metadata_path
    shard.check_size(path)
    data = path.read_bytes()
    shard.check_sha256(path, hashlib.sha256(data).hexdigest())
    try:
        # Another harness may mark its columns nullable or use wider integers: the cast admits both,
        # but no null.
        table = _complete(pq.read_table(pa.BufferReader(data)), shard.schema_version).cast(
            METADATA_SCHEMA
        )
    except (pa.ArrowException, ValueError) as error:
        raise MtopdError(
            f"{path} is no version {SCHEMA_VERSION} metadata: {error}; see mtopd.trajectories.format"
        ) from error
    if len(table) != shard.num_samples:
        raise damaged(path, f"it has {len(table)} samples, sealed were {shard.num_samples}")
    return table


def _complete(table: pa.Table, schema_version: int) -> pa.Table:
    """The columns of this version, in its order; what version 1 did not write follows from the rest."""
    if schema_version == 1 and "student_version" in table.column_names:
        count = len(table)
        table = table.append_column("oldest_version", table["student_version"])
        table = table.append_column("teacher_prompt_len", pa.array([0] * count, pa.int32()))
        table = table.append_column("teacher_prompt_hash", pa.array([""] * count))
    return table.select([n for n in METADATA_SCHEMA.names if n in table.column_names])


def _map_tokens(shard: Shard, metadata: pa.Table) -> pa.Table:
    """The tokens of a shard, memory-mapped."""
    path = shard.tokens_path
    shard.check_size(path)
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(path, f"it is no whole Arrow IPC file ({error})") from error
    if (reason := _format_difference(table, metadata)) is not None:
        raise MtopdError(
            f"{path} does not fit version {SCHEMA_VERSION} of the format: {reason}; see "
            "mtopd.trajectories.format"
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
    contexts = tokens["teacher_prompt_ids"]
    has_context, lengths = contexts.is_valid(), pc.list_value_length(contexts)
    if not pc.fill_null(lengths, 0).equals(metadata["teacher_prompt_len"]):
        return "the lengths of teacher_prompt_ids are not the metadata's teacher_prompt_len"
    if pc.any(pc.equal(lengths, 0)).as_py():
        return "teacher_prompt_ids is empty; null means that the teacher reads the student's prompt"
    if not pc.not_equal(metadata["teacher_prompt_hash"], "").equals(has_context):
        return "teacher_prompt_hash must be empty where teacher_prompt_ids is null, and only there"
    for column, length in LENGTH_OF.items():
        if not pc.list_value_length(tokens[column]).equals(metadata[length]):
            return f"the lengths of {column} are not the metadata's {length}"
        if pc.min(metadata[length]).as_py() < 1:
            return f"{length} is 0; it must be at least 1"
    return _span_difference(tokens, metadata) or _loss_mask_difference(tokens, metadata)


def _span_difference(tokens: pa.Table, metadata: pa.Table) -> str | None:
    """Of all samples at once: a shard may hold very many."""
    counts = pc.list_value_length(tokens["version_spans"]).to_numpy()
    if len(counts) and counts.min() < 1:
        return "version_spans of a sample is empty"
    spans = pc.list_flatten(tokens["version_spans"])
    starts, versions = (pc.struct_field(spans, name).to_numpy() for name in ("start", "version"))
    first = np.cumsum(counts) - counts
    last = first + counts - 1
    rises = np.append(np.diff(starts) > 0, True)
    rises[last] = starts[last] < metadata["response_len"].to_numpy()
    if starts[first].any() or not rises.all():
        return "version_spans begin at 0 and ascend, within the response"
    newest, oldest = (metadata[n].to_numpy() for n in ("student_version", "oldest_version"))
    if (versions[last] != newest).any() or (np.minimum.reduceat(versions, first) != oldest).any():
        return "version_spans are not those of student_version and oldest_version"
    return None


def _loss_mask_difference(tokens: pa.Table, metadata: pa.Table) -> str | None:
    mask = pc.list_flatten(tokens["loss_mask"]).to_numpy()
    has_others = mask.max() > 1
    columns = [metadata[n].to_pylist() for n in ("sample_id", "response_len", "num_loss_tokens")]
    end = 0
    for sample_id, length, num_ones in zip(*columns, strict=True):
        start, end = end, end + length
        part = mask[start:end]
        if np.count_nonzero(part) != num_ones or (has_others and part.max() > 1):
            return f"loss_mask of sample {sample_id} must hold {num_ones} ones, else zeros"
    return None
