"""A teacher on storage: ``teachers/<name>/`` with ``teacher.json``, safetensors files and the tokenizer.

    teacher.json                  architecture, vocabulary, tokenizer hash, head transform, file table, fingerprint
    tokenizer/                    the teacher's HF tokenizer, to name a differing token
    embedding.safetensors         slice.0000/weight [V / slices, E], slice.0001/weight, ...  (rows in order)
    layers/00000.safetensors      common/<name> (what tp replicates), then for each slice slice.0000/<name>, ...
    final_norm.safetensors        common/weight
    head.safetensors              like the embedding; absent when the embedding is tied

Inside a file the *sections* (header, common, slice 0, slice 1, ...) follow one another without gaps, so the part of
a tp rank is one contiguous range.  Gate and up are separate tensors and row-parallel weights are stored transposed
(suffix ``.T``): slices join along dim 0.  A matrix whose rows do not divide by the slice count ends in zero rows.

Checksums: crc32c of every block of 4 MiB, blocks starting anew at each section, so that a rank's part is a whole
number of blocks; ``sha256`` of a file is taken over its table of (offset, length, crc32c); the fingerprint is the
sha256 over the sorted (path, sha256) table.  Two stores with one fingerprint hold the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import google_crc32c
import numpy as np

from mtopd.run_dir import fsync_dir, read_json, write_json
from mtopd.safetensors_file import TensorEntry, header_bytes, read_header
from mtopd.types import MtopdError

SCHEMA = "mtopd.teacher_store/1"
BLOCK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Block:
    """``crc32c`` covers the file's bytes [start, stop)."""

    start: int
    stop: int
    crc32c: int


@dataclass(frozen=True)
class StoreFile:
    """One safetensors file of a store, as its manifest describes it."""

    path: Path
    entries: tuple[TensorEntry, ...]
    blocks: tuple[Block, ...]  # header section first

    def section(self, prefix: str) -> tuple[TensorEntry, ...]:
        """Entries whose name starts with "<prefix>/", in file order."""
        return tuple(e for e in self.entries if e.name.startswith(prefix + "/"))

    def slices(self, first: int, count: int) -> tuple[TensorEntry, ...]:
        return tuple(e for i in range(first, first + count) for e in self.section(f"slice.{i:04d}"))

    def blocks_of(self, start: int, stop: int) -> tuple[Block, ...]:
        """Blocks that touch [start, stop)."""
        return tuple(b for b in self.blocks if b.start < stop and b.stop > start)


@dataclass(frozen=True)
class TeacherStore:
    """An opened store.  ``manifest`` is the parsed teacher.json."""

    folder: Path
    manifest: Mapping[str, Any]
    files: Mapping[str, StoreFile]

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    @property
    def slices(self) -> int:
        return int(self.manifest["slices"])

    @property
    def num_layers(self) -> int:
        return int(self.manifest["num_layers"])

    @property
    def hidden_size(self) -> int:
        return int(self.manifest["hidden_size"])

    @property
    def vocab_size(self) -> int:
        return int(self.manifest["vocab_size"])

    @property
    def dtype(self) -> str:
        """safetensors' spelling of the stored dtype: "F32" or "BF16"."""
        return str(self.manifest["stored_dtype"])

    def layer(self, index: int) -> StoreFile:
        return self.files[layer_path(index)]

    @property
    def head(self) -> StoreFile:
        return self.files.get("head.safetensors", self.files["embedding.safetensors"])

    def pass_bytes(self) -> int:
        """Bytes one teacher pass needs: tensors of embedding, layers and final norm; not an untied head."""
        return sum(
            e.stop - e.start for path, file in self.files.items() if path != "head.safetensors" for e in file.entries
        )


def layer_path(index: int) -> str:
    return f"layers/{index:05d}.safetensors"


# -- writing ----------------------------------------------------------------------------------------------------------


