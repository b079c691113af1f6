"""The format of a shard, as another harness would read and write it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa

from mtopd.trajectories import format as format_module
from mtopd.trajectories import (
    token_hash,
)
from tests.trajectories.shards import trajectory


def test_the_files_are_what_the_docstring_says(folder: Path) -> None:
    """Read without mtopd, as another harness would."""
    seal = json.loads((folder / "a.sealed.json").read_text())
    assert (seal["schema_version"], seal["generation"], seal["num_samples"]) == (1, 1, 4)
    assert sorted(seal["files"]) == ["a.meta.parquet", "a.tokens.arrow"]
    for name, entry in seal["files"].items():
        assert entry["size"] == (folder / name).stat().st_size
    with pa.memory_map(str(folder / "a.tokens.arrow")) as source:
        rows = pa.ipc.open_file(source).read_all().to_pylist()
    assert rows[2]["response_ids"] == list(trajectory(2).response_ids)
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
