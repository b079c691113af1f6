"""What servers answer is the student's own distribution, and a response that is continued is the one
it would have been.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mtopd.hf_checkpoint import load_hf_config
from mtopd.hf_weights import read_weights
from mtopd.rollout.embedded import EmbeddedEngine
from mtopd.rollout.engine import Request, Sampling
from mtopd.rollout.memory_log import MemoryLog
from tests.sglang.answers import GREEDY, LENGTH, SEEDED, answer, check_same, held, requests
from tests.sglang.conftest import EngineUnderTest, Place
from tests.support.sglang_servers import RunningServer, Zygote


def test_log_probs_are_those_of_transformers_and_of_the_embedded_engine(
    engine: EngineUnderTest, place: Place
) -> None:
    engine.give(place.student, "run/1/0")
    asked = requests(place, 50)
    seeded = answer(engine, asked, Sampling(LENGTH, seed=5))
    lengths = {len(response.response_ids) for response in seeded.values()}
    assert len(lengths) > 1 and max(lengths) <= LENGTH  # some end by themselves
    for request in asked:
        response = seeded[request.sample_id]
        ids = [*map(int, request.prompt_ids), *response.response_ids.tolist()]
        (expected,) = place.log_probs(place.student, [ids])
        difference = response.log_probs - expected[len(request.prompt_ids) - 1 :]
        assert np.abs(difference).max() < 1e-5
        assert response.version_spans == ((0, 0),)
    counter = iter(range(1000))
    embedded = EmbeddedEngine(
        load_hf_config(place.student),
        dtype=torch.float32,
        vocab_size=place.vocab_size,
        ending=engine.ending,
        pad_id=0,
        device=torch.device("cpu"),
        batch_size=16,
        deal=lambda name, call: next(counter),
    )
    embedded.update_weights(read_weights(place.student), "run/1/0")
    greedy = Sampling(LENGTH, temperature=0)
    check_same(answer(engine, asked, greedy), answer(embedded, asked, greedy))


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_sixty_cuts_continue_as_the_uninterrupted_run(
    engine: EngineUnderTest, place: Place, sampling: Sampling
) -> None:
    engine.give(place.student, "run/1/0")
    asked = requests(place, 12)
    whole = answer(engine, asked, sampling)
    check_same(answer(engine, asked, sampling), whole)  # replayed
    rng = np.random.default_rng(0)
    for _ in range(5):
        cuts = rng.integers(1, LENGTH, len(asked)).tolist()
        check_same(answer(engine, asked, sampling, held(asked, whole, cuts)), whole)
        assert engine.counts.continued >= len(asked)


def test_samples_seeds_and_iterations_draw_apart(engine: EngineUnderTest, place: Place) -> None:
    engine.give(place.student, "run/1/0")
    ids = place.prompts(1)[0]
    asked = [Request(i, "a/0", ids, sample=i) for i in range(8)]
    found = answer(engine, asked, SEEDED)
    assert len({tuple(r.response_ids.tolist()) for r in found.values()}) == 8
    for seed, iteration in ((6, 0), (5, 1)):
        other_draw = Sampling(LENGTH, min_response=LENGTH, seed=seed)
        other = answer(engine, [replace(r, iteration=iteration) for r in asked], other_draw)
        pairs = [(other[i].response_ids, found[i].response_ids) for i in range(8)]
        assert not any(one.tolist() == two.tolist() for one, two in pairs)


@pytest.fixture
def narrow(place: Place, servers: list[RunningServer]) -> Iterator[EngineUnderTest]:
    """Most requests wait while some are answered: a busy client may find those whole in its sockets,
    and the dead server is asked for others.
    """
    engine = EngineUnderTest(place, [server.url for server in servers], most_open=4)
    yield engine
    engine.close()


@pytest.mark.parametrize(
    "long",
    [
        Sampling(80, min_response=80, temperature=0),
        Sampling(80, min_response=80, seed=5),
    ],
    ids=["greedy", "seeded"],
)
def test_a_server_is_killed_in_the_middle_and_comes_back(
    narrow: EngineUnderTest,
    place: Place,
    servers: list[RunningServer],
    zygote: Zygote,
    long: Sampling,
) -> None:
    """SIGKILL while responses stream: they go on elsewhere, token for token.  Started again it gets
    no request before weights.
    """
    engine = narrow
    engine.give(place.student, "run/1/0")
    asked = [Request(r.sample_id, r.prompt_id, r.prompt_ids[:15]) for r in requests(place, 24)]
    whole = answer(engine, asked, long)
    victim = servers[1]
    killed = []

    class Killing(MemoryLog):
        num_tokens = 0

        def append(self, sample_id: int, response_ids: Any, log_probs: Any, **more: Any) -> None:
            super().append(sample_id, response_ids, log_probs, **more)
            self.num_tokens += len(response_ids)
            if self.num_tokens > 60 and not killed:
                killed.append(victim.pid)
                victim.kill()

    check_same(answer(engine, asked, long, Killing("kill")), whole)
    assert killed and engine.counts.failed["connection"] > 0
    zygote.restart(victim)
    victim.wait_ready()
    time.sleep(2)
    check_same(answer(engine, asked, long), whole)  # by the other one
    engine.give(place.student, "run/1/1")
    check_same(answer(engine, asked, long), whole)
    assert [server.why_out for server in engine.servers] == [None, None]


def test_pause_ends_a_run_whose_log_goes_on(engine: EngineUnderTest, place: Place) -> None:
    engine.give(place.student, "run/1/0")
    asked = requests(place, 24)
    long = Sampling(80, min_response=80, seed=5)
    asked = [Request(r.sample_id, r.prompt_id, r.prompt_ids[:15]) for r in asked]
    whole = answer(engine, asked, long)

    class Pausing(MemoryLog):
        num_tokens = 0

        def append(self, sample_id: int, response_ids: Any, log_probs: Any, **more: Any) -> None:
            super().append(sample_id, response_ids, log_probs, **more)
            self.num_tokens += len(response_ids)

    log = Pausing("pause")
    running = engine.generate(asked, log, long)
    early = [next(running)]
    engine.pause()
    early += running
    assert list(engine.generate(asked, log, long)) == [], "it is paused"
    engine.resume()
    rest = list(engine.generate(asked, log, long))
    found = {response.sample_id: response for response in [*early, *rest]}
    assert len(found) == len(early) + len(rest) == len(asked)
    check_same(found, whole)
