"""An HF folder: read tensor by tensor, written whole or not at all, refused when it is damaged."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtopd import hf_weights
from mtopd.config import StudentConfig
from mtopd.convert.teacher import add_teacher
from mtopd.hf_checkpoint import (
    HFTensors,
    check_checkpoint,
    hf_config_from_dict,
    load_hf_config,
)
from mtopd.pipelines.checks import check_baselines, check_student, check_weight_average
from mtopd.tokenizer import load_tokenizer
from mtopd.types import MtopdError
from tests.small_models import save_model, whole


def test_what_is_no_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(MtopdError, match=r"is not an HF checkpoint: it has no config\.json"):
        load_hf_config(tmp_path)
    with pytest.raises(
        MtopdError, match=r"has neither model\.safetensors nor .* copy or export it again"
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
    models = [whole(hf_weights.read_weights(folder)) for folder in folders]
    average = whole(hf_weights.average_weights(folders))
    assert average.keys() == models[0].keys()
    for name, tensor in average.items():
        expected = torch.stack([model[name] for model in models]).mean(0)
        assert tensor.dtype == models[0][name].dtype
        assert torch.equal(tensor, expected), name
        assert not torch.equal(tensor, models[0][name]) or "norm" in name


@pytest.mark.parametrize("read", ["one", "mean"])
def test_one_bucket_at_a_time_is_in_memory(
    read: str, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether of one checkpoint or of the mean of six, where a tensor of two is there beside it."""
    known: list[weakref.ref[torch.Tensor]] = []
    found = []
    item = HFTensors.__getitem__

    def alive() -> int:
        tensors = [reference() for reference in known]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def counted(self: HFTensors, name: str) -> torch.Tensor:
        tensor = item(self, name).to(torch.bfloat16)
        found.append(alive() + tensor.nbytes)
        known.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(HFTensors, "__getitem__", counted)
    size = 40_000
    if read == "one":
        buckets = hf_weights.read_weights(folders[0], size)
    else:
        buckets = hf_weights.average_weights(folders * 2, size)
    sizes, dtypes, largest = [], set(), 0
    for bucket in buckets:
        if read == "mean":  # its buckets hold other tensors than the files'
            known += map(weakref.ref, bucket.values())
        sizes.append(sum(t.nbytes for t in bucket.values()))
        dtypes |= {t.dtype for t in bucket.values()}
        largest = max(largest, *(t.nbytes for t in bucket.values()))
    assert dtypes == {torch.bfloat16} and len(sizes) > 5
    assert max(sizes) <= max(size, largest) and max(found) <= 2 * size + 3 * largest, (sizes, found)


def test_checkpoints_of_other_tensors_are_not_averaged(folders: list[Path], tmp_path: Path) -> None:
    """Whichever comes first: what one has more is a part of its model."""
    save_model(tmp_path / "tied", seed=4, tied=True)
    for pair in ([tmp_path / "tied", folders[0]], [folders[0], tmp_path / "tied"]):
        with pytest.raises(MtopdError, match=r"tied has no tensor 'lm_head\.weight'"):
            hf_weights.average_weights(pair)
    save_model(tmp_path / "deep", seed=4, tied=False, layers=5)
    with pytest.raises(MtopdError, match=r"0 has no tensor 'model\.layers\.4.* which .*deep has"):
        hf_weights.average_weights([folders[0], tmp_path / "deep"])
    save_model(tmp_path / "wide", seed=4, tied=False, intermediate_size=160)
    with pytest.raises(MtopdError, match=r"mlp.*has shape \(.*160.*\) in .*wide and .*128"):
        hf_weights.average_weights([folders[0], tmp_path / "wide"])


def test_an_average_that_cannot_be_is_refused_before_ranks_start(
    folders: list[Path], tmp_path: Path
) -> None:
    save_model(tmp_path / "wide", seed=4, tied=False, intermediate_size=160)
    named = {"a": folders[0], "b": tmp_path / "wide"}
    for averaged, said in (
        (["a", "b"], r"^evaluation\.weight_average: .*cannot be av"),
        (["a"], ""),
    ):
        evaluation = SimpleNamespace(baselines=named, weight_average=averaged)
        refused = pytest.raises(MtopdError, match=said) if said else nullcontext()
        with refused:
            check_weight_average(SimpleNamespace(evaluation=evaluation))


