"""An HF folder: read tensor by tensor, written whole or not at all, refused when it is damaged."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch

from mtopd import hf_checkpoint
from mtopd.hf_checkpoint import (
    HFTensors,
    hf_config_from_dict,
    load_hf_config,
)
from mtopd.types import MtopdError
from tests.small_models import save_model


def test_what_is_no_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(MtopdError, match=r"is not an HF checkpoint: it has no config\.json"):
        load_hf_config(tmp_path)
    with pytest.raises(
        MtopdError, match=r"has neither model\.safetensors nor .* other weight formats"
    ):
        HFTensors(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(MtopdError, match="holds list, needed is an object"):
        load_hf_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    supported = "llama, qwen2, qwen3, qwen3_moe, mixtral, deepseek_v3"
    with pytest.raises(MtopdError, match=f"has model_type 'gpt2'; supported are {supported}"):
        load_hf_config(tmp_path)
    with pytest.raises(MtopdError, match=f"model_type None; supported are {supported}"):
        hf_config_from_dict({"hidden_size": 8})
    save_model(tmp_path / "model", seed=1, layers=1)
    with pytest.raises(MtopdError, match=r"has no tensor 'gone', which its config\.json calls for"):
        HFTensors(tmp_path / "model")["gone"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("baselines")
    for seed in range(3):
        save_model(root / str(seed), seed=seed, tied=False)
    return [root / str(seed) for seed in range(3)]


def test_the_average_is_the_mean_of_every_tensor(folders: list[Path]) -> None:
    models = [hf_checkpoint.read_weights(folder) for folder in folders]
    average = hf_checkpoint.average_weights(folders)
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
    read, alive, found = hf_checkpoint.read_weights, weakref.WeakSet[torch.Tensor](), []

    def counted(folder: Path) -> dict[str, torch.Tensor]:
        gc.collect()
        found.append(len(alive))
        weights = {name: tensor.to(torch.bfloat16) for name, tensor in read(folder).items()}
        for tensor in weights.values():
            alive.add(tensor)
        return weights

    monkeypatch.setattr(hf_checkpoint, "read_weights", counted)
    average = hf_checkpoint.average_weights(folders * 2)
    # The last tensor of a checkpoint is the loop's variable until the next one's first.
    assert len(found) == 6 and max(found) <= 1, found
    assert {tensor.dtype for tensor in average.values()} == {torch.bfloat16}


def test_checkpoints_of_other_tensors_are_not_averaged(folders: list[Path], tmp_path: Path) -> None:
    """A tensor too many is left out, as the first has none; one too few is refused by name."""
    save_model(tmp_path / "tied", seed=4, tied=True)
    average = hf_checkpoint.average_weights([tmp_path / "tied", folders[0]])
    assert "lm_head.weight" not in average
    with pytest.raises(MtopdError, match=r"tied has no tensor 'lm_head\.weight'"):
        hf_checkpoint.average_weights([folders[0], tmp_path / "tied"])
    save_model(tmp_path / "wide", seed=4, tied=False, intermediate_size=160)
    with pytest.raises(MtopdError, match=r"mlp.*has shape \(.*160.*\) in .*wide and .*128"):
        hf_checkpoint.average_weights([folders[0], tmp_path / "wide"])
