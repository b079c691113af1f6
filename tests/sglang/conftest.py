"""Two real servers, once for all tests here, and an engine that asks them.

One model with one config.json serves every test: an update of weights takes a second, a server
twenty.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtopd.hf_weights import read_weights
from mtopd.rollout.ending import Ending
from mtopd.rollout.sglang import SGLangEngine, SGLangOptions
from mtopd.rollout.sglang_serving import write_serving_folder
from mtopd.tokenizer import load_tokenizer, vocab_size
from tests.integration.test_kill_and_resume import save_ending_model
from tests.support.sglang_servers import PYTHON, RunningServer, Zygote

CONTEXT = 100
BUCKET_BYTES = 32 << 10  # several buckets of this small a model


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Collected only where this folder or a file of it is asked for by its path: the suite runs
    without servers.
    """
    here = Path(__file__).parent
    asked = [config.invocation_params.dir / name.partition("::")[0] for name in config.args]
    return (
        None if any(here in (path.resolve(), *path.resolve().parents) for path in asked) else True
    )


class Place:
    """Folders of two models of one shape, and what servers of it start with."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.student, self.other = root / "student", root / "other"
        save_ending_model(self.student, seed=1)
        save_ending_model(self.other, seed=7)
        self.tokenizer = load_tokenizer(self.student)
        self.vocab_size = vocab_size(self.tokenizer)
        self.serving = root / "serving"
        write_serving_folder(self.serving, self.student, self.vocab_size, torch.float32)

    def log_probs(self, folder: Path, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Of every token but the first, by transformers."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        found = []
        with torch.no_grad():
            for ids in sequences:
                logits_SV = model(torch.tensor([ids])).logits[0, :-1, : self.vocab_size].double()
                chosen = torch.tensor(ids[1:])[:, None]
                found.append(logits_SV.log_softmax(-1).gather(-1, chosen)[:, 0].numpy())
        return found

    def prompts(self, count: int) -> list[list[int]]:
        texts = [f"Spell this word backward: {'abcdefgh'[: 1 + i % 8]}{i}" for i in range(count)]
        return [self.tokenizer(text)["input_ids"] for text in texts]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("sglang"))


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    if not PYTHON.exists():
        pytest.fail("no environment for SGLang servers; make one: make sglang")
    zygote = Zygote(tmp_path_factory.mktemp("zygote"))
    yield zygote
    zygote.close()


@pytest.fixture(scope="session")
def servers(zygote: Zygote, place: Place) -> list[RunningServer]:
    """Both up; what weights they hold is left from the test before."""
    servers = [zygote.start(place.serving) for _ in range(2)]
    for server in servers:
        server.wait_ready()
    return servers


class EngineUnderTest(SGLangEngine):
    """The product's engine, with transformers in the trainer's place."""

    def __init__(self, place: Place, urls: Sequence[str], **changes: Any) -> None:
        self.scores_of = place.student
        self.ending = Ending(place.tokenizer, [place.tokenizer.eos_token_id])
        options = {"context_length": CONTEXT, "most_open": 32, "silence_s": 20, "patience_s": 60}
        super().__init__(
            SGLangOptions(urls, **{**options, **changes}),
            run_name=str(place.root),
            vocab_size=place.vocab_size,
            dtype=torch.float32,
            ending=self.ending,
            is_client=True,
            apart=contextlib.nullcontext,
            score=lambda sequences: place.log_probs(self.scores_of, sequences),
        )

    @property
    def probe_difference(self) -> float:
        """Of the last update."""
        assert self.update is not None
        return self.update.probe_difference

    def give(
        self,
        folder: Path,
        version: str,
        buckets: Iterable[Mapping[str, torch.Tensor]] | None = None,
    ) -> None:
        """Update to the weights of a folder, proven by transformers' log-probs of that folder."""
        self.scores_of = folder
        found = read_weights(folder, BUCKET_BYTES) if buckets is None else buckets
        self.update_weights(found, version)


@pytest.fixture
def engine(place: Place, servers: list[RunningServer]) -> Iterator[EngineUnderTest]:
    engine = EngineUnderTest(place, [server.url for server in servers])
    yield engine
    engine.close()
