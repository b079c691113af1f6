"""Rows as another harness writes them, and files of them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def row(sample_id: int = 0, /, **changes: Any) -> dict[str, Any]:
    """``None`` takes a column out."""
    values = {
        "format": "mtopd-trajectory-1",
        "sample_id": sample_id,
        "prompt_id": f"theirs/{sample_id}",
        "prompt_ids": [5, 6, 7 + sample_id % 3],
        "response_ids": [8, 9, 1],
        "loss_mask": [1, 0, 1],
        "rollout_log_probs": [-0.5, -1.25, 0.0],
        "student_version": 0,
        "finish_reason": "stop",
        "teacher": "t0",
    }
    return {name: v for name, v in {**values, **changes}.items() if v is not None}


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """In the format that the path's ending names; Parquet in one row group."""
    if path.suffix == ".parquet":
        names = dict.fromkeys(name for values in rows for name in values)
        table = pa.table({name: pa.array([r.get(name) for r in rows]) for name in names})
        pq.write_table(table, path, row_group_size=len(rows))
        return path
    text = "".join(json.dumps(values) + "\n" for values in rows).encode()
    if path.suffix == ".gz":
        text = gzip.compress(text)
    if path.suffix == ".zst":
        text = pa.compress(text, "zstd", asbytes=True)
    path.write_bytes(text)
    return path
