"""Shards for the tests of trajectories, and ways to damage them."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

from mtopd.types import Trajectory


def trajectory(sample_id: int, response_len: int = 5, **changes) -> Trajectory:
    rng = random.Random(sample_id)
    values = {
        "sample_id": sample_id,
        "prompt_id": f"rot/{sample_id}",
        "route": {"domain": "rot", "effort": "high"},
        "teacher_index": sample_id % 3,
        "prompt_ids": tuple(rng.randrange(100) for _ in range(1 + sample_id % 4)),
        "response_ids": tuple(rng.randrange(100) for _ in range(response_len)),
        "loss_mask": tuple(rng.randrange(2) for _ in range(response_len)),
        "rollout_log_probs": tuple(-rng.randrange(64) / 8 for _ in range(response_len)),
        "student_version": 7,
        "finish_reason": "stop" if sample_id % 2 else "length",
        "reward": None if sample_id % 2 else 0.1,
        "teacher_prompt_ids": tuple(range(3 + sample_id)) if sample_id % 4 == 2 else None,
    }
    return Trajectory(**{**values, **changes})


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def reseal(folder: Path, name: str) -> None:
    """Seal whatever files are there, as a careless harness would."""
    seal = json.loads((folder / f"{name}.sealed.json").read_text())
    for file in seal["files"]:
        data = (folder / file).read_bytes()
        seal["files"][file] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / f"{name}.sealed.json").write_text(json.dumps(seal))
