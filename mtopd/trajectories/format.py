"""Trajectories on disk: a public format, version 2, that another harness may write too.

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
    response_len     int32                at least 1; counts the end token or stop string, which is trained and last
    num_loss_tokens  int32                ones in loss_mask
    student_version  int32                the iteration whose weights sampled the response's last token
    oldest_version   int32                the smallest version of ``version_spans``
    finish_reason    string               "stop" (at an end token or a stop string), "length", or
                                          "environment_error" (what replied between turns failed)
    reward           double, nullable     the verifier's score
    token_hash       string               ``token_hash`` of the sample's tokens, hex
    teacher_prompt_len   int32            number of teacher_prompt_ids; 0 where there are none
    teacher_prompt_hash  string           their ``teacher_prompt_hash``, hex; empty where there are none

``<name>.tokens.arrow``, an uncompressed Arrow IPC file with the same samples in the same order,
memory-mapped:

    sample_id            int64
    prompt_ids           list<int32>
    response_ids         list<int32>
    loss_mask            list<uint8>       0 or 1 for each response token; 0: not the student's, as what
                                           an environment replied between its turns
    rollout_log_probs    list<float>       of each response token, under the student that sampled it; 0
                                           where nobody sampled it
    version_spans        list<struct<start: int32, version: int32>>  ``version`` sampled from token ``start`` on;
                                           the first start is 0, they ascend, the last version is student_version
    teacher_prompt_ids   list<int32>, nullable  what the teacher reads in place of prompt_ids, before the same
                                                response; at least 1 where not null

Sealed shards are never changed.  A reader takes sealed shards only and refuses a damaged one by
file name: the metadata by its sha256 at every opening, the tokens file by ``verify_shards``, which
a run calls once per start on one rank of each node.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mtopd.files import read_json
from mtopd.types import MtopdError

SCHEMA_VERSION = 2  # 2: oldest_version, length and hash of the teacher's own prompt in the metadata
# Of version 1 every token has student_version, and the teacher reads the student's own prompt.
_READ = (1, SCHEMA_VERSION)
SEAL_SUFFIX = ".sealed.json"
FINISH_REASONS = ("stop", "length", "environment_error")

_METADATA_TYPES = {
    "sample_id": pa.int64(),
    "prompt_id": pa.string(),
    "route": pa.map_(pa.string(), pa.string()),
    "teacher_index": pa.int32(),
    "prompt_len": pa.int32(),
    "response_len": pa.int32(),
    "num_loss_tokens": pa.int32(),
    "student_version": pa.int32(),
    "oldest_version": pa.int32(),
    "finish_reason": pa.string(),
    "reward": pa.float64(),
    "token_hash": pa.string(),
    "teacher_prompt_len": pa.int32(),
    "teacher_prompt_hash": pa.string(),
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
LENGTH_OF = {
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


def teacher_prompt_hash(teacher_prompt_ids: npt.ArrayLike) -> str:
    """sha256, hex, over the ids as little-endian int32."""
    return hashlib.sha256(np.asarray(teacher_prompt_ids, "<i4").tobytes()).hexdigest()


@dataclass(frozen=True)
class Shard:
    """A sealed shard: where it is, and what its seal says of it."""

    folder: Path
    name: str
    schema_version: int
    generation: int
    num_samples: int
    files: Mapping[str, Mapping[str, int | str]]  # file name -> its sealed size and sha256

    @property
    def metadata_path(self) -> Path:
        return metadata_path(self.folder, self.name)

    @property
    def tokens_path(self) -> Path:
        return tokens_path(self.folder, self.name)

    def check_size(self, path: Path) -> None:
        """Raise MtopdError when one of the files has not the sealed size."""
        size, sealed = _size(path), self.files[path.name]["size"]
        if size != sealed:
            raise damaged(path, f"it has {size or 'no'} bytes, sealed were {sealed}")

    def check_sha256(self, path: Path, found: str) -> None:
        if found != self.files[path.name]["sha256"]:
            raise damaged(path, "its sha256 is not the sealed one")


def load_shard(folder: Path, name: str) -> Shard:
    """Read the seal of a shard; no other file."""
    path = seal_path(folder, name)
    seal = read_json(path)
    version = seal.get("schema_version") if isinstance(seal, dict) else None
    if version not in _READ:
        raise MtopdError(
            f"{path} has schema_version {version!r}; this version of mtopd reads "
            f"{' and '.join(map(str, _READ))}"
        )
    files = [metadata_path(folder, name).name, tokens_path(folder, name).name]
    if not {"generation", "num_samples", "files"} <= seal.keys() or sorted(seal["files"]) != files:
        raise damaged(
            path, f"it must hold generation, num_samples and files with {' and '.join(files)}"
        )
    return Shard(folder, name, version, seal["generation"], seal["num_samples"], seal["files"])


def sealed_shards(folder: Path) -> list[str]:
    """Names of the shards that have a seal, sorted."""
    return sorted(path.name.removesuffix(SEAL_SUFFIX) for path in folder.glob("*" + SEAL_SUFFIX))


def shard_is_sealed(folder: Path, name: str) -> bool:
    """Whether the shard has a seal and both files have the sealed sizes.  Reads no data."""
    if not seal_path(folder, name).exists():
        return False
    shard = load_shard(folder, name)
    return all(_size(folder / file) == sealed["size"] for file, sealed in shard.files.items())


def seal_hashes(folder: Path) -> dict[str, str]:
    """sha256, hex, of the seal of each sealed shard: the seal of the folder holds them, so that a
    shard that vanishes or is sealed again is found.
    """
    names = sealed_shards(folder)
    return {n: hashlib.sha256(seal_path(folder, n).read_bytes()).hexdigest() for n in names}


def check_seals(folder: Path, seals: Mapping[str, str]) -> None:
    """The shards are those that were there when the folder was sealed.  Raises MtopdError."""
    found = seal_hashes(folder)
    for name in sorted(found.keys() | seals.keys()):
        if found.get(name) != seals.get(name):
            what = "is gone" if name not in found else "was sealed again since"
            what = "was put there since" if name not in seals else what
            raise MtopdError(
                f"shard {name} of {folder} {what}: the folder's seal has other shards; put it back "
                "as it was, or remove the folder and make the iteration's trajectories again"
            )


def metadata_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.meta.parquet"


def tokens_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.tokens.arrow"


def seal_path(folder: Path, name: str) -> Path:
    return folder / (name + SEAL_SUFFIX)


def damaged(path: Path, what: str) -> MtopdError:
    return MtopdError(
        f"{path} is damaged: {what}; remove the shard, its seal first, and roll it out again"
    )


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
