"""An export is the student's own folder with new weights: whole or not at all, readable by whoever
read the folder before.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mtopd.hf_checkpoint import HFTensors, check_checkpoint, load_hf_config
from mtopd.hf_export import config_values
from mtopd.tokenizer import load_tokenizer, tokenizer_hash
from tests.small_models import save_model, write_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "model"
    save_model(folder, seed=1, layers=1)
    return folder


def export(
    source: Path, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any
) -> list[str]:
    tensors = {name: t.to(dtype) for name, t in load_file(source / "model.safetensors").items()}
    return write_checkpoint(folder, tensors, source, changes, dtype=dtype)


def edit(path: Path, **values: Any) -> None:
    found = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))


def copied(model: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_written_folder_reads_back_bit_for_bit(model: Path, tmp_path: Path) -> None:
    for name in (".out.tmp", "out"):  # what a killed export left
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    assert export(model, tmp_path / "out", torch.bfloat16) == []
    found = HFTensors(tmp_path / "out")
    tensors = load_file(model / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[n], t.bfloat16()) for n, t in tensors.items())
    assert load_hf_config(tmp_path / "out").dtype == torch.bfloat16
    same = [tokenizer_hash(load_tokenizer(folder)) for folder in (model, tmp_path / "out")]
    assert same[0] == same[1] and not (tmp_path / ".out.tmp").exists()
    check_checkpoint(tmp_path / "out")


def test_whoever_may_read_the_config_may_read_the_weights(model: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        export(model, tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}


def test_a_folder_without_its_seal_gets_no_name(model: Path, tmp_path: Path) -> None:
    def full_disk(folder: Path) -> None:
        raise OSError("no space left")

    tensors = load_file(model / "model.safetensors")
    with pytest.raises(OSError, match="no space"):
        write_checkpoint(tmp_path / "out", tensors, model, {}, dtype=torch.float32, seal=full_disk)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_transformers_4_keeps_its_own_spellings(model: Path, tmp_path: Path) -> None:
    source = copied(model, tmp_path / "source")
    edit(
        source / "config.json",
        **{"rope_parameters": None, "rope_theta": 1e6, "dtype": None, "torch_dtype": "float32"},
        **{"transformers_version": "4.51.0", "a_field_of_nobody": [1]},
    )
    edit(source / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", backend=None)
    export(source, tmp_path / "out", torch.bfloat16)
    before, after = (
        json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "out")
    )
    assert after == before | {"torch_dtype": "bfloat16"}
    name = "tokenizer_config.json"
    assert json.loads((tmp_path / "out" / name).read_text()) == json.loads(
        (source / name).read_text()
    )
    assert load_hf_config(tmp_path / "out").rope_parameters["rope_theta"] == 1e6


def test_a_folder_of_transformers_5_is_read_by_4_too(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0}
    values = config_values({"dtype": "float32", "rope_parameters": yarn}, torch.bfloat16)
    assert values == {
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "rope_parameters": yarn,
        "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    }
    plain = config_values(
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, torch.float32
    )
    assert plain["rope_theta"] == 1e4 and "rope_scaling" not in plain
    nulls = config_values(
        {"rope_parameters": yarn, "rope_theta": None, "rope_scaling": None}, torch.float32
    )
    assert {name: nulls[name] for name in ("rope_theta", "rope_scaling")} == {
        "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    }, "null would be read as not scaled"
    experts = config_values({"model_type": "qwen3_moe", "num_local_experts": 8}, torch.float32)
    assert experts["num_experts"] == experts["num_local_experts"] == 8


def test_what_told_of_quantised_weights_is_left_out(model: Path, tmp_path: Path) -> None:
    """Weights are written with their scales multiplied in: nobody may multiply again."""
    source = copied(model, tmp_path / "source")
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    edit(source / "config.json", quantization_config=fp8, compression_config=fp8)
    export(source, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not found.keys() & {"quantization_config", "compression_config"}
    assert found["model_type"] == "qwen3" and found["torch_dtype"] == "float32"


def test_what_is_no_weight_is_copied_by_list_and_the_rest_is_named(
    model: Path, tmp_path: Path
) -> None:
    source = copied(model, tmp_path / "source")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    (source / "additional_chat_templates" / "notes.py").write_text("x")
    kept = (
        "generation_config.json",
        "LICENSE",
        "README.md",
        "merges.txt",
        "spiece.model",
        "tiktoken_ranks",
        "vocab.json",
    )
    for name in kept:
        (source / name).write_text("{}")
    dropped = (
        "modeling_mine.py",
        "old.safetensors",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "training_args.pt",
    )
    for name in dropped:
        (source / name).write_text("x")
    (tmp_path / "elsewhere.json").write_text("{}")
    (source / "linked.json").symlink_to(tmp_path / "elsewhere.json")
    (source / "model.safetensors.index.json").write_text("{}")
    edit(source / "config.json", auto_map={"AutoModel": "modeling_mine.MyModel"})
    left_out = export(source, tmp_path / "out")
    assert set(left_out) == {
        *dropped,
        "linked.json",
        "auto_map of config.json",
        "additional_chat_templates/notes.py",
    }
    out = tmp_path / "out"
    assert all((out / name).is_file() for name in kept)
    assert (out / "additional_chat_templates" / "tools.jinja").is_file()
    names = {path.name for path in out.rglob("*")}
    assert not names & {*dropped, "linked.json", "model.safetensors.index.json"}
    assert "auto_map" not in json.loads((out / "config.json").read_text())


def test_a_student_made_of_links_gets_an_export_that_can_be_read(
    model: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in model.iterdir():
        (source / path.name).symlink_to(path)
    (source / "vocab.json").symlink_to(model / "config.json")  # not read: not followed
    assert export(source, tmp_path / "out") == ["vocab.json"]
    check_checkpoint(tmp_path / "out")
    load_tokenizer(tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_links_of_a_hubs_cache_are_followed(model: Path, tmp_path: Path) -> None:
    blobs, source = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    source.mkdir(parents=True)
    for path in [*model.iterdir(), Path(__file__)]:
        name = "README.md" if path.suffix == ".py" else path.name
        (blobs / f"of-{name}").write_bytes(path.read_bytes())
        (source / name).symlink_to(Path("../../blobs") / f"of-{name}")
    assert export(source, tmp_path / "out") == []
    assert (tmp_path / "out" / "README.md").is_file()


def test_files_of_the_tokenizer_keep_their_bytes_and_text_may_be_of_any_kind(
    model: Path, tmp_path: Path
) -> None:
    source = copied(model, tmp_path / "source")
    compact = json.dumps(json.loads((model / "tokenizer_config.json").read_text()))
    (source / "tokenizer_config.json").write_text(compact)
    edit(source / "config.json", note="half a pair: \ud800")
    export(source, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == compact
    assert json.loads((tmp_path / "out" / "config.json").read_text())["note"][-1] == "\ud800"


def test_what_changed_stands_in_the_config(model: Path, tmp_path: Path) -> None:
    export(model, tmp_path / "out", tie_word_embeddings=False)
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )
