"""What every engine promises (`mtopd.rollout.engine`), asked of each kind that a config can name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mtopd.pipelines.engines import ENGINES
from mtopd.rollout.engine import Engine, Request, Sampling, student_version
from mtopd.rollout.token_log import logs_before, recover
from mtopd.types import MtopdError
from tests.rollout.engines import (
    BUILDERS,
    VERSION,
    VOCAB,
    Model,
    answer,
    check_same,
    memory_log,
    requests,
    small_model,
    token_log,
    tokens,
)

SAMPLING = Sampling(16, seed=3)
GREEDY = Sampling(16, temperature=0)
VERSIONS = {7: VERSION}
Build = Callable[..., Engine]


def test_every_engine_is_asked() -> None:
    assert BUILDERS.keys() | {"sglang"} == ENGINES.keys()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return small_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(params=list(BUILDERS))
def builder(request: pytest.FixtureRequest) -> Build:
    """Builds an engine of a model."""
    return BUILDERS[request.param]


@pytest.fixture
def build(builder: Build, model: Model) -> Iterator[Build]:
    """Builds an engine that has the model's weights; all are closed after the test."""
    built: list[Engine] = []

    def make(**options: object) -> Engine:
        engine = builder(model, **options)
        built.append(engine)
        engine.update_weights(model.buckets(), VERSION)
        return engine

    yield make
    for engine in built:
        engine.close()


def test_responses_are_whole_and_of_the_models_own_distribution(build: Build, model: Model) -> None:
    engine, asked = build(), requests(24)
    assert engine.version == VERSION
    found = answer(engine, asked, SAMPLING)
    assert {r.finish_reason for r in found} == {"stop", "length"}, "the test needs both endings"
    for request, response in zip(asked, found, strict=True):
        ids = response.response_ids
        assert ids.dtype == np.int32 and response.log_probs.dtype == np.float32
        assert ids.min() >= 0 and ids.max() < VOCAB
        assert (ids[-1] == 1) == (response.finish_reason == "stop")
        assert 1 not in ids[:-1]
        assert len(ids) == len(response.log_probs) <= 16
        assert len(ids) == 16 or response.finish_reason == "stop"
        assert response.version_spans == ((0, student_version(VERSION)),)
        log_p = model.log_probs(list(request.prompt_ids), ids.tolist())
        wanted = log_p[torch.arange(len(ids)), torch.from_numpy(ids.astype(np.int64))]
        found_p = torch.from_numpy(response.log_probs.astype(np.float64))
        torch.testing.assert_close(found_p, wanted, rtol=0, atol=2e-5)


def test_the_same_requests_are_answered_to_the_same_tokens(build: Build) -> None:
    engine, asked = build(), requests(24)
    first = answer(engine, asked, SAMPLING)
    check_same(engine, answer(engine, asked, SAMPLING), first)
    later = [replace(request, iteration=8) for request in asked]
    apart = [
        a != b for a, b in zip(tokens(answer(engine, later, SAMPLING)), tokens(first), strict=True)
    ]
    assert sum(apart) > len(asked) // 2, "another iteration"
    # Of iterations that are answered together each request has the draws of its own.
    mixed = [pair[i % 2] for i, pair in enumerate(zip(asked, later, strict=True))]
    found = tokens(answer(engine, mixed, SAMPLING))
    assert found[0::2] == tokens(first)[0::2] and found[1::2] != tokens(first)[1::2]
    again = Request(0, "p/0", asked[0].prompt_ids, sample=1, iteration=7)
    assert tokens(answer(engine, [again], SAMPLING)) != tokens(first[:1]), (
        "another sample of the prompt"
    )


@pytest.mark.parametrize("sampling", [SAMPLING, GREEDY], ids=["drawn", "greedy"])
@pytest.mark.parametrize("cut", range(1, 14, 3))
def test_a_response_goes_on_from_what_the_log_holds(
    build: Build, tmp_path: Path, sampling: Sampling, cut: int
) -> None:
    """A start died with ``cut`` tokens of some responses, none or all of others."""
    engine, asked = build(), requests(24)
    whole = answer(engine, asked, sampling)
    log = token_log(tmp_path, 1, len(asked), engine.kind, VERSIONS)
    log.begin(asked)
    for i, response in enumerate(whole):
        kept = [0, cut, 99][i % 3]
        ids, probs = response.response_ids[:kept], response.log_probs[:kept]
        reason = response.finish_reason if kept >= len(response.response_ids) else None
        if kept:
            log.append(i, ids, probs, version=7, finish_reason=reason)
    log.close()
    second = token_log(tmp_path, 2, len(asked), engine.kind, VERSIONS)
    found = answer(engine, asked, sampling, second)
    second.close()
    check_same(engine, found, whole)
    # Nothing that was logged is sampled, or logged, again.
    assert second.num_continued_tokens == sum(
        min([0, cut, 99][i % 3], len(r.response_ids)) for i, r in enumerate(whole)
    )
    third = recover(logs_before(tmp_path, 3), run="test", unsealed=range(24))
    assert third.num_dropped == 0
    joined = sum(response.length for response in third.responses.values())
    assert joined == sum(len(r.response_ids) for r in whole)


