"""The run's prompts: what they are made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtopd.config import SourceConfig
from mtopd.prompt_table import source_identity
from mtopd.types import MtopdError


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    path, moved = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    path.write_text('{"prompt": "a"}\n')
    first = source_identity(SourceConfig(name="x", path=path))
    path.rename(moved)
    assert source_identity(SourceConfig(name="x", path=moved)) == first
    moved.write_text('{"prompt": "b"}\n')
    assert source_identity(SourceConfig(name="x", path=moved)) != first
    both = source_identity(SourceConfig(name="x", path=moved, eval_path=moved))
    assert both["eval_path"] == both["path"]
    with pytest.raises(MtopdError, match=r"source 'x': .*a\.jsonl cannot be read"):
        source_identity(SourceConfig(name="x", path=path))


def test_a_dataset_is_known_by_its_draws() -> None:
    def identity(**values: object) -> dict:
        return source_identity(
            SourceConfig.model_validate({"name": "x", "reasoning_gym": "chain_sum", **values})
        )

    first = identity()
    assert first["version"] and identity() == first
    for values in ({"config": {"min_terms": 3}}, {"seed": 2}, {"train_size": 7}, {"eval_size": 7}):
        assert identity(**values) != first, values
