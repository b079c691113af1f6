"""What SGLang servers start with, as far as it can be said without a server."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoConfig

from mtopd.rollout.sglang_serving import write_serving_folder
from tests.small_models import save_model


def test_the_folder_holds_the_students_config_cut_to_its_tokens(tmp_path: Path) -> None:
    student, folder = tmp_path / "student", tmp_path / "run" / "serving"
    save_model(student, seed=0, layers=1, vocab=120)
    path = student / "config.json"
    values = json.loads(path.read_text()) | {"auto_map": {"AutoConfig": "code.Config"}}
    path.write_text(json.dumps(values))
    write_serving_folder(folder, student, 100, torch.bfloat16)
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    found = AutoConfig.from_pretrained(folder)
    assert found.vocab_size == 100 and found.dtype == torch.bfloat16
    written = json.loads((folder / "config.json").read_text())
    assert written["torch_dtype"] == "bfloat16" and "auto_map" not in written
    path.write_text(json.dumps({k: v for k, v in values.items() if k != "auto_map"}))
    plain = AutoConfig.from_pretrained(student).to_dict()
    differing = {key for key, value in found.to_dict().items() if plain.get(key) != value}
    # Where it lies; what is said a second time, for transformers 4.
    assert differing - {"_name_or_path", "rope_theta", "torch_dtype"} == {"vocab_size", "dtype"}


def test_a_folder_that_stands_there_is_kept_and_another_students_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "serving"
    save_model(tmp_path / "one", seed=0, layers=1)
    save_model(tmp_path / "two", seed=0, layers=2)
    write_serving_folder(folder, tmp_path / "one", 90, torch.float32)
    before = (folder / "config.json").stat().st_ino
    write_serving_folder(folder, tmp_path / "one", 90, torch.float32)
    assert (folder / "config.json").stat().st_ino == before, "a server may be reading it"
    write_serving_folder(folder, tmp_path / "two", 90, torch.float32)
    assert AutoConfig.from_pretrained(folder).num_hidden_layers == 2
