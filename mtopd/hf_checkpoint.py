"""HF checkpoint folders: config and tensors, read one at a time.

No code from a folder is ever run: only config.json, tokenizer files and safetensors are read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from mtopd.config_json import check_values
from mtopd.dtypes import dtype_name, torch_dtype
from mtopd.families import FAMILIES, ModelFacts, model_facts
from mtopd.files import LFS_POINTER
from mtopd.hf_fp8 import CODES, READ, Entries, Fp8, check_scales, fp8_of, take_scales
from mtopd.safetensors_file import TensorEntry, read_header
from mtopd.types import MtopdError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_READ = ("F32", "BF16", "F16")
_SAVE_AGAIN = (
    "is not read under that name, nor are other formats (they can run code): save the model again "
    "with transformers' save_pretrained"
)


# -- config ----------------------------------------------------------------------------------------


def load_hf_config(folder: Path) -> PretrainedConfig:
    """The HF config of a checkpoint folder; never runs code from it.

    As in transformers an output layer of its own counts, also where the config says tied: then
    ``tie_word_embeddings`` of what is returned is False; nor does it tell of FP8 weights: whoever
    reads them gets numbers.  Raises MtopdError when the folder has no readable config.json, its
    architecture is not supported, or it says that weights are quantised in a way that is not read.
    """
    from transformers import AutoConfig

    path = folder / "config.json"
    if not folder.is_dir():
        raise MtopdError(
            f"there is no folder {folder}; a model is the folder of an HF checkpoint (a hub's name "
            "is not looked up: download it first)"
        )
    _refuse_adapter(folder)
    found = _other_formats(folder) if not path.exists() else ""
    missing = f"{folder} is not an HF checkpoint: it has no config.json; " + (
        f"found {found}, which {_SAVE_AGAIN}"
        if found
        else "give the folder that save_pretrained wrote"
    )
    values = _read_object(path, missing)
    for name in ("transformers_weights", "configuration_files"):
        if values.get(name) not in (None, _SINGLE):
            raise MtopdError(
                f"{path} has {name} {str(values[name])[:80]!r}: other files count than config.json "
                f"and {_SINGLE}, which is not followed; give those files these names, and remove "
                f"{name}"
            )
    _check_model_type(str(path), values.get("model_type"))
    check_values(path, values)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        _check_rope(config)
        model_facts(config).check_numbers()
        _check_epsilon(config.rms_norm_eps)
        _check_windows(config)
    except Exception as error:  # of the library's checks, each of its own kind
        raise MtopdError(f"{path} is not a config of {values['model_type']}: {error}") from None
    vars(config).pop("quantization_config", None)
    if config.tie_word_embeddings and _has_own_head(folder):
        config.tie_word_embeddings = False
    return config


def _refuse_adapter(folder: Path) -> None:
    """transformers puts an adapter on top of a model in the same folder, too."""
    if (folder / "adapter_config.json").is_file():
        raise MtopdError(
            f"{folder} holds an adapter (adapter_config.json); merge it into its base model with "
            "PEFT's merge_and_unload and save the whole model in a folder of its own"
        )


def _other_formats(folder: Path) -> str:
    """Names of weight files in the folder, five at most; none of them counts by itself."""
    patterns = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
    return ", ".join(
        sorted(p.name for form in patterns for p in folder.glob(form) if p.is_file())[:5]
    )


def _check_epsilon(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"rms_norm_eps is {value!r}; it must be a number from 0 to 1")


def _check_rope(config: PretrainedConfig) -> None:
    kinds = [name for name, value in config.rope_parameters.items() if isinstance(value, dict)]
    if kinds:
        raise ValueError(
            f"rope_parameters differ by kind of layer ({', '.join(kinds)}); only one rope for all layers "
            "is supported"
        )


def _check_windows(config: PretrainedConfig) -> None:
    """transformers builds such a model, and fails at its first token."""
    kinds = getattr(config, "layer_types", None) or []
    if "sliding_attention" in kinds and getattr(config, "sliding_window", None) is None:
        raise ValueError(
            "layer_types has sliding_attention, but there is no window (use_sliding_window and "
            "sliding_window)"
        )


def _read_object(path: Path, missing: str) -> dict[str, Any]:
    """A JSON file that must hold an object."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise MtopdError(missing) from None
    except OSError as error:
        raise MtopdError(f"cannot read {path}: {error.strerror}") from None
    if data.startswith(LFS_POINTER):
        raise MtopdError(f"{path} is a git-lfs pointer, not the file: run `git lfs pull` there")
    try:
        found = json.loads(data.decode())  # as transformers reads it: UTF-8, no byte order mark
    except (ValueError, RecursionError) as error:
        raise MtopdError(
            f"{path} is not valid JSON ({error or 'nested too deep'}); copy it again, as plain UTF-8"
        ) from None
    if not isinstance(found, dict):
        raise MtopdError(f"{path} holds {type(found).__name__}, needed is an object; copy it again")
    return found


