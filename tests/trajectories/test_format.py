"""The format of a shard, as another harness would read and write it."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mtopd.trajectories import check_seals, seal_hashes, token_hash
from mtopd.trajectories import format as format_module
from mtopd.types import MtopdError
from tests.trajectories.shards import trajectory


def test_the_files_are_what_the_docstring_says(folder: Path) -> None:
    """Read without mtopd, as another harness would."""
    seal = json.loads((folder / "a.sealed.json").read_text())
    assert (seal["schema_version"], seal["generation"], seal["num_samples"]) == (2, 1, 4)
    assert sorted(seal["files"]) == ["a.meta.parquet", "a.tokens.arrow"]
    for name, entry in seal["files"].items():
        assert entry["size"] == (folder / name).stat().st_size
    with pa.memory_map(str(folder / "a.tokens.arrow")) as source:
        rows = pa.ipc.open_file(source).read_all().to_pylist()
    assert rows[2]["response_ids"] == list(trajectory(2).response_ids)
    assert (
        rows[2]["teacher_prompt_ids"] == [0, 1, 2, 3, 4] and rows[1]["teacher_prompt_ids"] is None
    )
    row = pq.read_table(folder / "a.meta.parquet").to_pylist()[2]
    hashed = hashlib.sha256(struct.pack("<5i", *range(5))).hexdigest()
    assert (row["teacher_prompt_len"], row["teacher_prompt_hash"]) == (5, hashed)
    assert rows[2]["version_spans"] == [{"start": 0, "version": 7}]
    assert f"{format_module.__doc__}".count("list<int32>") == 3


def test_token_hash_is_fixed_by_the_format_and_separates_the_fields() -> None:
    # sha256 of 24 bytes of lengths, then 4-byte ids and 1-byte mask values, computed apart from
    # this code.
    assert (
        token_hash([1, 2], [3], [1])
        == "0150db95d939b90de67923f88b01f92d6eee39ee92b0348ec8a6d9980bad709f"
    )
    hashes = {
        token_hash([1, 2], [3], [1]),
        token_hash([1], [2, 3], [1]),
        token_hash([1, 2], [3], [0]),
    }
    assert len(hashes | {token_hash([1, 2, 3], [], [1]), token_hash([2, 1], [3], [1])}) == 5


def test_trajectories_import_no_torch() -> None:
    code = "import sys, mtopd.trajectories; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_shard_that_vanishes_or_is_sealed_again_is_found(folder: Path) -> None:
    sealed = seal_hashes(folder)
    check_seals(folder, sealed)
    path = folder / "b.sealed.json"
    whole = path.read_text()
    path.write_text(whole.replace('"generation": 2', '"generation": 3'))
    with pytest.raises(MtopdError, match=r"shard b of .* was sealed again since"):
        check_seals(folder, sealed)
    path.unlink()
    with pytest.raises(MtopdError, match=r"shard b of .* is gone"):
        check_seals(folder, sealed)
    path.write_text(whole)
    with pytest.raises(MtopdError, match=r"shard b of .* was put there since"):
        check_seals(folder, {"a": sealed["a"]})
