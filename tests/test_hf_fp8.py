"""FP8 weights of HF folders are numbers once they are read, and every scale belongs to one of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtopd import hf_weights
from mtopd.config import StudentConfig
from mtopd.convert.teacher import add_teacher
from mtopd.hf_checkpoint import HFTensors, check_checkpoint, load_hf_config
from mtopd.hf_fp8 import Fp8
from mtopd.pipelines.checks import check_baselines, check_student
from mtopd.tokenizer import load_tokenizer
from mtopd.types import MtopdError
from tests.fp8_models import BLOCK, UNQUANTISED, compressed, cut, quantise
from tests.small_models import save_model, whole, write_checkpoint

UP = "model.layers.0.mlp.up_proj.weight"
FORMS = {"block": BLOCK, "channel": compressed("channel"), "tensor": compressed("tensor")}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8") / "plain"
    save_model(folder, seed=1, layers=2, tied=False)
    return folder


@pytest.fixture
def pair(plain: Path, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    def make(config: dict[str, Any], **options: Any) -> tuple[Path, Path]:
        fp8, dequantised = tmp_path / "fp8", tmp_path / "whole"
        quantise(plain, fp8, dequantised, config, **options)
        return fp8, dequantised

    return make


@pytest.fixture
def folder(pair: Callable[..., tuple[Path, Path]]) -> Path:
    return pair(BLOCK)[0]


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def store(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((576, 320), (128, 128)),  # DeepSeek-V3's kv_a has 576 rows
        ((192, 320), (128, 128)),  # two blocks of rows: shapes alone say 96
        ((1, 1), (128, 128)),
        ((130, 257), (128, 64)),
        ((50, 30), (7, 11)),
    ],
)
def test_each_block_has_its_own_scale(
    shape: tuple[int, int], block: tuple[int, int], dtype: torch.dtype
) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    matrix *= torch.logspace(-3, 3, shape[0])[:, None] * torch.logspace(-2, 2, shape[1])
    codes, scales, weight = cut(matrix, *block, torch.float32)
    found = Fp8(block, "_scale_inv", False, dtype).weight(codes, scales)
    assert found.dtype == dtype and torch.equal(found, weight.float().to(dtype))


def test_every_code_is_read_as_torch_reads_it() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128).view(torch.float8_e4m3fn)
    scales = torch.tensor([[0.37], [5.0]])
    found = Fp8((1, None), "_scale", False, torch.float32).weight(codes, scales)
    expected = (codes.double() * scales.double()).float()
    assert torch.equal(found.nan_to_num(1e9), expected.nan_to_num(1e9))
    assert found.isnan().sum() == 2


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("form", FORMS)
def test_a_folder_reads_as_the_one_with_its_scales_multiplied_in(
    pair: Callable[..., tuple[Path, Path]], form: str, dtype: str, scale_dtype: torch.dtype
) -> None:
    fp8, dequantised = pair(FORMS[form], dtype=dtype, scale_dtype=scale_dtype)
    found, expected = HFTensors(fp8), stored(dequantised)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == found.dtype(name) == tensor.dtype, name
        assert found[name].shape == found.shape(name), name
    assert stored(fp8)[UP].dtype == torch.float8_e4m3fn != stored(fp8)[UNQUANTISED].dtype
    read = whole(hf_weights.read_weights(fp8))
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())
    said: list[str] = []
    check_checkpoint(fp8, said.append)
    assert said == [f"{fp8}: 13 FP8 weights are read with their scales, as {dtype}"]
    facts, wanted = (load_hf_config(folder).to_dict() for folder in (fp8, dequantised))
    assert facts == wanted | {"_name_or_path": str(fp8)}


def test_weights_and_scales_may_be_in_different_files(folder: Path) -> None:
    expected, tensors = dict(HFTensors(folder)), stored(folder)
    (folder / "model.safetensors").unlink()
    files = dict[str, dict[str, torch.Tensor]]()
    for name, tensor in tensors.items():
        number = 1 + name.endswith("_scale_inv")
        files.setdefault(f"model-0000{number}-of-00002.safetensors", {})[name] = tensor
    for file, part in files.items():
        save_file(part, folder / file, {"format": "pt"})
    index = {name: file for file, part in files.items() for name in part}
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    found = HFTensors(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_scales_of_activations_are_left_out_where_the_config_says_that_there_are_some(
    pair: Callable[..., tuple[Path, Path]],
) -> None:
    config = compressed("tensor")
    group = config["config_groups"]["group_0"]
    group["input_activations"] |= {"dynamic": False, "strategy": "tensor"}
    fp8, dequantised = pair(config)
    name = UP.removesuffix("weight") + "input_scale"
    store(fp8, stored(fp8) | {name: torch.ones(1)})
    said: list[str] = []
    check_checkpoint(fp8, said.append)
    assert said[1] == (
        f"{fp8}: 1 scales of activations (input_scale) are not read: the weights do not depend on "
        "them"
    )
    found = HFTensors(fp8)
    assert found.keys() == stored(dequantised).keys()
    group["input_activations"]["dynamic"] = True
    edit_config(fp8, quantization_config=config)
    with pytest.raises(MtopdError, match=rf"'{name}' is a scale that no F8_E4M3 weight takes"):
        HFTensors(fp8)


@pytest.mark.parametrize("form", FORMS)
def test_a_teacher_of_fp8_weights_is_the_one_of_the_dequantised_folder(
    pair: Callable[..., tuple[Path, Path]], tmp_path: Path, form: str
) -> None:
    found, expected = (
        add_teacher("t", source, tmp_path / "stores" / source.name, slices=2).manifest
        for source in pair(FORMS[form])
    )
    assert found["files"] == expected["files"] and found["stored_dtype"] == "BF16"
    expected["architecture"]["_name_or_path"] = found["architecture"]["_name_or_path"]
    assert {key for key in expected if found[key] != expected[key]} == {"source"}


def test_another_block_size_is_another_source(folder: Path) -> None:
    before = HFTensors(folder).identity()
    edit_config(folder, quantization_config=BLOCK | {"weight_block_size": [23, 39]})
    assert HFTensors(folder).identity() != before


def test_an_export_is_whole_and_is_not_multiplied_again(
    pair: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    fp8, dequantised = pair(BLOCK)
    tensors = dict(HFTensors(fp8))
    for source in (fp8, dequantised):
        write_checkpoint(tmp_path / "out" / source.name, tensors, source, {}, dtype=torch.bfloat16)
    out, plain_out = tmp_path / "out" / "fp8", tmp_path / "out" / "whole"
    values = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in values and values["dtype"] == "bfloat16"
    for path in plain_out.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    check_checkpoint(out)
    found = HFTensors(out)
    assert found.keys() == tensors.keys() == stored(out).keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in stored(dequantised).items())


# -- refusals --------------------------------------------------------------------------------------


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """``UP`` itself, its scale, or what is said by its ending."""
    names = {"codes": UP, "scale": f"{UP}_scale_inv"}
    found = stored(folder) | {names.get(n, f"model.layers.0.{n}"): t for n, t in tensors.items()}
    store(folder, {name: tensor for name, tensor in found.items() if tensor is not None})


def group(**values: object) -> Callable[[Path], None]:
    config = compressed("channel")
    config["config_groups"]["group_0"] |= values
    return lambda folder: edit_config(folder, quantization_config=config)


def config(**values: object) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, quantization_config=values)


GPTQ = {"quant_method": "gptq", "bits": 4}
INT4 = compressed("group", num_bits=4, type="int") | {"format": "pack-quantized"}
READ = r", only FP8 in blocks \(quant_method fp8, .* FP8 of compressed-tensors .*; convert the"
REFUSED = [
    *(
        (config(quant_method=name), rf"quantised .* where quant_method is '{name}'{READ}")
        for name in ("gptq", "awq", "bitsandbytes", "mxfp4", "fbgemm_fp8", "modelopt")
    ),
    (config(bits=4), rf"where quant_method is 'None'{READ}"),
    (lambda f: edit_config(f, quantization_config="fp8"), f"where it is 'fp8', no table{READ}"),
    (lambda f: edit_config(f, compression_config=GPTQ), f"has a compression_config: .*{READ}"),
    (lambda f: edit_config(f, quantization={"bits": 4}), f"has a quantization: quantised .*{READ}"),
    (config(**INT4), f"where format is 'pack-quantized'{READ}"),
    (config(**(compressed("channel") | {"config_groups": {}})), "config_groups or .* not tables"),
    (config(**(compressed("channel") | {"config_groups": [1]})), "config_groups or .* not tables"),
    (
        config(**(compressed("channel") | {"sparsity_config": {"format": "sparse-24-bitmask"}})),
        "sparsity_config.format is 'sparse-24-bitmask'",
    ),
    (group(format="nvfp4-pack-quantized"), "where format is 'nvfp4-pack-quantized'"),
    (group(weights=None), "weights have num_bits None"),
    (config(**compressed("channel", num_bits=4)), "weights have num_bits 4"),
    (config(**compressed("channel", type="int")), "weights have type int"),
    (config(**compressed("channel", symmetric=False)), "weights have symmetric False"),
    (config(**compressed("channel", dynamic=True)), "weights have dynamic True"),
    (config(**compressed("block")), f"weights have strategy block{READ}"),
    (config(**(BLOCK | {"fmt": "e5m2"})), "fmt is 'e5m2'"),
    *(
        (config(**(BLOCK | {"weight_block_size": size})), "weight_block_size is .*, not .rows, col")
        for size in (None, 128, [128], [128, 0], [128, True], ["128", "128"])
    ),
    (lambda f: edit_config(f, dtype=None), "has dtype None beside its quantization_config"),
    (lambda f: edit_config(f, dtype="float64"), "has dtype float64 beside its quantization_config"),
    (
        lambda f: edit_config(f, quantization_config=None),
        r"is F8_E4M3, quantised, but .*config\.json has no quantization_config, which says how",
    ),
    (lambda f: change(f, scale=None), rf"'{UP}' is F8_E4M3, but there is no tensor '{UP}_scale_inv'"),
    (
        lambda f: change(f, codes=torch.zeros(128, 64).bfloat16()),
        rf"'{UP}_scale_inv' is a scale that no F8_E4M3 weight takes",
    ),
    (
        lambda f: change(f, **{"mlp.gone.weight_scale_inv": torch.ones(1, 1)}),
        r"gone\.weight_scale_inv' is a scale that no",
    ),
    (
        lambda f: change(f, **{"mlp.up_proj.input_scale": torch.ones(1)}),
        r"up_proj\.input_scale' is a scale that no",
    ),
    (
        lambda f: change(f, scale=torch.ones(2, 6)),
        rf"scale '{UP}_scale_inv' has shape \(2, 6\), a weight of \(128, 64\) takes \(6, 2\)",
    ),
    (lambda f: change(f, scale=torch.ones(6, 2).double()), r"_scale_inv' is F64, read are F32, BF16"),
    (
        lambda f: change(f, codes=torch.zeros(2, 128, 64).to(torch.float8_e4m3fn)),
        r"is F8_E4M3 of shape \(2, 128, 64\), only matrices",
    ),
    (
        lambda f: store(f, {n: t.bfloat16() for n, t in stored(f).items() if "_scale" not in n}),
        r"config\.json has a quantization_config, but no tensor of the files is F8_E4M3",
    ),
    (
        lambda f: change(f, **{"mlp.up_proj.weight_zero_point": torch.zeros(1)}),
        r"weight_zero_point', which a qwen3 .* does not use",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "said"), REFUSED)
def test_student_teacher_and_baselines_are_refused_alike_before_anything_is_written(
    folder: Path, plain: Path, tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    damage(folder)
    with pytest.raises(MtopdError, match=said) as refusal:
        check_student(StudentConfig(model=folder), deterministic=True)
    assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)
    with pytest.raises(MtopdError, match=said):
        add_teacher("t", folder, tmp_path / "stores" / "t", slices=1)
    assert not (tmp_path / "stores").exists()
    named = SimpleNamespace(evaluation=SimpleNamespace(baselines={"base": folder}))
    with pytest.raises(MtopdError, match=rf"evaluation\.baselines\.base: .*({said})"):
        check_baselines(named, load_tokenizer(plain))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_no_positive_number_is_refused_when_it_is_read(
    folder: Path, value: float
) -> None:
    scales = stored(folder)[f"{UP}_scale_inv"]
    scales[3, 1] = value
    change(folder, scale=scales)
    with pytest.raises(
        MtopdError,
        match=rf"model\.safetensors: scale '{UP}_scale_inv' has 1 of 12 values that are not positive "
        r"numbers, the first at \[3, 1\]",
    ):
        HFTensors(folder)[UP]


def test_a_code_that_is_no_number_is_refused_when_it_is_read(folder: Path) -> None:
    codes = stored(folder)[UP].view(torch.uint8)
    codes[5, 7] = 0x7F
    change(folder, codes=codes.view(torch.float8_e4m3fn))
    with pytest.raises(MtopdError, match=rf"'{UP}' has 1 of 8192 values that are NaN .* \[5, 7\]"):
        HFTensors(folder)[UP]


def test_a_folder_of_weights_alone_has_no_config(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    shutil.copy(folder / "model.safetensors", tmp_path / "bare")
    with pytest.raises(MtopdError, match=r"is F8_E4M3, quantised, but .*bare/config\.json has no"):
        HFTensors(tmp_path / "bare")
