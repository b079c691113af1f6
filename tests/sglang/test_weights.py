"""An update that did not arrive whole is found, whatever version the server names."""

from __future__ import annotations

import contextlib
import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from mtopd.files import write_json
from mtopd.hf_weights import read_weights
from mtopd.rollout.sglang_broadcast import let_go
from mtopd.rollout.sglang_servers import Servers, wait_for_servers
from mtopd.types import MtopdError
from tests.sglang.conftest import BUCKET_BYTES, CONTEXT, EngineUnderTest, Place
from tests.support.sglang_servers import RunningServer

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
    assert engine.update is not None
    assert [*engine.update.seconds] == ["begin", "buckets", "checksums", "probe"]
    sent = [engine._served(bucket, cast=True) for bucket in read_weights(place.student)]
    assert engine.update.bytes_sent == sum(t.nbytes for part in sent for t in part.values())
    assert (engine.update.servers, engine.update.servers_out) == (2, 0)
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
    assert engine.update is not None
    assert (engine.update.servers, engine.update.servers_out) == (1, 1)
    assert good.why_out is None
    assert bad.why_out is not None and VICTIM in bad.why_out
    monkeypatch.undo()
    engine.give(place.other, "run/1/2")
    assert bad.why_out is None


def test_a_bucket_that_one_server_refuses_does_not_keep_the_other_waiting(
    engine: EngineUnderTest, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told before it joins the broadcast, which would wait for it; the rest takes all."""
    engine.give(place.student, "run/1/0")
    bad, good = engine.servers
    post = Servers.post

    async def askew(self: Servers, server: Any, path: str, body: Any = None, *more: Any) -> Any:
        if server is bad and path == "/update_weights_from_distributed" and VICTIM in body["names"]:
            body = {**body, "shapes": [[-1]] * len(body["names"])}
        return await post(self, server, path, body, *more)

    monkeypatch.setattr(Servers, "post", askew)
    started = time.perf_counter()
    engine.give(place.other, "run/1/1")
    assert time.perf_counter() - started < 30  # a broadcast waits 60
    assert good.why_out is None and bad.why_out is not None
    monkeypatch.undo()
    engine.give(place.other, "run/1/2")
    assert bad.why_out is None


def test_servers_that_a_killed_trainer_told_to_join_are_let_go(
    engine: EngineUnderTest, place: Place, servers: list[RunningServer], tmp_path: Path
) -> None:
    """They would look for its store for half an hour, and answer nobody."""
    note, urls = tmp_path / "group.json", [server.url for server in servers]
    port = free_port()
    write_json(note, {"address": "127.0.0.1", "port": port, "size": 3})
    body = {"master_address": "127.0.0.1", "master_port": port, "world_size": 3, "backend": "gloo"}
    with ThreadPoolExecutor(2) as pool:
        for number, url in enumerate(urls):
            joining = {**body, "rank_offset": 1 + number, "group_name": f"gone-{port}"}
            pool.submit(post, f"{url}/init_weights_update_group", joining)
        time.sleep(3)
        started = time.perf_counter()
        with let_go(note):
            wait_for_servers(urls, context_length=CONTEXT, seeded=True, patience_s=100)
        assert time.perf_counter() - started > 0.5, "they did not look for it"
    assert not note.exists()
    engine.give(place.other, "run/2/0")
    assert engine.probe_difference < 1e-5


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def post(url: str, body: dict[str, Any]) -> None:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with contextlib.suppress(urllib.error.HTTPError):
        urllib.request.urlopen(request, timeout=200).read()


# -- by way of files -------------------------------------------------------------------------------
@pytest.fixture
def by_files(
    place: Place, servers: list[RunningServer], tmp_path: Path
) -> Iterator[EngineUnderTest]:
    engine = EngineUnderTest(
        place, [server.url for server in servers], weights_folder=tmp_path / "weights"
    )
    yield engine
    engine.close()


def test_weights_arrive_by_files_that_go_again(
    by_files: EngineUnderTest, engine: EngineUnderTest, place: Place, tmp_path: Path
) -> None:
    for number, folder in enumerate((place.student, place.other)):
        by_files.give(folder, f"run/1/{number}")
        assert by_files.version == f"run/1/{number}" and by_files.probe_difference < 1e-5
        assert [*(tmp_path / "weights").iterdir()] == []
    assert by_files.update is not None
    assert [*by_files.update.seconds] == ["begin", "buckets", "load", "checksums", "probe"]
    engine.give(place.student, "run/1/2")  # servers take a broadcast after it
    assert engine.probe_difference < 1e-5


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", f"1 of its .* tensors are not those that were sent: {VICTIM}"),
        ("stale", "log-probs differ by"),
    ],
)
def test_files_that_are_not_whole_are_refused(
    by_files: EngineUnderTest, place: Place, how: str, said: str, tmp_path: Path
) -> None:
    by_files.give(place.student, "run/1/0")
    with pytest.raises(MtopdError, match=said):
        by_files.give(place.other, "run/1/1", changed(place, how))
    assert by_files.version is None and [*(tmp_path / "weights").iterdir()] == []
    by_files.give(place.other, "run/1/2")
    assert by_files.probe_difference < 1e-5