def test_what_the_log_holds_is_never_drawn_again(
    build: Build, model: Model, tmp_path: Path
) -> None:
    """A prefix that this model would not have drawn stays all the same, and the rest is drawn behind
    it: another student, or another machine, has sampled it.
    """
    engine, asked = build(), requests(2)
    log = token_log(tmp_path, 1, len(asked), engine.kind, VERSIONS)
    log.begin(asked)
    foreign = [50, 51, 52]
    log.append(0, foreign, [-1.0, -2.0, -3.0], version=6)
    log.close()
    second = token_log(tmp_path, 2, len(asked), engine.kind, VERSIONS)
    found = answer(engine, asked, SAMPLING, second)[0]
    second.close()
    assert found.response_ids[:3].tolist() == foreign
    assert found.log_probs[:3].tolist() == [-1.0, -2.0, -3.0]
    assert found.version_spans == ((0, 6), (3, 7)) and len(found.response_ids) > 3
    ids = found.response_ids.tolist()
    wanted = model.log_probs(list(asked[0].prompt_ids), ids)[torch.arange(len(ids)), ids][3:]
    behind = torch.from_numpy(found.log_probs[3:].astype(np.float64))
    torch.testing.assert_close(behind, wanted, rtol=0, atol=2e-5)


def test_a_budget_that_the_log_has_used_up_draws_nothing(build: Build, tmp_path: Path) -> None:
    engine, asked = build(), requests(2)
    log = token_log(tmp_path, 1, len(asked), engine.kind, VERSIONS)
    log.begin(asked)
    log.append(0, [50] * 16, [-1.0] * 16, version=7)  # the word of its end was torn off
    log.append(1, [50, 1], [-1.0] * 2, version=7)  # likewise, and it had stopped
    log.close()
    second = token_log(tmp_path, 2, len(asked), engine.kind, VERSIONS)
    found = answer(engine, asked, SAMPLING, second)
    second.close()
    assert [(len(r.response_ids), r.finish_reason) for r in found] == [(16, "length"), (2, "stop")]


def test_a_response_is_handed_on_after_its_commit(build: Build, tmp_path: Path) -> None:
    engine, asked = build(batch_size=8), requests(24)
    log = token_log(tmp_path, 1, len(asked), engine.kind, VERSIONS)
    for response in engine.generate(asked, log, SAMPLING):
        (path,) = logs_before(tmp_path, 2)
        on_disk = recover([path], run="test", unsealed={response.sample_id}).responses
        assert on_disk[response.sample_id].finish_reason == response.finish_reason
        assert bytes(on_disk[response.sample_id].ids) == response.response_ids.tobytes()
    log.close()


def test_a_pause_keeps_open_responses_for_later(build: Build) -> None:
    engine, asked = build(batch_size=8), requests(24)
    whole = answer(engine, asked, SAMPLING)
    log, found = memory_log(), {}
    for response in engine.generate(asked, log, SAMPLING):
        found[response.sample_id] = response
        engine.pause()
    assert 0 < len(found) < 24
    assert list(engine.generate(asked, log, SAMPLING)) == [], "it is paused"
    engine.resume()
    for response in engine.generate(asked, log, SAMPLING):
        assert response.sample_id not in found, "handed on once"
        found[response.sample_id] = response
    check_same(engine, [found[i] for i in range(24)], whole)


def test_stop_strings_and_stop_ids_end_a_response_at_once(build: Build) -> None:
    """The draws are those of the same requests without them: only where an answer ends differs."""
    asked = requests(24)
    plain = build()
    whole = answer(plain, asked, SAMPLING)
    longest = max(whole, key=lambda r: len(r.response_ids))
    also_end = int(longest.response_ids[3])
    found = answer(build(stop_ids=[also_end]), asked, SAMPLING)
    assert tokens(found) != tokens(whole)
    for response, unstopped in zip(found, whole, strict=True):
        ends = np.isin(unstopped.response_ids, [1, also_end])
        length = int(ends.argmax()) + 1 if ends.any() else 16
        np.testing.assert_array_equal(response.response_ids, unstopped.response_ids[:length])
        assert response.finish_reason == ("stop" if ends.any() else "length")


