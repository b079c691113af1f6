"""The command line, on rank 1 with something wrong: python -m tests.pipelines.one_rank CASE VERB ..."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from mtopd.megatron import agreement
from mtopd.pipelines import cli, start


def stale() -> None:
    """Its directory listings lack the newest shard of trajectories."""
    glob = Path.glob

    def older(folder: Path, pattern: str) -> Iterator[Path]:
        found = sorted(glob(folder, pattern))
        return iter(found[:-1] if pattern.endswith("sealed.json") else found)

    Path.glob = older


def bug() -> None:
    """It fails as nobody foresaw, before it takes part in anything."""

    def fail(*_: object) -> None:
        raise KeyError("no such thing")

    start.call = fail


if __name__ == "__main__":
    case = {"stale": stale, "bug": bug}[sys.argv.pop(1)]
    agreement.STALE_WAITS_S = ()
    if os.environ["RANK"] == "1":
        case()
    cli.main()
