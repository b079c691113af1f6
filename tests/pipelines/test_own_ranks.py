"""Ranks of this node: what their launcher opens, and what it leaves."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path

import psutil
import pytest

from mtopd.pipelines import own_ranks
from mtopd.types import MtopdError


def test_a_launcher_listens_on_loopback_alone_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, temporary = tmp_path / "run", tmp_path / "tmp"
    for folder in (run_dir, temporary):
        folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    for name in ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "TORCHDYNAMO_DISABLE"):
        monkeypatch.setenv(name, "1")  # put back afterwards
    addresses: set[str] = set()
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.02):
            found = psutil.Process().net_connections()
            addresses.update(c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        with pytest.raises(MtopdError, match=r"no_such_module"):
            own_ranks.launch(2, "no_such_module:main", run_dir, 1)
    finally:
        ended.set()
        looking.join()
    assert addresses == {"127.0.0.1"}
    assert not list(temporary.iterdir())
