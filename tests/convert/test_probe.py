"""The probe against transformers' own loading of the same checkpoint, what it refuses, and what it
costs.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mtopd.convert.probe import transformers_probe
from mtopd.hf_checkpoint import HFTensors
from mtopd.teacher_offload.probe import TOLERANCE, check_probe
from mtopd.tokenizer import load_tokenizer, vocab_size
from mtopd.types import MtopdError
from tests.conftest import REPOSITORY
from tests.small_models import MODEL_TYPES, save_model


def probe(folder: Path, **head: Any) -> dict[str, Any]:
    tensors = HFTensors(folder)
    return transformers_probe(folder, tensors, **head)


def reference(
    folder: Path, found: dict[str, Any], transform: Any = lambda z: z
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs [T, K] of the probe's targets and all [T, V], by from_pretrained in one piece."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    known = vocab_size(load_tokenizer(folder))
    with torch.no_grad():
        logits = model(torch.tensor([found["input_ids"]])).logits[0, :, :known]
    log_probs = torch.log_softmax(transform(logits), -1)
    return log_probs.gather(-1, torch.tensor(found["targets"])), log_probs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "qwen3"
    save_model(folder, seed=1, tied=False, layers=2)
    return folder


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_probe_is_what_from_pretrained_gives(model_type: str, tmp_path: Path) -> None:
    # Rows beyond the tokenizer, with large logits: they must not take part in the softmax.
    save_model(
        tmp_path, seed=5, model_type=model_type, tied=model_type == "qwen2", layers=3, vocab=140
    )
    found = probe(tmp_path)
    wanted, log_probs = reference(tmp_path, found)
    assert wanted.shape == (16, 4) and max(found["input_ids"]) < log_probs.shape[1] < 140
    assert found["by"] == "transformers"
    assert [row[0] for row in found["targets"]] == log_probs.argmax(-1).tolist()
    assert (torch.tensor(found["log_probs"]) - wanted).abs().max() < 2e-5
    assert np.ptp(found["log_probs"]) > 2, "flat log-probs would prove nothing"


def test_a_scaled_and_softcapped_head(folder: Path) -> None:
    found = probe(folder, scale=0.5, softcap=3.0)
    wanted, _ = reference(folder, found, lambda z: 3.0 * torch.tanh(0.5 * z / 3.0))
    assert (torch.tensor(found["log_probs"]) - wanted).abs().max() < 2e-5
    assert (torch.tensor(probe(folder)["log_probs"]) - wanted).abs().max() > 0.1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda w: {n: torch.zeros_like(t) for n, t in w.items()},
            "probability 1/.*weights are empty",
        ),
        (
            lambda w: {**w, "lm_head.weight": 0 * w["lm_head.weight"]},
            "probability 1/.*weights are empty",
        ),
        (
            lambda w: {**w, "model.norm.weight": w["model.norm.weight"] * math.nan},
            "NaN or infinite",
        ),
        (
            lambda w: {**w, "model.norm.weight": w["model.norm.weight"][:-1]},
            "'model.norm.weight' has shape",
        ),
        (
            lambda w: {n: t for n, t in w.items() if n != "model.norm.weight"},
            "no tensor 'model.norm.weight'",
        ),
    ],
    ids=["zeros", "zero head", "nan", "shape", "missing"],
)
def test_a_damaged_checkpoint_gives_no_probe(
    folder: Path, tmp_path: Path, damage: Any, message: str
) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file(damage(load_file(folder / "model.safetensors")), tmp_path / "model.safetensors")
    with pytest.raises(MtopdError, match=message):
        probe(tmp_path)


MEMORY = """
import sys
from pathlib import Path
from mtopd.convert.probe import transformers_probe
from mtopd.hf_checkpoint import HFTensors

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

class Watched(HFTensors):
    peak = 0
    def __getitem__(self, name):
        self.peak = max(self.peak, anonymous())
        return super().__getitem__(name)

transformers_probe(Path(sys.argv[2]), HFTensors(Path(sys.argv[2])))  # imports and pools of a first, small model
before = anonymous()
tensors = Watched(Path(sys.argv[1]))
transformers_probe(Path(sys.argv[1]), tensors)
print(tensors.peak - before)
"""


def test_what_transformers_cannot_run_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("selected index k\nout of range")

    monkeypatch.setattr("mtopd.convert.probe._streamed_model", lambda *_: fail)
    with pytest.raises(MtopdError, match=r"cannot run .* \(RuntimeError: selected index k out of"):
        probe(folder)


def test_one_layer_is_in_memory_at_a_time(folder: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path, seed=1, hidden=1024, layers=8)
    layer_bytes = 4 * sum(p.numel() for p in model.model.layers[0].parameters())
    del model
    command = [sys.executable, "-c", MEMORY, str(tmp_path), str(folder)]
    # Fixed, so that every matrix is a mapping of its own and what is freed leaves the process;
    # otherwise glibc learns to keep freed blocks of up to 32 MiB in its heap.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=REPOSITORY, env=environment
    )
    assert result.returncode == 0, result.stderr[-2000:]
    growth = int(result.stdout)
    print(f"growth {growth / layer_bytes:.2f} layers of {layer_bytes} bytes")
    assert growth < 2.5 * layer_bytes


def test_the_right_teacher_passes_and_others_are_named_for_what_they_are(
    folder: Path, tmp_path: Path
) -> None:
    found = probe(folder)
    log_probs = np.array(found["log_probs"])
    vocab = vocab_size(load_tokenizer(folder))

    def check(values: np.ndarray, dtype: str = "float32") -> float:
        return check_probe(found, values, name="math", vocab_size=vocab, dtype=dtype)

    assert check(log_probs) == 0
    assert check(log_probs + 5e-4) == pytest.approx(5e-4)
    save_model(tmp_path, seed=2, tied=False, layers=2)
    other, _ = reference(tmp_path, found)
    for dtype in TOLERANCE:
        with pytest.raises(MtopdError, match="'math' is not the one that was added"):
            check(other.numpy(), dtype)
        with pytest.raises(MtopdError, match="weights were not loaded: every log-prob is -ln V"):
            check(np.full_like(log_probs, -math.log(vocab)), dtype)
        with pytest.raises(MtopdError, match="by nan nats"):
            check(np.where(log_probs == log_probs.max(), np.nan, log_probs), dtype)
    with pytest.raises(MtopdError, match="log-probs came out of a probe"):
        check(log_probs[:, :2])


def test_check_probe_needs_no_transformers() -> None:
    code = "import sys, mtopd.teacher_offload.probe; sys.exit('transformers' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, cwd=REPOSITORY).returncode == 0