def write_store_file(path: Path, tensors: Sequence[tuple[str, np.ndarray, str]]) -> dict[str, Any]:
    """Write (name, contiguous array, safetensors dtype) in order; returns the file's manifest entry.

    Arrays of bfloat16 come as their uint16 bits.  The caller owns the folder and publishes it when it is whole.
    """
    header = header_bytes([(name, dtype, array.shape) for name, array, dtype in tensors])
    path.parent.mkdir(parents=True, exist_ok=True)
    sections: dict[str, list[np.ndarray]] = {}
    for name, array, _ in tensors:
        sections.setdefault(name.partition("/")[0], []).append(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    crcs: list[int] = []
    with open(path, "wb") as file:
        for chunks in ([np.frombuffer(header, np.uint8)], *sections.values()):
            for chunk in chunks:
                file.write(chunk.data)
            crcs += _section_crcs(chunks)
        file.flush()
        os.fsync(file.fileno())
    fsync_dir(path.parent)
    entries = read_header(path)
    blocks = _blocks(entries, len(header), crcs)
    return {
        "size": path.stat().st_size,
        "tensors": [[e.name, e.dtype, list(e.shape), e.start, e.stop] for e in entries],
        "header_bytes": len(header),
        "block_crc32c": crcs,
        "sha256": block_table_sha256(blocks),
    }


def _section_crcs(chunks: Iterable[np.ndarray]) -> list[int]:
    crcs, crc, filled = [], 0, 0
    for chunk in chunks:
        position = 0
        while position < len(chunk):
            take = min(len(chunk) - position, BLOCK_BYTES - filled)
            crc = google_crc32c.extend(crc, chunk[position : position + take])
            position, filled = position + take, filled + take
            if filled == BLOCK_BYTES:
                crcs.append(crc)
                crc, filled = 0, 0
    return [*crcs, crc] if filled else crcs


def _blocks(entries: Sequence[TensorEntry], header: int, crcs: Sequence[int]) -> tuple[Block, ...]:
    bounds = [(0, header)]
    section = None
    for entry in entries:
        prefix = entry.name.partition("/")[0]
        if prefix == section:
            bounds[-1] = (bounds[-1][0], entry.stop)
        else:
            bounds.append((entry.start, entry.stop))
            section = prefix
    ranges = [(s, min(s + BLOCK_BYTES, stop)) for start, stop in bounds for s in range(start, stop, BLOCK_BYTES)]
    if len(ranges) != len(crcs):
        raise MtopdError(f"file table lists {len(crcs)} block checksums, its tensors make {len(ranges)} blocks")
    return tuple(Block(start, stop, crc) for (start, stop), crc in zip(ranges, crcs, strict=True))


def block_table_sha256(blocks: Iterable[Block]) -> str:
    return hashlib.sha256(
        b"".join(struct.pack("<QQI", b.start, b.stop - b.start, b.crc32c) for b in blocks)
    ).hexdigest()


def fingerprint(files: Mapping[str, Mapping[str, Any]]) -> str:
    table = "".join(f"{path}\0{entry['sha256']}\n" for path, entry in sorted(files.items()))
    return hashlib.sha256(table.encode()).hexdigest()


def write_manifest(folder: Path, manifest: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> None:
    write_json(
        folder / "teacher.json", {"schema": SCHEMA, **manifest, "files": files, "fingerprint": fingerprint(files)}
    )


# -- opening ----------------------------------------------------------------------------------------------------------


def open_store(folder: Path) -> TeacherStore:
    """Open a store after checking its manifest, every file's size and every header; no tensor is read.

    Raises MtopdError that names the store, what is wrong and what to do.
    """
    path = folder / "teacher.json"
    if not path.is_file():
        raise MtopdError(
            f"there is no teacher store at {folder} (no teacher.json); write one with `mtopd teachers add`"
        )
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        found = manifest.get("schema") if isinstance(manifest, dict) else None
        raise MtopdError(f"{path} has schema {found!r}, this version reads {SCHEMA!r}")
    try:
        files = {name: _open_file(folder, name, entry) for name, entry in manifest["files"].items()}
        store = TeacherStore(folder, manifest, files)
        missing = {"embedding.safetensors", "final_norm.safetensors", *map(layer_path, range(store.num_layers))} - set(
            files
        )
        if missing:
            raise MtopdError(f"{path} lists no {sorted(missing)[0]}; write the store again with `mtopd teachers add`")
        if fingerprint(manifest["files"]) != store.fingerprint:
            raise MtopdError(
                f"{path} was changed: its fingerprint does not match its file table; write the store again"
            )
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise MtopdError(f"{path} is malformed ({type(error).__name__}: {error}); write the store again") from None
    return store


def _open_file(folder: Path, name: str, entry: Mapping[str, Any]) -> StoreFile:
    parts = PurePosixPath(name).parts
    path = folder.joinpath(*parts)
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts:
        raise MtopdError(f"{folder / 'teacher.json'} names {name!r}; a file of a store lies inside its folder")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise MtopdError(f"{path} is a link out of the store; a file of a store lies inside its folder")
    if not path.is_file():
        raise MtopdError(f"teacher store {folder} lacks {name}; copy it again or write it with `mtopd teachers add`")
    size = path.stat().st_size
    if size != entry["size"]:
        raise MtopdError(
            f"{path} has {size} bytes, its manifest says {entry['size']} (truncated?); copy the store again"
        )
    entries = tuple(read_header(path))
    if [[e.name, e.dtype, list(e.shape), e.start, e.stop] for e in entries] != entry["tensors"]:
        raise MtopdError(f"{path} holds other tensors than its manifest says; copy the store again")
    blocks = _blocks(entries, int(entry["header_bytes"]), entry["block_crc32c"])
    if block_table_sha256(blocks) != entry["sha256"]:
        raise MtopdError(f"{path}: the manifest's block checksums do not match its sha256; copy the store again")
    return StoreFile(path, entries, blocks)


def read_blocks(file: StoreFile, blocks: Sequence[Block], out: np.ndarray) -> int:
    """Read consecutive whole blocks into ``out`` (uint8) and verify each; returns the bytes read.

    Raises MtopdError when a block's checksum differs.
    """
    if not blocks:
        return 0
    start, stop = blocks[0].start, blocks[-1].stop
    assert len(out) == stop - start, (len(out), start, stop)
    descriptor = os.open(file.path, os.O_RDONLY)
    try:
        done = 0
        while done < len(out):
            got = os.preadv(descriptor, [out[done:].data], start + done)
            if got == 0:
                raise MtopdError(f"{file.path} ends at byte {start + done}, {stop} were expected; copy the store again")
            done += got
    finally:
        os.close(descriptor)
    for block in blocks:
        if google_crc32c.value(out[block.start - start : block.stop - start]) != block.crc32c:
            raise MtopdError(
                f"{file.path}: bytes {block.start}..{block.stop} do not match their checksum; copy the store again"
            )
    return stop - start


def read_range(file: StoreFile, start: int, stop: int) -> tuple[np.ndarray, int]:
    """Bytes [start, stop) as uint8, verified through the blocks that cover them, and the bytes read for that."""
    blocks = file.blocks_of(start, stop)
    buffer = np.empty(blocks[-1].stop - blocks[0].start, np.uint8)
    count = read_blocks(file, blocks, buffer)
    return buffer[start - blocks[0].start : stop - blocks[0].start], count