# -- which files count, and what they must hold ----------------------------------------------------
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 11422654\n"


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "model"
    save_model(folder, seed=1, layers=2, hidden=32, tied=False)
    return folder


@pytest.fixture
def folder(untied: Path, tmp_path: Path) -> Path:
    shutil.copytree(untied, tmp_path / "model")
    return tmp_path / "model"


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def store(folder: Path, tensors: dict[str, torch.Tensor], name: str = "model.safetensors") -> None:
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / name, {"format": "pt"})


def edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def in_shards(folder: Path) -> tuple[dict[str, str], list[str]]:
    """The folder's tensors in two files and their index: (the index's map, the files)."""
    tensors = stored(folder)
    (folder / "model.safetensors").unlink()
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    parts = [{n: tensors[n] for n in sorted(tensors)[i::2]} for i in range(2)]
    for file, part in zip(files, parts, strict=True):
        store(folder, part, file)
    index = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    write_index(folder, index)
    return index, files


def write_index(folder: Path, weight_map: object) -> None:
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def test_the_single_file_counts_before_an_index_and_nothing_else_does(folder: Path) -> None:
    other = {name: tensor + 1 for name, tensor in stored(folder).items()}
    store(folder, other, "backup.safetensors")
    store(folder, other, "model-00001-of-00001.safetensors")
    write_index(folder, dict.fromkeys(other, "model-00001-of-00001.safetensors"))
    found = HFTensors(folder)
    assert all(torch.equal(found[n], t) for n, t in stored(folder).items())
    for check in (
        lambda say: check_checkpoint(folder, say),
        lambda say: check_student(StudentConfig(model=folder), deterministic=True, say=say),
        lambda say: add_teacher("t", folder, folder.parent / "t", slices=1, say=say),
    ):
        said: list[str] = []
        check(said.append)
        (line,) = [text for text in said if "index.json" in text]
        assert line.startswith(f"{folder}: model.safetensors counts, model.safetensors.index.json")


def test_shards_are_read_by_their_index(folder: Path) -> None:
    tensors = stored(folder)
    index, files = in_shards(folder)
    store(folder, {"model.norm.weight": torch.zeros(32)}, "stray.safetensors")
    found = HFTensors(folder)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[n], t) for n, t in tensors.items())
    check_checkpoint(folder)
    write_index(folder, dict.fromkeys(index, files[0]))
    with pytest.raises(MtopdError, match=rf"{files[0]} has no tensor .* one of them is of another"):
        HFTensors(folder)
    write_index(folder, index)
    store(folder, {n: t for n, t in tensors.items() if n in index}, files[1])
    with pytest.raises(MtopdError, match=rf"is in .*{files[0]} and in .*{files[1]}"):
        HFTensors(folder)
    (folder / files[1]).unlink()
    with pytest.raises(MtopdError, match=rf"has no {files[1]}, which .* names"):
        HFTensors(folder)


@pytest.mark.parametrize(
    "weight_map", [None, {}, [], {"a": 1}, {"a": "../x.safetensors"}, {"a": "/x.safetensors"}]
)
def test_an_index_that_leads_nowhere_is_refused(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors").unlink()
    write_index(folder, weight_map)
    with pytest.raises(MtopdError, match=r"model\.safetensors\.index\.json"):
        HFTensors(folder)


def test_a_git_lfs_pointer_is_named_as_such(folder: Path) -> None:
    (folder / "model.safetensors").write_text(POINTER)
    with pytest.raises(MtopdError, match=r"model\.safetensors is a git-lfs pointer.*git lfs pull"):
        check_checkpoint(folder)
    (folder / "config.json").write_text(POINTER)
    with pytest.raises(MtopdError, match=r"config\.json is a git-lfs pointer"):
        load_hf_config(folder)


def test_other_formats_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        MtopdError, match=r"found pytorch_model\.bin, which is not read under .* save_pre"
    ):
        check_checkpoint(folder)
    (folder / "pytorch_model.bin").rename(folder / "consolidated.safetensors")
    with pytest.raises(
        MtopdError, match=r"found consolidated\.safetensors, which is not read under"
    ):
        check_checkpoint(folder)
    (folder / "model.safetensors").symlink_to("../blobs/gone")
    with pytest.raises(
        MtopdError, match=r"model\.safetensors is a link to a file that is not there"
    ):
        check_checkpoint(folder)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(
        MtopdError, match=r"it has no config\.json; found model\.gguf, which is not"
    ):
        check_checkpoint(tmp_path)


