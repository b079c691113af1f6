"""Baselines are looked at one after the other: what is averaged, and what is in memory meanwhile."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch

from mtopd.pipelines import evaluate
from tests.small_models import save_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("baselines")
    for seed in range(3):
        save_model(root / str(seed), seed=seed, tied=False)
    return [root / str(seed) for seed in range(3)]


def test_the_average_is_the_mean_of_every_tensor(folders: list[Path]) -> None:
    models = [evaluate.read_weights(folder) for folder in folders]
    average = evaluate.average_weights(folders)
    assert average.keys() == models[0].keys()
    for name, tensor in average.items():
        expected = torch.stack([model[name] for model in models]).mean(0)
        assert tensor.dtype == models[0][name].dtype
        assert torch.equal(tensor, expected), name
        assert not torch.equal(tensor, models[0][name]) or "norm" in name


def test_one_checkpoint_at_a_time_is_in_memory_beside_the_sum(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three as of ten: the first becomes the sum, each other one goes before the next comes."""
    read, alive, found = evaluate.read_weights, weakref.WeakSet[torch.Tensor](), []

    def counted(folder: Path) -> dict[str, torch.Tensor]:
        gc.collect()
        found.append(len(alive))
        weights = {name: tensor.to(torch.bfloat16) for name, tensor in read(folder).items()}
        for tensor in weights.values():
            alive.add(tensor)
        return weights

    monkeypatch.setattr(evaluate, "read_weights", counted)
    average = evaluate.average_weights(folders * 2)
    # The last tensor of a checkpoint is the loop's variable until the next one's first.
    assert len(found) == 6 and max(found) <= 1, found
    assert {tensor.dtype for tensor in average.values()} == {torch.bfloat16}