def test_before_min_response_nothing_ends(build: Build) -> None:
    """An end token stays where it was drawn, with the log-prob that it had."""
    engine, asked = build(), requests(24)
    whole = answer(engine, asked, SAMPLING)
    found = answer(engine, asked, Sampling(16, min_response=6, seed=3))
    early = 0
    for response, plain in zip(found, whole, strict=True):
        length = len(plain.response_ids)
        assert len(response.response_ids) >= 6
        np.testing.assert_array_equal(response.response_ids[:length], plain.response_ids)
        assert 1 not in response.response_ids[5:-1]
        early += length < 6
    assert early, "the test needs answers that end early"


def test_a_request_behind_tokens_of_its_response_is_answered_as_that_response_goes_on(
    build: Build,
) -> None:
    """The draws are those of the positions in the whole response, the budget is the rest of it, whatever
    stands beside it in a batch.
    """
    engine, asked = build(), requests(24)
    whole = answer(engine, asked, SAMPLING)
    cuts = [i % 5 for i in range(24)]
    behind = [
        Request(
            request.sample_id,
            request.prompt_id,
            np.concatenate([request.prompt_ids, response.response_ids[:cut]]).astype(np.int32),
            position=cut,
            iteration=7,
        )
        for request, response, cut in zip(asked, whole, cuts, strict=True)
        if len(response.response_ids) > cut
    ]
    assert len({request.position for request in behind}) == 5
    for request, found in zip(behind, answer(engine, behind, SAMPLING), strict=True):
        rest = whole[request.sample_id]
        np.testing.assert_array_equal(found.response_ids, rest.response_ids[request.position :])
        assert found.finish_reason == rest.finish_reason
    late = Sampling(16, min_response=12, seed=3)
    for request, found in zip(behind, answer(engine, behind, late), strict=True):
        assert request.position + len(found.response_ids) >= 12, "of the whole response"


def test_what_follows_is_answered_on_this_rank_once_all_before_it_is_out(build: Build) -> None:
    engine, asked = build(batch_size=8), requests(24)
    out: dict[int, int] = {}  # tokens of each response that is out
    calls: list[list[int]] = []

    def follow(answered: Sequence[Request]) -> Sequence[Request]:
        ids = [request.sample_id for request in answered]
        calls.append(ids)
        assert {*ids} <= out.keys(), "all that it is asked about is out"
        return [
            Request(
                3000 + r.sample_id,
                r.prompt_id,
                [*r.prompt_ids, 5, 6],
                position=out[r.sample_id] + 2,
            )
            for r in answered
            if r.sample_id < 6000 and out[r.sample_id] < 14
        ]

    found = []
    for response in engine.generate(asked, memory_log(), SAMPLING, follow):
        out[response.sample_id] = (
            out.get(response.sample_id - 3000, -2) + 2 + len(response.response_ids)
        )
        found.append(response)
    assert sorted({r.sample_id for r in found if r.sample_id < 3000}) == list(range(24))
    asked_about = sorted(i for call in calls for i in call)
    assert asked_about == sorted(r.sample_id for r in found), "asked about every response once"
    later = [r for r in found if r.sample_id >= 3000]
    assert len(later) > 3 and len({r.sample_id for r in found}) == len(found)
    assert all(out[r.sample_id] <= 16 for r in later)
    assert all(out[r.sample_id] == 16 for r in later if r.finish_reason == "length")


def test_weights_that_are_not_whole_are_refused(build: Build, model: Model) -> None:
    engine = build()
    first, second, third = model.buckets()
    for wrong in ([first, second], [first, second, third, {"model.extra": torch.zeros(1)}]):
        with pytest.raises(MtopdError):
            engine.update_weights(wrong, "test/1/8")
        assert engine.version is None, "nobody knows what it holds"
    engine.update_weights(model.buckets(), "test/1/9")
    assert engine.version == "test/1/9"


def test_what_was_released_comes_back_with_weights(build: Build, model: Model) -> None:
    engine, asked = build(), requests(8)
    whole = answer(engine, asked, SAMPLING)
    engine.release()
    engine.release()
    if engine.version is None:
        engine.update_weights(model.buckets(), VERSION)
    check_same(engine, answer(engine, asked, SAMPLING), whole)
