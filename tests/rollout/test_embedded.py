"""The embedded engine: counter-based draws, replay; padding and compaction change nothing."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from mtopd.hf_weights import in_buckets
from mtopd.rollout.embedded import EmbeddedEngine, filtered, inverse_cdf
from mtopd.rollout.ending import Ending
from mtopd.rollout.engine import GREEDY, UNFILTERED, Request, Sampling
from mtopd.rollout.philox import philox4x32, uniform
from mtopd.tokenizer import load_tokenizer
from mtopd.types import MtopdError
from tests.small_models import save_model


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
    assert base.min() >= 0 and base.max() < 1
    assert np.abs(np.histogram(base, 20, (0, 1))[0] / 1000 - 1).max() < 0.15


def test_inverse_cdf_never_takes_a_token_of_probability_zero() -> None:
    log_p = torch.log(torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]], dtype=torch.float64)).expand(
        5, -1
    )
    u = torch.tensor([0.0, 0.2499999, 0.25, 0.9999999, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert inverse_cdf(log_p, u).tolist() == [1, 1, 3, 3, 3]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> EmbeddedEngine:
    # 120 rows for about 100 token ids: the rest must never be sampled, however likely the weights
    # make them.
    folder = tmp_path_factory.mktemp("model") / "m"
    model = save_model(folder, seed=5, layers=2, vocab=120)
    tokenizer = load_tokenizer(folder)
    engine = EmbeddedEngine(
        model.config,
        dtype=torch.float32,
        vocab_size=100,
        ending=Ending(tokenizer, [1]),
        pad_id=0,
        device=torch.device("cpu"),
    )
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    weights["model.embed_tokens.weight"][100:] *= 8
    weights["model.embed_tokens.weight"][1] *= 3  # EOS is likely in about half of all states
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    engine.update_weights([weights])
    return engine


def requests(count: int) -> list[Request]:
    rng = np.random.default_rng(0)
    return [
        Request(f"p/{i}", tuple(rng.integers(3, 100, rng.integers(1, 9)).tolist()))
        for i in range(count)
    ]


def test_a_batch_is_replayed_exactly(engine: EmbeddedEngine) -> None:
    batch = requests(24)
    first = engine.generate(batch, max_response=16, seed=3, iteration=7)
    assert engine.generate(batch, max_response=16, seed=3, iteration=7) == first
    assert engine.generate(batch, max_response=16, seed=3, iteration=8) != first
    assert {r.finish_reason for r in first} == {"stop", "length"}, (
        "the test needs both kinds of ending"
    )
    for response in first:
        assert max(response.response_ids) < 100
        assert (response.response_ids[-1] == 1) == (response.finish_reason == "stop")
        assert 1 not in response.response_ids[:-1]
        assert len(response.log_probs) == len(response.response_ids) <= 16


def test_a_model_that_holds_nan_answers_nothing(engine: EmbeddedEngine) -> None:
    """Its argmax would be a token like any other, and its accuracy 0."""
    broken = copy.deepcopy(engine)
    broken._model.model.norm.weight[3] = float("nan")
    for sampling in (UNFILTERED, GREEDY):
        with pytest.raises(MtopdError, match="token 0 of an answer to p/0 are not finite: weights"):
            broken.generate(requests(2), max_response=4, sampling=sampling)


def test_end_tokens_and_stop_strings_end_a_response_at_once(engine: EmbeddedEngine) -> None:
    """The draws are those of the same batch without them: only where an answer ends differs."""
    batch, tokenizer = requests(24), engine._ending._tokenizer
    whole = engine.generate(batch, max_response=16, seed=3, iteration=7)
    texts = [tokenizer.decode(list(response.response_ids)) for response in whole]
    stop = [texts[0][1:3], texts[1][4:6], "<sep>"]  # of two characters, and a special token
    also_end = whole[2].response_ids[3]
    plain, engine._ending = engine._ending, Ending(tokenizer, [1, also_end], stop)
    try:
        found = engine.generate(batch, max_response=16, seed=3, iteration=7)
        assert engine.generate(batch, max_response=16, seed=3, iteration=7) == found
    finally:
        engine._ending = plain
    cut = [r for r, w in zip(found, whole, strict=True) if r != w and len(r.response_ids) > 1]
    last = [response.response_ids[-1] for response in cut]
    assert also_end in last
    assert any(token not in (1, also_end) for token in last), "the test needs both endings"
    for response, unstopped in zip(found, whole, strict=True):
        ids = response.response_ids
        assert ids == unstopped.response_ids[: len(ids)]
        prefixes = [tokenizer.decode(list(ids[:k])) for k in range(1, len(ids) + 1)]
        is_over = [
            ids[k] in (1, also_end) or any(s in text for s in stop)
            for k, text in enumerate(prefixes)
        ]
        assert not any(is_over[:-1])
        assert (response.finish_reason == "stop") == is_over[-1]
        assert is_over[-1] or len(ids) == 16
        assert len(response.log_probs) == len(ids)


def test_padding_cache_and_compaction_do_not_change_a_response(engine: EmbeddedEngine) -> None:
    """Each answer of a ragged, compacted batch has the log-probs of a plain forward pass over that
    answer alone.
    """
    batch = requests(24)
    for request, response in zip(
        batch, engine.generate(batch, max_response=16, seed=3, iteration=7), strict=True
    ):
        ids = torch.tensor([[*request.prompt_ids, *response.response_ids]])
        with torch.no_grad():
            logits = engine._model(ids).logits[0, len(request.prompt_ids) - 1 : -1, :100].double()
        wanted = torch.log_softmax(logits, -1)[
            torch.arange(len(response.response_ids)), ids[0, len(request.prompt_ids) :]
        ]
        torch.testing.assert_close(
            torch.tensor(response.log_probs, dtype=torch.float64), wanted, rtol=0, atol=2e-5
        )


def test_sampling_follows_the_models_distribution(engine: EmbeddedEngine) -> None:
    """Chi-square of 4000 first tokens against the exact distribution; df = number of pooled cells -
    1.
    """
    prompt = (5, 9, 33)
    batch = [Request("same", prompt, sample) for sample in range(4000)]
    drawn = np.array([r.response_ids[0] for r in engine.generate(batch, max_response=1, seed=11)])
    with torch.no_grad():
        p = torch.softmax(
            engine._model(torch.tensor([prompt])).logits[0, -1, :100].double(), -1
        ).numpy()
    likely = p * 4000 >= 5
    expected = np.append(p[likely], p[~likely].sum()) * 4000
    counts = np.bincount(drawn, minlength=100)
    found = np.append(counts[likely], counts[~likely].sum())
    chi_square, freedom = float(((found - expected) ** 2 / expected).sum()), len(expected) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5, (chi_square, freedom)


def test_greedy_takes_the_argmax(engine: EmbeddedEngine) -> None:
    (response,) = engine.generate([Request("g", (7, 8, 9))], max_response=5, sampling=GREEDY)
    ids = [7, 8, 9]
    for token in response.response_ids:
        with torch.no_grad():
            assert token == engine._model(torch.tensor([ids])).logits[0, -1, :100].argmax().item()
        ids.append(token)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.95, 1.0])
def test_a_nucleus_is_the_fewest_tokens_that_hold_top_p(temperature: float, top_p: float) -> None:
    generator = torch.Generator().manual_seed(4)
    logits = 3 * torch.randn(7, 50, generator=generator, dtype=torch.float64)
    logits[:, 20:30] = logits[:, :10]  # equal tokens: the lower id comes first
    log_p = torch.log_softmax(logits, -1)
    found = filtered(log_p, Sampling(temperature, top_p))
    for row, kept in zip(torch.softmax(logits / temperature, -1), found.isfinite(), strict=True):
        by_rank = sorted(range(50), key=lambda i: (-float(row[i]), i))
        count = 1 if top_p < 1 else 50
        while float(row[by_rank[:count]].sum()) < top_p - 1e-12 and count < 50:
            count += 1
        assert set(by_rank[:count]) == set(kept.nonzero()[:, 0].tolist())
    expected = torch.log_softmax(logits / temperature, -1)
    torch.testing.assert_close(found[found.isfinite()], expected[found.isfinite()])
    assert filtered(log_p, UNFILTERED) is log_p, "a rollout's distribution is not touched"


def test_an_evaluation_at_a_temperature_is_replayed_and_keeps_to_its_nucleus(
    engine: EmbeddedEngine,
) -> None:
    batch, sampling = requests(24), Sampling(temperature=0.7, top_p=0.5)
    first = engine.generate(batch, max_response=8, sampling=sampling)
    assert engine.generate(batch, max_response=8, sampling=sampling) == first
    assert engine.generate(batch, max_response=8, sampling=GREEDY) != first
    assert engine.generate(batch, max_response=8, sampling=Sampling(temperature=0.7)) != first
    tiny = engine.generate(batch, max_response=8, sampling=Sampling(top_p=1e-9))
    assert tiny == engine.generate(batch, max_response=8, sampling=GREEDY)
    for request, response in zip(batch, first, strict=True):
        ids = torch.tensor([[*request.prompt_ids, *response.response_ids]])
        with torch.no_grad():
            logits = engine._model(ids).logits[0, len(request.prompt_ids) - 1 : -1, :100].double()
        log_p = torch.log_softmax(logits, -1)
        chosen = torch.tensor(response.response_ids)[:, None]
        nucleus = Sampling(sampling.temperature, sampling.top_p + 1e-4)  # rounding of the batch
        assert filtered(log_p, nucleus).gather(-1, chosen).isfinite().all()
        torch.testing.assert_close(  # noted are the model's own log-probs
            torch.tensor(response.log_probs, dtype=torch.float64)[:, None],
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
    engine.update_weights(iter(buckets))
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
            engine.update_weights(asked)
        assert next(asked, None) is None, "the ranks that gather would wait for this one"
    engine.update_weights([weights])
