"""An export by several ranks: each writes its files, and what one meets ends all."""

from __future__ import annotations

import json
from pathlib import Path

from mtopd.hf_weights import TensorSpec
from mtopd.hf_writer import plan_shards
from mtopd.pipelines.export import in_turns
from tests.conftest import run_ranks
from tests.small_models import save_model

WORKER = Path(__file__).with_name("export_ranks.py")


def test_a_full_disk_on_one_rank_ends_all_and_the_next_export_is_whole(tmp_path: Path) -> None:
    """Of a student that is the first three of four layers, beside code that is not copied."""
    folder = tmp_path / "model"
    save_model(folder, seed=1, vocab=111)
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": 3, "layer_types": config["layer_types"][:3]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_own.py").write_text("")
    output = run_ranks(2, WORKER, str(tmp_path))
    assert output.count("PASSED") == 2, output
    said = f"not copied from {folder} into {tmp_path}/run/export/000007: modeling_own.py"
    assert output.count(said) == 2, "by rank 0: of the export that failed, of the one that is whole"


def test_files_take_turns_bucket_by_bucket() -> None:
    import torch

    specs = [TensorSpec(name, (10,), torch.uint8) for name in "abcdefgh"]
    shards = plan_shards(specs, 40)
    streamed = {spec.name: spec for spec in specs if spec.name != "f"}  # f comes from a file
    turns = list(in_turns(shards, streamed, 20))
    assert turns == [(0, ["a", "b"]), (1, ["e", "g"]), (0, ["c", "d"]), (1, ["h"])]
