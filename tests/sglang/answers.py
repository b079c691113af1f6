"""What several tests ask of an engine, and compare."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mtopd.rollout.engine import Engine, Request, Sampling
from mtopd.rollout.memory_log import MemoryLog, Response
from tests.sglang.conftest import Place

LENGTH = 40
SEEDED = Sampling(LENGTH, min_response=LENGTH, seed=5)
GREEDY = Sampling(LENGTH, min_response=LENGTH, temperature=0)
Answers = dict[int, Response]


def requests(place: Place, count: int) -> list[Request]:
    return [Request(i, f"a/{i}", ids) for i, ids in enumerate(place.prompts(count))]


def answer(
    engine: Engine, asked: Sequence[Request], sampling: Sampling, log: MemoryLog | None = None
) -> Answers:
    found = list(engine.generate(asked, log or MemoryLog("test"), sampling))
    assert len(found) == len(asked)
    return {response.sample_id: response for response in found}


def held(asked: Sequence[Request], of: Answers, cuts: Sequence[int]) -> MemoryLog:
    """A log that holds the first tokens of each response."""
    log = MemoryLog("cut")
    log.begin(asked)
    for request, cut in zip(asked, cuts, strict=True):
        response = of[request.sample_id]
        log.append(
            request.sample_id, response.response_ids[:cut], response.log_probs[:cut], version=0
        )
    return log


def check_same(found: Answers, expected: Answers) -> None:
    for number, response in expected.items():
        assert found[number].response_ids.tolist() == response.response_ids.tolist(), number
        assert np.abs(found[number].log_probs - response.log_probs).max() < 1e-5