def hf_config_from_dict(values: Mapping[str, Any]) -> PretrainedConfig:
    """The HF config object of an architecture that a teacher store describes."""
    from transformers import AutoConfig

    values = dict(values)
    model_type = values.pop("model_type", None)
    _check_model_type("architecture", model_type)
    return AutoConfig.for_model(model_type, **values)


def _check_model_type(where: str, model_type: object) -> None:
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise MtopdError(
            f"{where} has model_type {model_type!r}; supported are {', '.join(FAMILIES)}"
        )


# -- tensors ---------------------------------------------------------------------------------------
class Tensors(Protocol):
    """Tensors of a checkpoint by name, one at a time."""

    def __getitem__(self, name: str) -> torch.Tensor: ...


def weight_files(folder: Path) -> list[Path]:
    """The files whose tensors count, by transformers' rule: ``model.safetensors``, or those that the
    index names; whatever else lies in the folder does not.  Raises MtopdError for a file that is
    not there.
    """
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if (folder / _INDEX).is_file():
        return [folder / name for name in sorted(set(_read_index(folder).values()))]
    _refuse_adapter(folder)
    for name in (_SINGLE, _INDEX):
        if (folder / name).is_symlink():
            raise MtopdError(
                f"{folder / name} is a link to a file that is not there; the download is not "
                "complete: fetch it again"
            )
    found = _other_formats(folder)
    raise MtopdError(
        f"{folder} has neither {_SINGLE} nor {_INDEX}"
        + (f"; found {found}, which {_SAVE_AGAIN}" if found else "; copy or export it again")
    )


def _read_index(folder: Path) -> dict[str, str]:
    """File by tensor.  Raises MtopdError when the index is malformed or a file is missing."""
    path = folder / _INDEX
    files = _read_object(path, f"{path} does not exist").get("weight_map")
    if not isinstance(files, dict) or not files:
        raise MtopdError(f"{path} has no weight_map from tensors to files; copy it again")
    for tensor, name in files.items():
        if (
            not isinstance(name, str)
            or Path(name).name != name
            or not name.endswith(".safetensors")
        ):
            raise MtopdError(
                f"{path} says that tensor {tensor!r} is in {name!r}; needed is the name of a "
                "safetensors file in the same folder"
            )
    for name in sorted(set(files.values())):
        if not (folder / name).is_file():
            raise MtopdError(
                f"{folder} has no {name}, which {_INDEX} names; the download is not complete: "
                "fetch it again"
            )
    return files


