"""An export by several ranks: each writes its files, and what one meets ends all."""

from __future__ import annotations

from pathlib import Path

from mtopd.hf_weights import TensorSpec
from mtopd.hf_writer import plan_shards
from mtopd.pipelines.export import in_turns
from tests.conftest import run_ranks
from tests.small_models import save_model

WORKER = Path(__file__).with_name("export_ranks.py")


def test_a_full_disk_on_one_rank_ends_all_and_the_next_export_is_whole(tmp_path: Path) -> None:
    save_model(tmp_path / "model", seed=1, vocab=111)
    output = run_ranks(2, WORKER, str(tmp_path))
    assert output.count("PASSED") == 2, output


def test_files_take_turns_bucket_by_bucket() -> None:
    import torch

    specs = [TensorSpec(name, (10,), torch.uint8) for name in "abcdefgh"]
    shards = plan_shards(specs, 40)
    streamed = {spec.name: spec for spec in specs if spec.name != "f"}  # f comes from a file
    turns = list(in_turns(shards, streamed, 20))
    assert turns == [(0, ["a", "b"]), (1, ["e", "g"]), (0, ["c", "d"]), (1, ["h"])]
