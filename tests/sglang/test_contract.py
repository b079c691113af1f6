"""What every engine promises (`tests.rollout.test_engine_contract`), of real servers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import pytest
import torch

from mtopd.rollout.ending import Ending
from mtopd.rollout.engine import Engine
from mtopd.rollout.sglang import SGLangEngine, SGLangOptions
from mtopd.rollout.sglang_serving import write_serving_folder
from mtopd.tokenizer import load_tokenizer
from tests.rollout.engines import VOCAB, Model
from tests.rollout.test_engine_contract import *  # noqa: F403 - its tests, of the builder below
from tests.support.sglang_servers import Zygote


@pytest.fixture(scope="module")
def url(zygote: Zygote, model: Model) -> Iterator[str]:
    """A server of this model."""
    serving = model.folder.parent / "serving"
    write_serving_folder(serving, model.folder, VOCAB, torch.float32)
    server = zygote.start(serving)
    server.wait_ready()
    yield server.url
    server.kill()


@pytest.fixture
def builder(url: str) -> partial[Engine]:
    return partial(build_sglang, url)


def build_sglang(
    url: str,
    model: Model,
    *,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    batch_size: int = 24,
) -> Engine:
    def score(sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        found = [model.log_probs(ids[:1], ids[1:]) for ids in sequences]
        return [
            log_p[torch.arange(len(ids) - 1), ids[1:]].numpy()
            for log_p, ids in zip(found, sequences, strict=True)
        ]

    return SGLangEngine(
        SGLangOptions([url], context_length=32, most_open=batch_size, patience_s=60),
        run_name=str(model.folder),
        vocab_size=VOCAB,
        dtype=torch.float32,
        ending=Ending(load_tokenizer(model.folder), [1, *stop_ids], stop),
        is_client=True,
        apart=contextlib.nullcontext,
        score=score,
    )