class HFTensors(Mapping[str, torch.Tensor]):
    """Tensors of an HF folder by name, one at a time, each read anew.  Every file's header is
    checked at the start.

    float16 comes as float32, which is exact; FP8 as the numbers that its scales make of it, in the
    dtype that config.json names, and the scales are no tensors of their own; every other tensor in
    its own dtype.  They are read, not mapped: pages of a mapped file count as this process's memory
    for as long as it is open.  Raises MtopdError when the folder's files do not hold what its index
    says, for scales that do not fit, and for weights that are quantised otherwise.
    """

    def __init__(self, folder: Path) -> None:
        self._entries = Entries()
        for path in weight_files(folder):
            for entry in _read_header(path):
                if entry.name in self._entries:
                    raise MtopdError(
                        f"tensor {entry.name!r} is in {self._entries[entry.name][0]} and in {path}; "
                        "one of them is of another checkpoint"
                    )
                self._entries[entry.name] = path, entry
        if not (folder / _SINGLE).is_file():
            for name, file in _read_index(folder).items():
                if name not in self._entries or self._entries[name][0].name != file:
                    raise MtopdError(
                        f"{folder / file} has no tensor {name!r}, which {_INDEX} says it has; one of "
                        "them is of another checkpoint"
                    )
        self._folder = folder
        self._fp8 = _read_fp8(folder)
        self._scales, self._input_scales = Entries(), Entries()
        if self._fp8 is not None:
            self._scales, self._input_scales = take_scales(self._fp8, folder, self._entries)
        for name, (path, entry) in self._entries.items():
            if entry.dtype == CODES and name not in self._scales:
                raise MtopdError(
                    f"{path}: tensor {name!r} is {CODES}, quantised, but {folder / 'config.json'} has no "
                    f"quantization_config, which says how; fetch it again (read are {READ}), or convert "
                    "the checkpoint to bfloat16 or float32 first"
                )
            if entry.dtype not in (*_READ, CODES):
                raise MtopdError(
                    f"{path}: tensor {name!r} is {entry.dtype}, quantised or of a kind that is not "
                    f"read ({', '.join(_READ)} are); convert the checkpoint to bfloat16 or float32 "
                    "first"
                )

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._entries:
            raise MtopdError(
                f"{self._folder} has no tensor {name!r}, which its config.json calls for"
            )
        path, entry = self._entries[name]
        tensor = _read_tensor(path, entry)
        if self._fp8 is not None and name in self._scales:
            tensor = self._fp8.weight(tensor, self._scales_of(name))
        _check_finite(tensor, name, path)
        return tensor.float() if tensor.dtype == torch.float16 else tensor

    def _scales_of(self, name: str) -> torch.Tensor:
        path, entry = self._scales[name]
        scales = _read_tensor(path, entry)
        check_scales(scales, entry.name, path)
        return scales

    def dtype(self, name: str) -> torch.dtype:
        """What ``self[name]`` has."""
        if self._fp8 is not None and name in self._scales:
            return self._fp8.dtype
        found = torch_dtype(self._entries[name][1].dtype)
        return torch.float32 if found == torch.float16 else found

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name][1].shape

    def file(self, name: str) -> Path:
        return self._entries[name][0]

    def notes(self) -> Iterator[str]:
        """What whoever gives this folder should know of its quantised weights."""
        if self._fp8 is not None:
            yield (
                f"{len(self._scales)} FP8 weights are read with their scales, as "
                f"{dtype_name(self._fp8.dtype)}"
            )
        if self._input_scales:
            yield (
                f"{len(self._input_scales)} scales of activations (input_scale) are not read: the "
                "weights do not depend on them"
            )

    def files(self) -> list[Path]:
        """Those that are read."""
        return sorted({path for path, _ in self._stored()})

    def identity(self) -> list[Any]:
        """What tells this checkpoint from another: every file's tensors, size and time of change, and
        how codes become numbers.
        """
        files: dict[Path, list[TensorEntry]] = {}
        for path, entry in self._stored():
            files.setdefault(path, []).append(entry)
        found: list[Any] = [] if self._fp8 is None else [str(self._fp8)]
        found += [
            [
                path.name,
                path.stat().st_size,
                path.stat().st_mtime_ns,
                [[e.name, e.dtype, e.shape, e.start] for e in es],
            ]
            for path, es in sorted(files.items())
        ]
        return found

    def _stored(self) -> Iterator[tuple[Path, TensorEntry]]:
        for entries in (self._entries, self._scales, self._input_scales):
            yield from entries.values()


def _read_fp8(folder: Path) -> Fp8 | None:
    """A folder of weights alone, without config.json, has none."""
    path = folder / "config.json"
    return fp8_of(path, _read_object(path, str(path))) if path.exists() else None


def _read_tensor(path: Path, entry: TensorEntry) -> torch.Tensor:
    tensor = torch.empty(entry.shape, dtype=torch_dtype(entry.dtype))
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(entry.start)
            _read_whole(file, tensor.reshape(-1).view(torch.uint8).numpy().data)
    except OSError as error:
        raise MtopdError(
            f"cannot read {path}: {error.strerror or 'it ends early'}; copy it again"
        ) from None
    return tensor


def _check_finite(tensor: torch.Tensor, name: str, path: Path) -> None:
    """Raises MtopdError for NaN and infinity.  The least and the largest value show both, in a
    sixth of the time of reading.
    """
    if not tensor.numel() or all(math.isfinite(end.item()) for end in tensor.aminmax()):
        return
    wrong = (~tensor.isfinite()).nonzero()
    raise MtopdError(
        f"{path}: tensor {name!r} has {len(wrong)} of {tensor.numel()} values that are NaN or "
        f"infinite, the first at {wrong[0].tolist()}; the file is damaged, or the model diverged, "
        "or was too large for float16: export it again"
    )


def _read_header(path: Path) -> list[TensorEntry]:
    try:
        with open(path, "rb") as file:
            is_pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError as error:
        raise MtopdError(f"cannot read {path}: {error.strerror}") from None
    if is_pointer:
        raise MtopdError(f"{path} is a git-lfs pointer, not the file: run `git lfs pull` there")
    return read_header(path)


def _has_own_head(folder: Path) -> bool:
    """Whether the files hold an output layer that is not the embedding's copy."""
    tensors = HFTensors(folder)
    if _HEAD not in tensors or _EMBEDDING not in tensors:
        return False
    head, embedding = tensors[_HEAD], tensors[_EMBEDDING]
    return head.shape != embedding.shape or not torch.equal(head, embedding)


