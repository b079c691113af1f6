"""SIGKILLs aimed at rollout, teacher pass, train, save and export of a whole job; ``make soak``
kills thirty times.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration import kill_job

pytestmark = pytest.mark.integration


@pytest.mark.timeout(900)
def test_a_job_killed_again_and_again_ends_with_the_same_weights(tmp_path: Path) -> None:
    print(kill_job.run(5, tmp_path, seed=1))
