"""SIGKILL of client, server, both, and a rank in the middle of an update: ``kill_rollouts`` says what is
checked behind each.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sglang import kill_rollouts
from tests.support.sglang_servers import RunningServer, Zygote

KILLS = 16


@pytest.mark.timeout(1500)
def test_sixteen_kills_lose_nothing_double_nothing_and_redraw_nothing(
    tmp_path: Path, zygote: Zygote, servers: list[RunningServer]
) -> None:
    said = kill_rollouts.run(KILLS, tmp_path, seed=16, zygote=zygote, servers=servers)
    print(said)
    assert f" {KILLS} kills " in said