def test_an_adapter_alone_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    store(tmp_path, {"a.lora_A.weight": torch.ones(1)}, "adapter_model.safetensors")
    with pytest.raises(MtopdError, match="holds an adapter"):
        check_checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["deepseek_v3", "qwen3_moe", "mixtral", "llama"])
def test_every_architecture_as_transformers_saves_it_holds_what_its_config_calls_for(
    tmp_path: Path, kind: str
) -> None:
    save_model(tmp_path, seed=1, layers=2, model_type=kind, tied=False)
    check_checkpoint(tmp_path)
    tensors = stored(tmp_path)
    last = next(n for n in tensors if "experts.3." in n or "layers.1.mlp.down" in n)
    store(tmp_path, tensors | {last: tensors[last][:, :-1]})
    with pytest.raises(MtopdError, match=rf"tensor '{last}' has shape"):
        check_checkpoint(tmp_path)


def test_an_own_output_layer_counts_also_under_a_config_that_says_tied(folder: Path) -> None:
    """transformers keeps the file's head (huggingface/transformers#42612)."""
    from transformers import AutoModelForCausalLM

    edit_config(folder, tie_word_embeddings=True)
    assert not load_hf_config(folder).tie_word_embeddings
    theirs = AutoModelForCausalLM.from_pretrained(folder).lm_head.weight
    assert torch.equal(theirs, stored(folder)["lm_head.weight"])
    tensors = stored(folder)
    store(folder, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert load_hf_config(folder).tie_word_embeddings, "a copy of the embedding is no other head"
    assert "lm_head.weight" not in whole(hf_weights.read_weights(folder))
    check_checkpoint(folder)


def test_a_config_may_say_one_thing_twice_if_it_is_the_same(folder: Path) -> None:
    """Exports do, so that transformers 4 and 5 read one model."""
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    same = {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "default"}}
    edit_config(folder, **same)
    check_checkpoint(folder)
    edit_config(folder, rope_theta=None, rope_scaling=None)
    assert load_hf_config(folder).rope_parameters["rope_theta"] == rope["rope_theta"]


def test_former_names_of_a_field_agree_with_its_new_ones(tmp_path: Path) -> None:
    save_model(tmp_path, seed=1, layers=2, model_type="qwen3_moe")
    values = json.loads((tmp_path / "config.json").read_text())
    count = values.get("num_experts", values.get("num_local_experts"))
    edit_config(tmp_path, num_experts=count, num_local_experts=count)
    check_checkpoint(tmp_path)
    edit_config(tmp_path, num_experts=count, num_local_experts=count + 1)
    with pytest.raises(MtopdError, match=f"num_local_experts {count + 1}|num_experts {count + 1}"):
        check_checkpoint(tmp_path)


def test_float16_is_read_exactly_as_float32_whatever_the_config_says(folder: Path) -> None:
    half = {name: tensor.half() for name, tensor in stored(folder).items()}
    store(folder, half)
    edit_config(folder, dtype="bfloat16")
    found = HFTensors(folder)
    assert all(torch.equal(found[n], t.float()) for n, t in half.items())
    assert found.dtype("model.norm.weight") == torch.float32
    check_checkpoint(folder)


