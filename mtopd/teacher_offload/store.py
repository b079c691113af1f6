"""A teacher on storage, read: ``teachers/<name>/`` with ``teacher.json``, safetensors files and the
tokenizer.

    teacher.json                  architecture, vocabulary, tokenizer hash, head transform, file table, fingerprint
    tokenizer/                    the teacher's HF tokenizer, to name a differing token
    embedding.safetensors         slice.0000/weight [V / slices, E], slice.0001/weight, ...  (rows in order)
    layers/00000.safetensors      common/<name> (what tp replicates), then for each slice slice.0000/<name>, ...
    experts/00000.safetensors     of a layer with experts: expert.0000/<name>, ..., expert.0001/<name>, ...
    final_norm.safetensors        common/weight
    head.safetensors              like the embedding; absent when the embedding is tied

Inside a file the *sections* (header, common, slice 0, slice 1, ..., or expert 0, expert 1, ...)
follow one another without gaps, so the part of a tp or expert-parallel rank is one contiguous
range.  Gate and up are separate tensors and row-parallel weights are stored transposed (suffix
``.T``): slices join along dim 0.  A matrix whose rows do not divide by the slice count ends in zero
rows.  Inside a section wider dtypes come first, so that all tensors are aligned.

Checksums: crc32c of every block of 4 MiB, blocks starting anew at each section, so that a rank's
part is a whole number of blocks; ``sha256`` of a file is taken over its table of (offset, length,
crc32c); the fingerprint is the sha256 over the sorted (path, sha256) table.  Two stores with one
fingerprint hold the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import google_crc32c
import numpy as np

from mtopd.dtypes import dtype_name
from mtopd.files import LFS_POINTER
from mtopd.safetensors_file import MAX_HEADER_BYTES, TensorEntry, checked_entries, parse_header
from mtopd.teacher_offload import names
from mtopd.teacher_offload.storage import Storage, open_storage
from mtopd.types import HeadTransform, MtopdError

SCHEMA = "mtopd.teacher_store/2"
BLOCK_BYTES = 4 << 20
_MANIFEST_LIMIT = 256 << 20
_TOKENIZER_FILE_LIMIT = 256 << 20
_POINTER_LIMIT = 1024  # bytes; git-lfs writes no longer ones
_IS_POINTER = "is a git-lfs pointer, not the file; fetch it with git lfs pull"
_CHECKING_THREADS = 16  # headers are small: their time is round trips


class DamagedBlock(MtopdError):
    """Bytes that do not match their checksum."""


@dataclass(frozen=True, slots=True)
class Block:
    """``crc32c`` covers the file's bytes [start, stop)."""

    start: int
    stop: int
    crc32c: int


@dataclass(frozen=True)
class StoreFile:
    """One safetensors file of a store, as its manifest describes it."""

    storage: Storage
    path: str  # in the store
    entries: tuple[TensorEntry, ...]
    blocks: tuple[Block, ...]  # header section first

    @property
    def label(self) -> str:
        return f"{self.storage.location}/{self.path}"

    @property
    def size(self) -> int:
        return self.blocks[-1].stop

    @cached_property
    def _sections(self) -> dict[str, tuple[TensorEntry, ...]]:
        sections: dict[str, list[TensorEntry]] = {}
        for entry in self.entries:
            sections.setdefault(names.section_of(entry.name), []).append(entry)
        return {section: tuple(entries) for section, entries in sections.items()}

    @property
    def num_sections(self) -> int:
        return len(self._sections)

    def common(self) -> tuple[TensorEntry, ...]:
        """Tensors that tp replicates, in file order."""
        return self._sections.get(names.COMMON, ())

    def slices(self, first: int, count: int) -> tuple[TensorEntry, ...]:
        return self._joined(map(names.slice_section, range(first, first + count)))

    def experts(self, first: int, count: int) -> tuple[TensorEntry, ...]:
        return self._joined(map(names.expert_section, range(first, first + count)))

    def _joined(self, sections: Iterable[str]) -> tuple[TensorEntry, ...]:
        return tuple(e for section in sections for e in self._sections.get(section, ()))

    def blocks_of(self, start: int, stop: int) -> tuple[Block, ...]:
        """Blocks that touch [start, stop)."""
        return tuple(b for b in self.blocks if b.start < stop and b.stop > start)

    def requests(self, blocks: Sequence[Block]) -> Iterator[Sequence[Block]]:
        """Consecutive ``blocks`` cut into runs of at most the storage's request size (one block
        always fits).
        """
        first = 0
        for i, block in enumerate(blocks):
            if i > first and block.stop - blocks[first].start > self.storage.request_bytes:
                yield blocks[first:i]
                first = i
        if blocks:
            yield blocks[first:]


