"""docs/architecture.md names files: all of them exist."""

from __future__ import annotations

import re

from tests.conftest import REPOSITORY


def test_every_file_of_the_walk_exists() -> None:
    text = (REPOSITORY / "docs" / "architecture.md").read_text()
    top = "mtopd|pipelines|launch|tests|benchmarks|docs"
    named = set(re.findall(rf"\b(?:{top})/[\w./]*", text))
    assert len(named) > 20, "the pattern finds no names any more"
    missing = sorted(name for name in named if not (REPOSITORY / name.rstrip(".")).exists())
    assert missing == [], "docs/architecture.md names what is not there"