def check_checkpoint(folder: Path, say: Callable[[str], None] = lambda text: None) -> ModelFacts:
    """The facts of a checkpoint, after its files' headers were compared with what its config calls
    for: every tensor is there, in the right shape, and none is left over.

    What may be left over: an output layer that repeats the tied embedding, buffers that
    transformers computes (``inv_freq``), and layers behind the last.  An index and layers that do
    not count are said: whoever left them there may think that they do.  Raises MtopdError that
    names the tensor and its file.
    """
    hf_config, tensors = load_hf_config(folder), HFTensors(folder)
    facts = model_facts(hf_config)
    shapes = _expected_shapes(folder, hf_config, facts, tensors)
    for name, shape in shapes.items():
        if name not in tensors:
            raise MtopdError(
                f"{folder} has no tensor {name!r}, which its config.json calls for; the checkpoint "
                "is not complete, or config.json is of another"
                + (", or lacks tie_word_embeddings=true" if name == _HEAD else "")
            )
        if tensors.shape(name) != shape:
            raise MtopdError(
                f"{tensors.file(name)}: tensor {name!r} has shape {tensors.shape(name)}, "
                f"{folder / 'config.json'} calls for {shape}"
            )
    for name in tensors:
        computed = name.endswith(("rotary_emb.inv_freq", ".masked_bias", ".attn.bias"))
        tied = name == _HEAD and facts.has_tied_embeddings
        if name not in shapes and not (computed or tied or facts.is_behind_last(name)):
            raise MtopdError(
                f"{tensors.file(name)} holds tensor {name!r}, which a {hf_config.model_type} of "
                "this config.json does not use; a scale or part that is ignored would make another "
                "model: export the checkpoint again"
            )
    for note in tensors.notes():
        say(f"{folder}: {note}")
    if (folder / _SINGLE).is_file() and (folder / _INDEX).is_file():
        say(f"{folder}: {_SINGLE} counts, {_INDEX} and files that only it names are not read")
    behind = (n for n in tensors if facts.is_behind_last(n) and not facts.is_further_head(n))
    layers = {int(match[1]) for match in map(_LAYER.match, behind) if match is not None}
    if layers:
        say(
            f"{folder}: config.json has {facts.num_layers} layers; {len(layers)} more in the files, "
            f"up to layer {max(layers)}, are not read"
        )
    return facts


def _expected_shapes(
    folder: Path, hf_config: PretrainedConfig, facts: ModelFacts, tensors: HFTensors
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that transformers' model of this config has."""
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    # Before a model of a wrong number of layers is made: each costs time, if no memory.
    found = {int(m[1]) for m in map(_LAYER.match, tensors) if m is not None}
    if missing := sorted(set(range(facts.num_layers)) - found)[:1]:
        others = sorted(name for name in tensors if "layers.0." in name)
        raise MtopdError(
            f"{folder} has no tensor of layer {missing[0]}; its config.json calls for "
            f"{facts.num_layers} layers, its files hold {len(found)}"
            + (
                f" by their names in a checkpoint (model.layers.0. ...); found {others[0]!r}: save the "
                "causal model itself with save_pretrained"
                if others and not found
                else "; copy or export it again"
            )
        )
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    except Exception as error:  # of sizes that do not go together
        raise MtopdError(
            f"{folder / 'config.json'}: transformers cannot build this model: {error}"
        ) from None
    # All at once: one by one, 45,000 tensors of DeepSeek-V3 take eight times as long.
    stored = revert_weight_conversion(model, model.state_dict())
    tied = {_HEAD} if facts.has_tied_embeddings else set()
    return {name: tuple(tensor.shape) for name, tensor in stored.items() if name not in tied}


_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def _read_whole(file: FileIO, out: memoryview) -> None:
    done = 0
    while done < len(out):
        got = file.readinto(out[done:])
        if not got:
            raise OSError("it ends early")
        done += got


def stored_names(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> list[str]:
    """The checkpoint's tensors that make up the model's ``name``.

    transformers stores the experts of a layer as one tensor, gate over up; its own map says which
    of the checkpoint's tensors those are, matrix by matrix and within it expert by expert.
    """
    from transformers.core_model_loading import revert_weight_conversion

    return list(revert_weight_conversion(model, {name: torch.empty_like(tensor, device="meta")}))


def fill(tensor: torch.Tensor, names: Sequence[str], tensors: Tensors) -> None:
    """Copy the checkpoint's tensors (``stored_names``) into the model's.  Raises MtopdError when a
    shape differs.
    """
    for stored, piece in stored_pieces(tensor, names).items():
        found = tensors[stored]
        if found.shape != piece.shape:
            raise MtopdError(
                f"tensor {stored!r} has shape {tuple(found.shape)}, the config calls for "
                f"{tuple(piece.shape)}"
            )
        piece.copy_(found)


def stored_pieces(tensor: torch.Tensor, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """The parts of a model's tensor that a checkpoint stores under ``names``, as views: itself, or a
    layer's experts.
    """
    pieces = [tensor]
    if len(names) > 1:
        matrices = tensor.chunk(len(names) // tensor.shape[0], dim=1)
        pieces = [piece for matrix in matrices for piece in matrix.unbind()]
    return dict(zip(names, pieces, strict=True))