@dataclass(frozen=True)
class TeacherStore:
    """An opened store.  ``manifest`` is the parsed teacher.json.

    In a run the teacher has the name that the config gives it, whatever the store was added as: two
    names on one store are two teachers.
    """

    storage: Storage
    manifest: Mapping[str, Any]
    files: Mapping[str, StoreFile]
    name: str

    @property
    def location(self) -> str:
        return self.storage.location

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
    def num_experts(self) -> int:
        """Experts of each layer that has them; 0 for a dense teacher."""
        return int(self.manifest["num_experts"])

    @property
    def dtype(self) -> str:
        """The dtype the teacher computes in, which its embedding and head have: "float32" or
        "bfloat16".
        """
        return dtype_name(self.manifest["stored_dtype"])

    @property
    def head_transform(self) -> HeadTransform:
        """What the teacher does to its logits after the output layer."""
        head = self.manifest["head"]
        return HeadTransform(float(head["scale"]), head["softcap"])

    def layer(self, index: int) -> StoreFile:
        return self.files[names.layer_path(index)]

    def experts(self, layer: int) -> StoreFile | None:
        """The experts' file of a layer; None for a dense layer."""
        return self.files.get(names.experts_path(layer))

    @property
    def embedding(self) -> StoreFile:
        return self.files[names.EMBEDDING]

    @property
    def final_norm(self) -> StoreFile:
        return self.files[names.FINAL_NORM]

    @property
    def head(self) -> StoreFile:
        return self.files.get(names.HEAD, self.embedding)

    def pass_bytes(self) -> int:
        """Bytes one teacher pass needs: tensors of embedding, layers, experts and final norm; not
        an untied head.
        """
        return sum(
            e.stop - e.start
            for path, file in self.files.items()
            if path != names.HEAD
            for e in file.entries
        )

    @contextlib.contextmanager
    def tokenizer_folder(self) -> Iterator[Path]:
        """A temporary folder with the teacher's tokenizer.  Raises MtopdError when a file of it is
        damaged.
        """
        with tempfile.TemporaryDirectory(prefix="mtopd-tokenizer-") as temporary:
            for path, sha256 in self.manifest["tokenizer_sha256"].items():
                stored = names.tokenizer_path(_relative(self.location, path))
                data = self.storage.read(stored, _TOKENIZER_FILE_LIMIT)
                if data is None or hashlib.sha256(data).hexdigest() != sha256:
                    raise MtopdError(
                        f"{self.location}/{stored} is missing or damaged; copy the store again"
                    )
                target = Path(temporary, path)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
            yield Path(temporary)


# -- checksums -------------------------------------------------------------------------------------


def block_ranges(entries: Sequence[TensorEntry], header: int) -> list[tuple[int, int]]:
    """[start, stop) of every block of a file with ``header`` bytes of header: each section in steps
    of BLOCK_BYTES.
    """
    bounds = [(0, header)]
    section = None
    for entry in entries:
        prefix = names.section_of(entry.name)
        if prefix == section:
            bounds[-1] = (bounds[-1][0], entry.stop)
        else:
            bounds.append((entry.start, entry.stop))
            section = prefix
    return [
        (s, min(s + BLOCK_BYTES, stop))
        for start, stop in bounds
        for s in range(start, stop, BLOCK_BYTES)
    ]


def block_table_sha256(blocks: Iterable[Block]) -> str:
    return hashlib.sha256(
        b"".join(struct.pack("<QQI", b.start, b.stop - b.start, b.crc32c) for b in blocks)
    ).hexdigest()


def fingerprint(files: Mapping[str, Mapping[str, Any]]) -> str:
    table = "".join(f"{path}\0{entry['sha256']}\n" for path, entry in sorted(files.items()))
    return hashlib.sha256(table.encode()).hexdigest()


