"""Engines for the contract suite, by kind, and ways to ask one."""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from mtopd.hf_checkpoint import load_hf_config
from mtopd.hf_weights import read_weights
from mtopd.rollout.embedded import EmbeddedEngine
from mtopd.rollout.ending import Ending
from mtopd.rollout.engine import Engine, Request, Sampling
from mtopd.rollout.memory_log import MemoryLog, Response
from mtopd.rollout.token_log import FormerLogs, TokenLog, log_path, logs_before, samples_in
from mtopd.tokenizer import load_tokenizer
from tests.small_models import save_model

VERSION = "test/1/7"
VOCAB, ROWS = 100, 120  # token ids, and rows of the model: the rest must never be sampled


@dataclass(frozen=True)
class Model:
    """The weights that engines answer with."""

    folder: Path
    weights: Mapping[str, torch.Tensor]

    def buckets(self) -> list[dict[str, torch.Tensor]]:
        """The weights in three parts."""
        names = list(self.weights)
        return [{n: self.weights[n] for n in names[i::3]} for i in range(3)]

    def log_probs(self, prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
        """[T, VOCAB] of a plain forward over this response alone, in float64."""
        model = _load(self.folder)
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *response]])).logits[0]
        logits = logits[len(prompt) - 1 : -1, :VOCAB].double()
        return torch.log_softmax(logits, -1)


@functools.cache
def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def small_model(folder: Path, model_type: str = "qwen3") -> Model:
    """Its answers end at every length, half of them before 16 tokens."""
    model = save_model(folder, seed=5, layers=2, vocab=ROWS, model_type=model_type)
    with torch.no_grad():
        embedding_VD = model.get_input_embeddings().weight
        embedding_VD[VOCAB:] *= 8  # however likely the weights make them
        embedding_VD[1] *= 3  # EOS
    model.save_pretrained(folder)
    return Model(folder, {n: t for bucket in read_weights(folder) for n, t in bucket.items()})


def alone() -> Callable[[str, int], int]:
    """Deals everything to the one rank there is."""
    counters: dict[tuple[str, int], itertools.count[int]] = defaultdict(itertools.count)
    return lambda name, call: next(counters[name, call])


def build_embedded(
    model: Model,
    *,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    batch_size: int = 24,
) -> EmbeddedEngine:
    return EmbeddedEngine(
        load_hf_config(model.folder),
        dtype=torch.float32,
        vocab_size=VOCAB,
        ending=Ending(load_tokenizer(model.folder), [1, *stop_ids], stop),
        pad_id=0,
        device=torch.device("cpu"),
        batch_size=batch_size,
        deal=alone(),
    )


# Every engine that ``mtopd.pipelines.engines.ENGINES`` names has its place here; that of servers in
# tests/sglang, where there are some.
BUILDERS: dict[str, Callable[..., Engine]] = {"embedded": build_embedded}


def requests(count: int) -> list[Request]:
    rng = np.random.default_rng(0)
    return [
        Request(
            i, f"p/{i}", tuple(rng.integers(3, VOCAB, rng.integers(1, 9)).tolist()), iteration=7
        )
        for i in range(count)
    ]


_names = itertools.count()


def memory_log() -> MemoryLog:
    """A piece of work of its own."""
    return MemoryLog(f"work {next(_names)}")


def answer(
    engine: Engine,
    asked: Sequence[Request],
    sampling: Sampling,
    log: MemoryLog | None = None,
) -> list[Response]:
    """All responses, in the order of the requests."""
    log = log or memory_log()
    found = {r.sample_id: r for r in engine.generate(asked, log, sampling)}
    return [found[request.sample_id] for request in asked]


def bits(responses: Sequence[Response]) -> list[tuple[object, ...]]:
    """All of responses that must not change, to compare."""
    return [
        (r.sample_id, r.response_ids.tobytes(), r.log_probs.tobytes(), r.finish_reason)
        for r in responses
    ]


def tokens(responses: Sequence[Response]) -> list[tuple[object, ...]]:
    """What was drawn, to compare."""
    return [(r.sample_id, r.response_ids.tolist(), r.finish_reason) for r in responses]


def check_same(engine: Engine, found: Sequence[Response], expected: Sequence[Response]) -> None:
    """What must not change: tokens, and log-probs to the bit; those of servers as their batches, which
    nobody repeats, let them be.
    """
    assert tokens(found) == tokens(expected)
    allowed = {"embedded": 0.0, "sglang": 1e-5}[engine.kind]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.log_probs, other.log_probs, rtol=0, atol=allowed)


def token_log(
    folder: Path, generation: int, count: int, kind: str, versions: dict[int, str]
) -> TokenLog:
    """The log of a start that goes on with the first ``count`` samples of those before."""
    files = {
        path: samples_in(path, run="test", unsealed=range(count))[0]
        for path in logs_before(folder, generation)
    }
    return TokenLog(
        f"start {generation} of {folder}",
        log_path(folder, generation, 0),
        run="test",
        engine=kind,
        versions=versions,
        former=FormerLogs(files, "test"),
    )
