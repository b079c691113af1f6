"""Checksums of what was sent, without a server."""

from __future__ import annotations

import hashlib

import torch

from mtopd.rollout.sglang_proof import SentChecksums

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