# -- opening ---------------------------------------------------------------------------------------


def open_store(
    location: str | Path, *, name: str | None = None, expected: str | None = None
) -> TeacherStore:
    """Open a store, a folder or a URL, after checking that its manifest agrees with itself.

    Only the manifest is read: the bytes of the files are checked block by block when they are, and
    whether they are all there by ``check_files``, once before the ranks start.  ``name``: what a
    run calls the teacher, otherwise as it was added.  ``expected``: the fingerprint it has to have.
    Raises MtopdError that names the store, what is wrong and what to
    do.
    """
    storage = open_storage(location)
    manifest_path = f"{storage.location}/{names.MANIFEST}"
    text = storage.read(names.MANIFEST, _MANIFEST_LIMIT)
    if text is None:
        raise MtopdError(
            f"there is no teacher store at {storage.location} (no teacher.json); "
            + _how_to_write(location, name)
        )
    if text.startswith(LFS_POINTER):
        raise MtopdError(f"{manifest_path} {_IS_POINTER}")
    try:
        manifest = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MtopdError(
            f"{manifest_path} is not valid JSON ({error}); it was damaged: copy the store again"
        ) from None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        found = manifest.get("schema") if isinstance(manifest, dict) else None
        raise MtopdError(
            f"{manifest_path} has schema {found!r}, this version reads {SCHEMA!r}; write the "
            "store again with `mtopd teachers add`"
        )
    try:
        files = {
            path: file_in_manifest(storage, path, entry)
            for path, entry in manifest["files"].items()
        }
        store = TeacherStore(storage, manifest, files, name or str(manifest["name"]))
        needed = {
            names.EMBEDDING,
            names.FINAL_NORM,
            *map(names.layer_path, range(store.num_layers)),
        }
        if missing := needed - set(store.files):
            raise MtopdError(
                f"{manifest_path} lists no {sorted(missing)[0]}; write the store again with `mtopd "
                "teachers add`"
            )
        # The fingerprint stands for every byte: file table -> sha256 -> block checksums -> bytes.
        if fingerprint(manifest["files"]) != store.fingerprint:
            raise MtopdError(
                f"{manifest_path} was changed: its fingerprint does not match its file table; "
                "write the store again"
            )
        for path, file in store.files.items():
            if names.is_experts_path(path) and file.num_sections != store.num_experts:
                raise MtopdError(
                    f"{manifest_path} tells of {store.num_experts} experts, {path} has "
                    f"{file.num_sections}"
                )
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        if isinstance(error, MtopdError):
            raise
        raise MtopdError(
            f"{manifest_path} is malformed ({type(error).__name__}: {error}); write the store again"
        ) from None
    if expected is not None and store.fingerprint != expected:
        raise MtopdError(
            f"{store.location} holds the fingerprint {store.fingerprint[:16]}, the run began with "
            f"{expected[:16]}: the store was replaced; start the same command again"
        )
    return store


def _how_to_write(location: str | Path, name: str | None) -> str:
    folder = Path(location)
    if not (folder / "config.json").is_file():
        return "write one with `mtopd teachers add`"
    name = shlex.quote(name or folder.name)
    return (
        f"it is a Hugging Face folder: `mtopd teachers add {name} --from {shlex.quote(str(folder))} "
        f"--slices auto` makes the store teachers/{name} of it"
    )


def file_in_manifest(storage: Storage, path: str, entry: Mapping[str, Any]) -> StoreFile:
    """One file of a store by its entry of the manifest, which has to agree with itself."""
    label = f"{storage.location}/{_relative(storage.location, path)}"
    size = int(entry["size"])
    header = int(entry["header_bytes"])

    def refuse(problem: str) -> MtopdError:
        return MtopdError(f"{label}: the manifest is malformed: {problem}; copy the store again")

    if not 0 < header <= min(size, 8 + MAX_HEADER_BYTES):
        raise refuse(f"a header of {header} bytes in a file of {size}")
    rows = (
        (name, dtype, shape, start - header, stop - header)
        for name, dtype, shape, start, stop in entry["tensors"]
    )
    entries = tuple(checked_entries(rows, header, size, refuse))
    ranges = block_ranges(entries, header)
    crcs = entry["block_crc32c"]
    if len(ranges) != len(crcs):
        raise MtopdError(
            f"{label}: the manifest lists {len(crcs)} block checksums for {len(ranges)} blocks"
        )
    blocks = tuple(Block(start, stop, crc) for (start, stop), crc in zip(ranges, crcs, strict=True))
    if block_table_sha256(blocks) != entry["sha256"]:
        raise MtopdError(
            f"{label}: the manifest's block checksums do not match its sha256; copy the store again"
        )
    return StoreFile(storage, path, entries, blocks)


