"""Checksums of what was sent, and bounds of the probe, without a server."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch

from mtopd.rollout.sglang_proof import EXACT, ROUNDED, ProbeBound, SentChecksums

ATTENTION = "model.layers.0.self_attn"


def digest(*tensors: torch.Tensor) -> str:
    data = b"".join(tensor.numpy().tobytes() for tensor in tensors)
    return hashlib.sha256(data).hexdigest()[:16]


def test_what_a_server_has_otherwise_or_not_at_all_is_named() -> None:
    torch.manual_seed(0)
    q, k, v, norm, embedding = (torch.randn(n, 4) for n in (8, 2, 2, 1, 70))
    sent = SentChecksums()
    for name, tensor in (("v", v), ("q", q), ("k", k)):  # buckets come in any order
        sent.add(f"{ATTENTION}.{name}_proj.weight", tensor)
    sent.add("model.norm.weight", norm)
    sent.add("model.embed_tokens.weight", embedding)
    server = {
        f"{ATTENTION}.qkv_proj.weight": digest(q, k, v),
        "model.norm.weight": digest(norm),
        "model.embed_tokens.weight": digest(embedding, torch.zeros(58, 4)),  # rows by 64
        "lm_head.weight": digest(embedding),  # tied: it was not sent
    }
    assert sent.differences(server) == []
    stale = {**server, f"{ATTENTION}.qkv_proj.weight": digest(q, v, k)}
    assert sent.differences(stale) == [f"{ATTENTION}.qkv_proj.weight"]
    never_sent = {**server, "model.layers.1.mlp.down_proj.weight": digest(norm)}
    assert sent.differences(never_sent) == ["model.layers.1.mlp.down_proj.weight"]
    sent.add("model.layers.0.mlp.down.weight", norm)  # the server answered 200, and has no such
    assert sent.differences(server) == ["model.layers.0.mlp.down.weight"]


def test_a_part_that_waits_for_another_keeps_no_bucket() -> None:
    bucket = torch.randn(100, 4)
    sent = SentChecksums()
    sent.add(f"{ATTENTION}.k_proj.weight", bucket[:2])
    wanted = digest(bucket[2:10], bucket[:2], bucket[10:12])
    q, v = bucket[2:10].clone(), bucket[10:12].clone()
    bucket.zero_()  # what it lies in is used again
    sent.add(f"{ATTENTION}.q_proj.weight", q)
    sent.add(f"{ATTENTION}.v_proj.weight", v)
    assert sent.differences({f"{ATTENTION}.qkv_proj.weight": wanted}) == []


@pytest.mark.parametrize(
    ("first", "limit"), [(0.0, 0.01), (0.002, 0.01), (0.015, 0.06), (0.04, ROUNDED)]
)
def test_rounding_that_was_measured_bounds_later_updates(
    tmp_path: Path, first: float, limit: float
) -> None:
    path = tmp_path / "weights_probe.json"
    bound = ProbeBound(path)
    assert bound.limit == ROUNDED and bound.origin == ""
    bound.keep(first)
    for found in (bound, ProbeBound(path)):  # this start, and the next one
        assert math.isclose(found.limit, limit) and str(path) in found.origin
        found.keep(2 * first)  # the first counts
        assert math.isclose(found.limit, limit)
    assert json.loads(path.read_text())["first_difference"] == first


def test_float32_has_a_bound_that_nobody_measures(tmp_path: Path) -> None:
    bound = ProbeBound()
    bound.keep(5e-6)
    assert bound.limit == EXACT and not any(tmp_path.iterdir())
