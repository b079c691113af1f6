"""What the ranks of a job say when they fail: who and where, each cause once, no storm."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from mtopd.pipelines import cli, failures
from mtopd.types import MtopdError


def failed(error: Exception) -> Exception:
    """The error as it is when it was raised and caught."""
    try:
        raise error
    except Exception as raised:
        return raised


def test_what_nobody_foresaw_leaves_its_traceback_for_each_rank(tmp_path: Path) -> None:
    (tmp_path / "failure.txt").write_text("of an older version")
    (tmp_path / "failure.9.txt").write_text("of a former start")
    (tmp_path / "failure_analysis.txt").write_text("the user's own")
    failures.forget(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["failure_analysis.txt"]
    for rank in (0, 12):
        line = failures.describe(failed(IndexError(f"no\nrow {rank}")), tmp_path, rank)
        path = tmp_path / f"failure.{rank}.txt"
        assert line == f"IndexError: no row {rank} (unforeseen; the traceback is in {path})"
        assert "in failed" in path.read_text()
    assert failures.describe(MtopdError("one\nmistake"), tmp_path, 3) == "one mistake"
    assert not (tmp_path / "failure.3.txt").exists(), "a user's mistake needs no traceback"
    line = failures.describe(failed(IndexError("x")), tmp_path / "gone", 1)
    assert line.startswith("IndexError: x (unforeseen; ") and "cannot be written" in line


def test_what_a_library_refused_is_one_line_and_keeps_its_traceback(tmp_path: Path) -> None:
    refusal = MtopdError("Megatron refuses it")
    refusal.__cause__ = failed(RuntimeError("no such kernel"))
    assert failures.describe(refusal, tmp_path, 2) == "Megatron refuses it"
    assert "RuntimeError: no such kernel" in (tmp_path / "failure.2.txt").read_text()
    refusal.__cause__ = None
    failures.forget(tmp_path)
    failures.describe(refusal, tmp_path, 2)
    assert not list(tmp_path.iterdir())


def test_the_first_rank_of_a_host_speaks_and_nothing_is_said_twice(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    store = dist.HashStore()
    for rank, host, text in (
        (3, "a", "disk full"),
        (2, "a", "lost rank 3"),  # the host has spoken
        (8, "b", "lost rank 3"),
        (16, "c", "disk full"),  # known
        (17, "c", "disk full"),
        (24, "d", "a third thing"),
    ):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        failures.print_of_rank(text, rank, store)
    assert capfd.readouterr().err.splitlines() == [
        "error: rank 3 on host a: disk full",
        "error: rank 8 on host b, after rank 3 on host a: lost rank 3",
        "error: rank 24 on host d, after rank 3 on host a: a third thing",
    ]


def test_without_the_jobs_store_a_rank_speaks_all_the_same(
    capfd: pytest.CaptureFixture[str],
) -> None:
    class Gone:
        def add(self, *_: object) -> int:
            raise RuntimeError("connection was closed")

        set = get = add

    failures.print_of_rank("disk full", 1, Gone())
    assert capfd.readouterr().err.endswith(": disk full\n")


def test_a_rank_that_ends_before_it_joins_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A host without the run directory, say: rank 0 meets nothing."""
    store = dist.HashStore()
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, 0, 2)]))
    monkeypatch.setattr(sys, "argv", ["mtopd", "train", str(tmp_path)])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    host = socket.gethostname()
    for rank, said in (("1", f"error: rank 1 on host {host}: {tmp_path} is not a run"), ("0", "")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2
        printed = capfd.readouterr().err
        assert printed.startswith(said) and bool(printed) == bool(said), "said once"
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    with pytest.raises(SystemExit):
        cli.main()
    assert capfd.readouterr().err.startswith(f"error: {tmp_path} is not a run directory")