def check_files(store: TeacherStore) -> TeacherStore:
    """The store, after every file's size and header were compared with its manifest.

    No tensor is read.  Raises MtopdError that names the file.
    """
    with ThreadPoolExecutor(_CHECKING_THREADS, thread_name_prefix="check-store") as pool:
        list(pool.map(check_file, store.files.values()))
    return store


def check_file(file: StoreFile) -> None:
    """Raises MtopdError unless the file is there and its size and header are as in the manifest."""
    location = file.storage.location
    size = file.storage.size(file.path)
    if size is None:
        raise MtopdError(
            f"teacher store {location} lacks {file.path}; copy it again or write it with `mtopd "
            "teachers add`"
        )
    if size != file.size:
        start = file.storage.read(file.path, size) if size < _POINTER_LIMIT else None
        if start is not None and start.startswith(LFS_POINTER):
            raise MtopdError(f"{file.label} {_IS_POINTER}")
        raise MtopdError(
            f"{file.label} has {size} bytes, its manifest says {file.size} (truncated?); copy the "
            "store again"
        )
    data = np.empty(file.entries[0].start, np.uint8)
    file.storage.read_into(file.path, 0, data)
    if tuple(parse_header(file.label, data.tobytes(), size)) != file.entries:
        raise MtopdError(
            f"{file.label} holds other tensors than its manifest says; copy the store again"
        )


def _relative(location: str, path: str) -> str:
    """``path`` of a manifest, when it stays inside the store."""
    pure = PurePosixPath(path)
    if not pure.parts or pure.is_absolute() or ".." in pure.parts or str(pure) != path:
        raise MtopdError(
            f"{location}/teacher.json names {path!r}; a file of a store lies inside its folder"
        )
    return path


# -- reading ---------------------------------------------------------------------------------------


def read_blocks(file: StoreFile, blocks: Sequence[Block], out: np.ndarray) -> int:
    """Read consecutive whole blocks into ``out`` (uint8) in one request and verify each; returns
    the bytes read.

    May be called from many threads.  Raises DamagedBlock when a block's checksum differs.
    """
    if not blocks:
        return 0
    start, stop = blocks[0].start, blocks[-1].stop
    assert len(out) == stop - start, (len(out), start, stop)
    file.storage.read_into(file.path, start, out)
    for block in blocks:
        if google_crc32c.value(out[block.start - start : block.stop - start]) != block.crc32c:
            raise DamagedBlock(
                f"{file.label}: bytes {block.start}..{block.stop} do not match their checksum; "
                "copy the store again"
            )
    return stop - start


def read_range(file: StoreFile, start: int, stop: int) -> tuple[np.ndarray, int]:
    """Bytes [start, stop) as uint8, verified through the blocks that cover them, and the bytes read
    for that.
    """
    blocks = file.blocks_of(start, stop)
    base = blocks[0].start
    buffer = np.empty(blocks[-1].stop - base, np.uint8)
    count = sum(
        read_blocks(file, run, buffer[run[0].start - base : run[-1].stop - base])
        for run in file.requests(blocks)
    )
    return buffer[start - base : stop - base], count


def damaged_blocks(
    file: StoreFile, progress: Callable[[int], None] = lambda count: None
) -> list[str]:
    """Read a whole file; one message for each block that does not match its checksum.  ``progress``
    takes bytes.
    """
    found: list[str] = []
    for run in file.requests(file.blocks):
        buffer = np.empty(run[-1].stop - run[0].start, np.uint8)
        try:
            read_blocks(file, run, buffer)
        except DamagedBlock:
            for block in run:
                try:
                    read_blocks(file, [block], buffer[: block.stop - block.start])
                except DamagedBlock as error:
                    found.append(str(error))
        progress(len(buffer))
    return found
