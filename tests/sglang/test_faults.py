"""A fault proxy in front of a real server: each fault ends in a bounded retry or a clear error, and
what is trained is what the undisturbed server answers.
"""

from __future__ import annotations

import pytest

from mtopd.rollout.memory_log import MemoryLog
from mtopd.types import MtopdError
from tests.sglang.answers import SEEDED, answer, check_same, requests
from tests.sglang.conftest import EngineUnderTest, Place
from tests.sglang.proxy import FAULTS, FaultProxy
from tests.support.sglang_servers import RunningServer


def test_every_fault_once_and_the_responses_are_the_undisturbed_ones(
    engine: EngineUnderTest, place: Place, servers: list[RunningServer]
) -> None:
    engine.give(place.student, "run/1/0")
    asked = requests(place, 2 * len(FAULTS))
    whole = answer(engine, asked, SEEDED)
    proxy = FaultProxy(servers[0].url, lambda n: FAULTS[n] if n < len(FAULTS) else None)
    # The proxy reads an answer whole before it damages it.
    faulty = EngineUnderTest(place, [proxy.url], silence_s=15.0)
    try:
        faulty.give(place.student, "run/1/0")
        check_same(answer(faulty, asked, SEEDED), whole)
        assert sorted(proxy.done) == sorted(FAULTS)
        failed = faulty.counts.failed
        assert failed["status"] == failed["silence"] == failed["error_event"] == 1, failed
        assert failed["connection"] == failed["cut_short"] == failed["other_weights"] == 1, failed
        assert failed["malformed"] == 5, failed  # JSON, null, twice, lost, foreign
    finally:
        faulty.close()
        proxy.close()


@pytest.mark.parametrize(
    ("fault", "said"),
    [("status 400", "refuses prompt a/3"), ("status 500", "4 attempts in a row brought no token")],
)
def test_a_fault_that_stays_ends_in_an_error(
    engine: EngineUnderTest, place: Place, servers: list[RunningServer], fault: str, said: str
) -> None:
    proxy = FaultProxy(servers[0].url, lambda n: fault if n == 3 else None)
    faulty = EngineUnderTest(place, [proxy.url])
    try:
        faulty.give(place.student, "run/1/0")
        if fault == "status 500":
            proxy._seen = _Nothing()  # type: ignore[assignment]
        log = MemoryLog("faults")
        with pytest.raises(MtopdError, match=said):
            answer(faulty, requests(place, 6), SEEDED, log)
    finally:
        faulty.close()
        proxy.close()


class _Nothing(set):  # type: ignore[type-arg]
    """Forgets what it is given: every attempt is the first."""

    def add(self, _: object) -> None:
        pass
