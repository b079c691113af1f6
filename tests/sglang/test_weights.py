"""An update that did not arrive whole is found, whatever version the server names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from mtopd.hf_weights import read_weights
from mtopd.rollout.sglang_servers import Servers
from mtopd.types import MtopdError
from tests.sglang.conftest import BUCKET_BYTES, EngineUnderTest, Place

VICTIM = "model.layers.1.mlp.down_proj.weight"
Buckets = Iterator[Mapping[str, torch.Tensor]]


def changed(place: Place, how: str) -> Buckets:
    """The other model's weights, with one fault."""
    old = {name: t for bucket in read_weights(place.student) for name, t in bucket.items()}
    for bucket in read_weights(place.other, BUCKET_BYTES):
        found = dict(bucket)
        if VICTIM in found:
            if how == "missing":
                del found[VICTIM]
            elif how == "renamed":
                found["model.layers.1.mlp.down.weight"] = found.pop(VICTIM)
            elif how == "stale":  # what a rank would send that kept an old bucket
                found = {name: old[name] for name in found}
        if found:
            yield found


def test_weights_arrive_in_buckets_and_are_proven(engine: EngineUnderTest, place: Place) -> None:
    engine.give(place.student, "run/1/0")
    assert engine.version == "run/1/0" and engine.probe_difference < 1e-5
    assert set(engine.update_seconds) == {"begin", "send", "end", "checksums", "probe"}
    engine.give(place.other, "run/1/1")
    assert engine.version == "run/1/1" and engine.probe_difference < 1e-5


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", f"1 of its .* tensors are not those that were sent: {VICTIM}"),
        ("renamed", "2 of its .* tensors are not those that were sent: .*down.weight, .*down_proj"),
        ("stale", "log-probs differ by"),
    ],
)
def test_an_update_that_is_not_whole_is_refused(
    engine: EngineUnderTest, place: Place, how: str, said: str
) -> None:
    engine.give(place.student, "run/1/0")
    with pytest.raises(MtopdError, match=said):
        engine.give(place.other, "run/1/1", changed(place, how))
    assert engine.version is None
    engine.give(place.other, "run/1/2")  # the next one mends it
    assert engine.probe_difference < 1e-5


def test_a_prefix_cache_that_was_not_flushed_is_found(
    engine: EngineUnderTest, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.give(place.student, "run/1/0")
    post = Servers.post

    async def without_flush(
        self: Servers, server: Any, path: str, body: Any = None, *more: Any
    ) -> Any:
        if body and "flush_cache" in body:
            body = {**body, "flush_cache": False}
        return await post(self, server, path, body, *more)

    monkeypatch.setattr(Servers, "post", without_flush)
    with pytest.raises(MtopdError, match="log-probs differ by"):
        engine.give(place.other, "run/1/1")
    monkeypatch.undo()
    engine.give(place.other, "run/1/2")


def test_a_server_that_did_not_take_a_tensor_is_out_alone(
    engine: EngineUnderTest, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.give(place.student, "run/1/0")
    bad, good = engine.servers
    post = Servers.post

    async def renamed(self: Servers, server: Any, path: str, body: Any = None, *more: Any) -> Any:
        if server is bad and path == "/update_weights_from_distributed" and VICTIM in body["names"]:
            names = ["nothing.of.this.name" if n == VICTIM else n for n in body["names"]]
            body = {**body, "names": names}
        return await post(self, server, path, body, *more)

    monkeypatch.setattr(Servers, "post", renamed)
    engine.give(place.other, "run/1/1")
    assert good.why_out is None
    assert bad.why_out is not None and VICTIM in bad.why_out
    monkeypatch.undo()
    engine.give(place.other, "run/1/2")
    assert bad.why_out is None
