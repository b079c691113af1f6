"""The embedded engine: counter-based draws, replay; padding and compaction change nothing."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from mtopd.hf_weights import in_buckets
from mtopd.rollout.embedded import EmbeddedEngine, filtered, inverse_cdf
from mtopd.rollout.engine import Request, Sampling
from mtopd.rollout.memory_log import MemoryLog
from mtopd.rollout.philox import philox4x32, uniform
from mtopd.types import MtopdError
from tests.rollout.engines import (
    VERSION,
    Model,
    alone,
    answer,
    bits,
    build_embedded,
    memory_log,
    requests,
    small_model,
)


def test_philox_gives_the_published_test_vectors() -> None:
    """Known answers of Random123 (Salmon et al., SC 2011), philox4x32 with 10 rounds."""
    vectors = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, wanted in vectors:
        found = philox4x32(np.array(counter, np.uint64)[:, None], key)[:, 0]
        assert tuple(int(w) for w in found) == wanted


def test_every_coordinate_of_a_draw_matters_and_draws_are_uniform() -> None:
    prompts = np.arange(20000, dtype=np.uint64)
    zeros = np.zeros_like(prompts)
    base = uniform(1, 2, prompts, zeros, 3)
    for other in (
        uniform(2, 2, prompts, zeros, 3),
        uniform(1, 3, prompts, zeros, 3),
        uniform(1, 2, prompts + np.uint64(1 << 40), zeros, 3),
        uniform(1, 2, prompts, zeros + np.uint64(1), 3),
        uniform(1, 2, prompts, zeros, 4),
    ):
        assert not np.any(base == other)
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.03
    mixed = uniform(1, 2 + np.arange(len(prompts)) % 2, prompts, zeros, 3)
    later = uniform(1, 3, prompts, zeros, 3)
    assert (mixed == np.where(np.arange(len(prompts)) % 2, later, base)).all()
    assert base.min() >= 0 and base.max() < 1
    assert np.abs(np.histogram(base, 20, (0, 1))[0] / 1000 - 1).max() < 0.15


def test_inverse_cdf_never_takes_a_token_of_probability_zero() -> None:
    log_p = torch.log(torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]], dtype=torch.float64)).expand(
        5, -1
    )
    u = torch.tensor([0.0, 0.2499999, 0.25, 0.9999999, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert inverse_cdf(log_p, u).tolist() == [1, 1, 3, 3, 3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return small_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def engine(model: Model) -> EmbeddedEngine:
    engine = build_embedded(model)
    engine.update_weights(model.buckets(), VERSION)
    return engine


SAMPLING = Sampling(16, seed=3)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_a_batch_cut_off_anywhere_ends_as_it_would_have(kind: str, tmp_path: Path) -> None:
    """To the last bit, though rows of the batch were logged to unlike lengths: what the model reads,
    and in which batches, does not change.  Tokens of experts are multiplied together.
    """
    model = small_model(tmp_path / "m", kind)
    engine = build_embedded(model)
    engine.update_weights(model.buckets(), VERSION)
    asked, rng = requests(24), np.random.default_rng(1)
    whole = answer(engine, asked, SAMPLING)
    assert {r.finish_reason for r in whole} == {"stop", "length"}
    for _ in range(6):
        log = memory_log()
        log.begin(asked)
        for request, response in zip(asked, whole, strict=True):
            kept = int(rng.integers(0, len(response.response_ids) + 1))
            is_over = kept == len(response.response_ids) and bool(rng.integers(2))
            log.append(
                request.sample_id,
                response.response_ids[:kept],
                response.log_probs[:kept],
                version=7,
                finish_reason=response.finish_reason if is_over else None,
            )
        over = {r.sample_id: r for r in log.take()}
        found = {r.sample_id: r for r in engine.generate(asked, log, SAMPLING)} | over
        assert bits([found[i] for i in range(24)]) == bits(whole)


def test_it_draws_only_what_the_log_lacks(
    engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, drawn, plain = requests(24), [], EmbeddedEngine._draw
    whole = answer(engine, asked, SAMPLING)

    def draw(self, logits_AV, rows, row_A, position):
        drawn.append(position)
        return plain(self, logits_AV, rows, row_A, position)

    monkeypatch.setattr(EmbeddedEngine, "_draw", draw)
    log = memory_log()
    log.begin(asked)
    for i, response in enumerate(whole):
        ids, probs = response.response_ids[:9], response.log_probs[:9]
        reason = response.finish_reason if len(response.response_ids) <= 9 else None
        log.append(i, ids, probs, version=7, finish_reason=reason)
    list(engine.generate(asked, log, SAMPLING))
    assert drawn == list(range(9, max(len(r.response_ids) for r in whole)))


def test_ranks_share_the_batches_and_answer_them_alike(model: Model) -> None:
    """Two engines take turns; which one answers a batch changes no bit."""
    asked = requests(24)
    (one, *two) = (build_embedded(model, batch_size=5) for _ in range(3))
    for engine in (one, *two):
        engine.update_weights(model.buckets(), VERSION)
    whole = answer(one, asked, SAMPLING)
    deal = alone()
    found: dict[int, object] = {}
    running = []
    for engine in two:
        engine._deal = deal
        running.append(engine.generate(asked, MemoryLog("shared"), SAMPLING))
    by_rank: list[set[int]] = [set(), set()]
    for rank in itertools.cycle((0, 0, 1)):  # one of them is faster
        response = next(running[rank], None)
        if response is None:
            break
        by_rank[rank].add(response.sample_id)
        found[response.sample_id] = response
    for rank, rest in enumerate(running):
        for response in rest:
            by_rank[rank].add(response.sample_id)
            found[response.sample_id] = response
    assert all(by_rank) and not by_rank[0] & by_rank[1]
    assert bits([found[i] for i in range(24)]) == bits(whole)


def test_no_model_before_weights_and_no_memory_after_release(model: Model) -> None:
    engine = build_embedded(model)
    assert engine._model is None
    engine.update_weights(model.buckets(), VERSION)
    tensors = [t for n, t in engine._model.state_dict().items() if n in engine._stored]
    engine.release()
    assert engine.version is None
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == 0


def test_the_log_hears_of_ends_and_other_tokens_together(engine: EmbeddedEngine) -> None:
    """Were an end told at once and other tokens later, kills would favour short responses."""
    told: list[tuple[int, int]] = []

    class Heard(MemoryLog):
        def append(self, sample_id, response_ids, log_probs, **rest) -> None:
            told.append((sample_id, self._open[sample_id].length + len(response_ids)))
            super().append(sample_id, response_ids, log_probs, **rest)

    whole = answer(engine, requests(24), SAMPLING, Heard("heard"))
    assert {len(r.response_ids) % 8 for r in whole} > {0}
    for response in whole:
        lengths = [length for i, length in told if i == response.sample_id]
        assert lengths == sorted(
            {8, 16, len(response.response_ids)} - set(range(len(response.response_ids) + 1, 17))
        )
    # In the order they were told: an end in a window stands among the others of that window.
    assert [i for i, length in told if length <= 8] == sorted(r.sample_id for r in whole)


def test_a_model_that_holds_nan_answers_nothing(engine: EmbeddedEngine) -> None:
    """Its argmax would be a token like any other, and its accuracy 0."""
    broken = copy.deepcopy(engine)
    broken._deal = alone()
    broken._model.model.norm.weight[3] = float("nan")
    for sampling in (Sampling(4), Sampling(4, temperature=0)):
        with pytest.raises(MtopdError, match="token 0 of an answer to p/0 are not finite: weights"):
            answer(broken, requests(2), sampling)


def test_end_tokens_and_stop_strings_end_a_response_at_once(
    engine: EmbeddedEngine, model: Model
) -> None:
    """The draws are those of the same batch without them: only where an answer ends differs."""
    batch, tokenizer = requests(24), engine._ending._tokenizer
    whole = answer(engine, batch, SAMPLING)
    one, two = sorted(whole, key=lambda r: len(r.response_ids))[-2:]
    pairs = one.response_ids[1:3].tolist(), two.response_ids[4:6].tolist()
    stop = [*map(tokenizer.decode, pairs), "<sep>"]  # of two tokens, and a special one
    also_end = int(whole[2].response_ids[3])
    stopping = build_embedded(model, stop=stop, stop_ids=[also_end])
    stopping.update_weights(model.buckets(), VERSION)
    found = answer(stopping, batch, SAMPLING)
    assert bits(answer(stopping, batch, SAMPLING)) == bits(found)
    cut = [
        f
        for f, w in zip(found, whole, strict=True)
        if len(f.response_ids) < len(w.response_ids) and len(f.response_ids) > 1
    ]
    last = [int(response.response_ids[-1]) for response in cut]
    assert also_end in last
    assert any(token not in (1, also_end) for token in last), "the test needs both endings"
    texts = [tokenizer.decode([token]) for token in last if token not in (1, also_end)]
    assert not all(any(s in text for s in stop) for text in texts), "nor one token's own text alone"
    for response, unstopped in zip(found, whole, strict=True):
        ids = response.response_ids.tolist()
        assert ids == unstopped.response_ids[: len(ids)].tolist()
        prefixes = [tokenizer.decode(ids[:k]) for k in range(1, len(ids) + 1)]
        is_over = [
            ids[k] in (1, also_end) or any(s in text for s in stop)
            for k, text in enumerate(prefixes)
        ]
        assert not any(is_over[:-1])
        assert (response.finish_reason == "stop") == is_over[-1]
        assert is_over[-1] or len(ids) == 16


def test_sampling_follows_the_models_distribution(engine: EmbeddedEngine, model: Model) -> None:
    """Chi-square of 4000 first tokens against the exact distribution; df = number of pooled cells -
    1.
    """
    prompt = (5, 9, 33)
    batch = [Request(sample, "same", prompt, sample) for sample in range(4000)]
    drawn = np.array([r.response_ids[0] for r in answer(engine, batch, Sampling(1, seed=11))])
    p = model.log_probs(prompt, [0])[0].exp().numpy()
    likely = p * 4000 >= 5
    expected = np.append(p[likely], p[~likely].sum()) * 4000
    counts = np.bincount(drawn, minlength=100)
    found = np.append(counts[likely], counts[~likely].sum())
    chi_square, freedom = float(((found - expected) ** 2 / expected).sum()), len(expected) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5, (chi_square, freedom)


def test_greedy_takes_the_argmax(engine: EmbeddedEngine, model: Model) -> None:
    (response,) = answer(engine, [Request(0, "g", (7, 8, 9))], Sampling(5, temperature=0))
    ids = response.response_ids.tolist()
    assert model.log_probs((7, 8, 9), ids).argmax(-1).tolist() == ids


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.95, 1.0])
def test_a_nucleus_is_the_fewest_tokens_that_hold_top_p(temperature: float, top_p: float) -> None:
    generator = torch.Generator().manual_seed(4)
    logits = 3 * torch.randn(7, 50, generator=generator, dtype=torch.float64)
    logits[:, 20:30] = logits[:, :10]  # equal tokens: the lower id comes first
    log_p = torch.log_softmax(logits, -1)
    found = filtered(log_p, Sampling(1, temperature=temperature, top_p=top_p))
    for row, kept in zip(torch.softmax(logits / temperature, -1), found.isfinite(), strict=True):
        by_rank = sorted(range(50), key=lambda i: (-float(row[i]), i))
        count = 1 if top_p < 1 else 50
        while float(row[by_rank[:count]].sum()) < top_p - 1e-12 and count < 50:
            count += 1
        assert set(by_rank[:count]) == set(kept.nonzero()[:, 0].tolist())
    expected = torch.log_softmax(logits / temperature, -1)
    torch.testing.assert_close(found[found.isfinite()], expected[found.isfinite()])
    assert filtered(log_p, Sampling(1)) is log_p, "a rollout's distribution is not touched"


def test_an_evaluation_at_a_temperature_is_replayed_and_keeps_to_its_nucleus(
    engine: EmbeddedEngine, model: Model
) -> None:
    batch, sampling = requests(24), Sampling(8, temperature=0.7, top_p=0.5)
    greedy = Sampling(8, temperature=0)
    first = answer(engine, batch, sampling)
    assert bits(answer(engine, batch, sampling)) == bits(first)
    assert bits(answer(engine, batch, greedy)) != bits(first)
    assert bits(answer(engine, batch, Sampling(8, temperature=0.7))) != bits(first)
    tiny = answer(engine, batch, Sampling(8, top_p=1e-9))
    assert bits(tiny) == bits(answer(engine, batch, greedy))
    for request, response in zip(batch, first, strict=True):
        log_p = model.log_probs(list(request.prompt_ids), response.response_ids.tolist())
        chosen = torch.from_numpy(response.response_ids.astype(np.int64))[:, None]
        nucleus = Sampling(8, temperature=0.7, top_p=sampling.top_p + 1e-4)  # rounding of the batch
        assert filtered(log_p, nucleus).gather(-1, chosen).isfinite().all()
        torch.testing.assert_close(  # noted are the model's own log-probs
            torch.from_numpy(response.log_probs.astype(np.float64))[:, None],
            log_p.gather(-1, chosen),
            rtol=0,
            atol=2e-5,
        )


def test_weights_come_in_buckets_and_all_of_them(engine: EmbeddedEngine) -> None:
    weights = {name: tensor.clone() for name, tensor in engine._model.state_dict().items()}
    del weights["lm_head.weight"]  # tied
    doubled = {name: tensor * 2 for name, tensor in weights.items()}
    buckets = list(in_buckets(doubled.items(), 20_000))
    assert len(buckets) > 5
    engine.update_weights(iter(buckets), VERSION)
    found = engine._model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in doubled.items())
    for wrong, said in (
        (buckets[:-1], "the weights lack 'model"),
        ([*buckets, {"model.extra": torch.zeros(1)}], "beyond those of the model, 'model.extra'"),
        # What a buffer that was filled too late looks like: the former bucket in its place
        ([*buckets[:-1], buckets[-2]], r"hold 'model.*' twice; "),
        ([{**weights, "model.norm.weight": torch.ones(3)}], r"'model.norm.weight' in shape \(3,\)"),
    ):
        asked = iter(wrong)
        with pytest.raises(MtopdError, match=said):
            engine.update_weights(asked, VERSION)
        assert next(asked, None) is None, "the ranks that gather would wait for this one"
    engine.update_weights([weights], VERSION)