def quantise(folder: Path) -> None:
    tensors = stored(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    store(folder, tensors | {name: tensors[name].to(torch.float8_e4m3fn)})


def leave_a_scale(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    store(folder, stored(folder) | {name: torch.ones(1, 1)})


def pack(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    store(folder, stored(folder) | {name: stored(folder)[name].to(torch.uint8)})


def call_it_float4(folder: Path) -> None:
    """A dtype newer than this reader, in a header that is sound otherwise."""
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"]["dtype"] = "F4"
    text = json.dumps(header).encode()
    whole = len(text).to_bytes(8, "little") + text + data[8 + length :]
    (folder / "model.safetensors").write_bytes(whole)


def point_at_a_shard(folder: Path) -> None:
    _, files = in_shards(folder)
    (folder / files[1]).write_text(POINTER)


def point_at_the_index(folder: Path) -> None:
    in_shards(folder)
    (folder / "model.safetensors.index.json").write_text(POINTER)


def index_a_pickle(folder: Path) -> None:
    index, _ = in_shards(folder)
    write_index(folder, index | {"model.norm.weight": "pytorch_model.bin"})


def forget_the_head(folder: Path) -> None:
    store(folder, {n: t for n, t in stored(folder).items() if n != "lm_head.weight"})


def cut_the_vocabulary(folder: Path) -> None:
    name = "model.embed_tokens.weight"
    store(folder, stored(folder) | {name: stored(folder)[name][:-1]})


DAMAGES = [
    (lambda f: edit_config(f, quantization_config={"quant_method": "fp8"}), "quantised"),
    (lambda f: edit_config(f, compression_config={"format": "int4"}), "a compression_config: quant"),
    (lambda f: edit_config(f, quantization={"bits": 4}), "a quantization: quantised .* and remove"),
    (lambda f: edit_config(f, rope_theta=1e6), "rope_parameters.rope_theta 10000.0, but rope_theta 1000000.0"),
    (
        lambda f: edit_config(f, rope_scaling={"type": "linear", "factor": 2.0}),
        "rope_parameters.factor None, but rope_scaling.factor 2.0: which .*; leave the wrong one out",
    ),
    (lambda f: edit_config(f, model_type=["qwen3"]), r"has model_type \['qwen3'\]; supported are"),
    (quantise, r"up_proj.weight' is F8_E4M3, quantised"),
    (pack, r"up_proj.weight' is U8, quantised"),
    (call_it_float4, r"tensor 'model\.norm\.weight' has dtype 'F4', which is not read"),
    (point_at_a_shard, r"model-00002-of-00002\.safetensors is a git-lfs pointer"),
    (point_at_the_index, r"index\.json is a git-lfs pointer"),
    (index_a_pickle, r"is in 'pytorch_model\.bin'; needed is the name of a safetensors file"),
    (
        lambda f: store(f, stored(f) | {"model.extra.weight": torch.ones(2)}),
        r"holds tensor 'model\.extra\.weight', which a qwen3 .* does not use",
    ),
    (leave_a_scale, r"weight_scale_inv', which a qwen3 .* does not use"),
    (
        lambda f: store(f, {n.removeprefix("model."): t for n, t in stored(f).items()}),
        r"files hold 0 by their names .*; found 'layers\.0\.input_layernorm\.weight': save the causal",
    ),
    (lambda f: edit_config(f, torch_dtype="auto"), "has torch_dtype 'auto'; it is the name of a dtype"),
    (
        lambda f: edit_config(
            f, rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
        ),
        r"rope_parameters differ by kind of layer \(full_attention\); only one rope",
    ),
    (
        lambda f: (f / "config.json").write_bytes(
            b"\xef\xbb\xbf" + (f / "config.json").read_bytes()
        ),
        r"config\.json is not valid JSON \(Unexpected UTF-8 BOM",
    ),
    (forget_the_head, r"has no tensor 'lm_head\.weight'"),
    (cut_the_vocabulary, r"embed_tokens\.weight' has shape \(99, 32\), .* calls for \(100, 32\)"),
    (lambda f: edit_config(f, num_hidden_layers=3, layer_types=None), "has no tensor of layer 2"),
    (lambda f: edit_config(f, hidden_size=-1), "hidden_size is -1; it must be a whole number"),
    (
        lambda f: edit_config(f, layer_types=["sliding_attention"] * 2, use_sliding_window=False),
        "layer_types has sliding_attention, but there is no window",
    ),
    (shutil.rmtree, r"there is no folder .*\(a hub's name is not looked up: download it first\)"),
    (lambda f: edit_config(f, rms_norm_eps="small"), "rms_norm_eps|not a config of qwen3"),
    (lambda f: (f / "model.safetensors").write_text(POINTER), "git-lfs pointer"),
    (lambda f: (f / "tokenizer.json").write_text(POINTER), r"tokenizer\.json is a git-lfs pointer"),
    (lambda f: os.truncate(f / "tokenizer.json", 500), r"tokenizer\.json: no readable tokenizer"),
    (lambda f: (f / "adapter_config.json").write_text("{}"), "holds an adapter"),
    (lambda f: edit_config(f, transformers_weights="other.safetensors"), "transformers_weights 'oth"),
    (lambda f: edit_config(f, configuration_files=["config.4.0.0.json"]), "has configuration_files"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "said"), DAMAGES)
def test_student_teacher_and_baselines_are_refused_alike_before_anything_is_written(
    folder: Path, untied: Path, tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    damage(folder)
    with pytest.raises(MtopdError, match=said):
        check_student(StudentConfig(model=folder), deterministic=True)
    with pytest.raises(MtopdError, match=said):
        add_teacher("t", folder, tmp_path / "stores" / "t", slices=1)
    assert not (tmp_path / "stores").exists()
    config = SimpleNamespace(evaluation=SimpleNamespace(baselines={"base": folder}))
    with pytest.raises(MtopdError, match=rf"evaluation\.baselines\.base: .*({said})"):
        check_baselines(config, load_tokenizer(untied))  # type: ignore[arg-type]


def test_layers_behind_the_last_are_no_part_of_a_model_made_shallower(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=1, layer_types=["full_attention"])
    said: list[str] = []
    facts = check_checkpoint(folder, said.append)
    (line,) = said
    assert line.endswith("has 1 layers; 1 more in the files, up to layer 1, are not read")
    assert facts.num_layers == 1 and facts.num_further_heads == 0
    assert not any("layers.1." in name for name in whole(hf_weights.read_weights(folder)))


def test_a_teachers_store_is_made_of_the_tensors_that_count(folder: Path, tmp_path: Path) -> None:
    """Bytes of the store: shards, float16 and a head under a tied config give the plain folder's."""
    store(folder, {name: tensor.half() for name, tensor in stored(folder).items()})
    plain = shutil.copytree(folder, tmp_path / "plain")
    store(plain, {name: tensor.float() for name, tensor in stored(plain).items()})
    tensors = stored(folder)
    in_shards(folder)
    store(folder, {name: tensor + 1 for name, tensor in tensors.items()}, "stray.safetensors")
    edit_config(folder, tie_word_embeddings=True, dtype="bfloat16")
    found, expected = (
        add_teacher("t", source, tmp_path / "stores" / source.name, slices=1).manifest
        for source in (folder, plain)
    )
    assert found["files"] == expected["files"]
    assert (found["stored_dtype"], found["tied_embeddings"]) == ("F32", False)


def test_a_head_that_a_store_would_round_is_refused(folder: Path, tmp_path: Path) -> None:
    half = {name: tensor.bfloat16() for name, tensor in stored(folder).items()}
    store(folder, half | {"lm_head.weight": half["lm_head.weight"].float()})
    with pytest.raises(MtopdError, match=r"lm_head\.weight is torch\.float32, the embedding"):
        add_teacher("t", folder, tmp_path / "stores" / "t", slices=1)
    assert not (tmp_path / "stores").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_is_named_by_whoever_reads_it(
    folder: Path, tmp_path: Path, dtype: torch.dtype, value: float
) -> None:
    """Student and baselines read by ``read_weights`` or the bridge, teachers by ``teachers add``:
    all of them one tensor at a time, through one reader.
    """
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = {n: tensor.to(dtype) for n, tensor in stored(folder).items()}
    tensors[name][3, 5] = value
    store(folder, tensors)
    said = rf"model\.safetensors: tensor '{name}' has 1 of \d+ .* NaN or infinite, .* at \[3, 5\]"
    with pytest.raises(MtopdError, match=said):
        whole(hf_weights.read_weights(folder))
    with pytest.raises(MtopdError, match=said):
        add_teacher("t", folder, tmp_path / "stores" / "t", slices=1)
    assert not (tmp_path / "stores" / "t").exists()


def test_large_numbers_are_numbers(folder: Path) -> None:
    """Their sum would overflow."""
    tensors = stored(folder)
    tensors["model.norm.weight"][:] = 3e38
    store(folder, tensors)
    assert whole(hf_weights.read_weights(folder))["model.norm.weight"].max() == 3e38
