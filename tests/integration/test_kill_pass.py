"""Five SIGKILLs at random instants of the streaming pass; `make soak` does more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration import kill_pass

pytestmark = pytest.mark.integration


def test_kills_lose_nothing_that_was_committed(tmp_path: Path) -> None:
    print(kill_pass.run(5, tmp_path, seed=1))
