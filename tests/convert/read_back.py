"""Exports of every supported architecture, read back by transformers 5 and by transformers 4.51.

    python -m tests.convert.read_back

transformers 4.51 lives in a virtual environment of its own in the user's cache folder, made at
first use.  Logits of what was exported must equal those of the model in memory to 1e-5.  Part of
``make soak``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.conftest import REPOSITORY
from tests.small_models import MODEL_TYPES, save_model, write_checkpoint

OLD = "transformers==4.51.3"
LIMIT = 1e-5
# Runs under either version: logits of a folder on given ids, as float32.
READER = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, __version__
ids = load_file(sys.argv[2])["ids"]
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="eager").eval()
assert model.dtype == torch.float32, model.dtype
with torch.no_grad():
    save_file({"logits": model(ids).logits.float().contiguous()}, sys.argv[3])
"""


def old_python() -> Path | None:
    """An interpreter with transformers 4.51; None where no package index answers."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "mtopd" / "transformers-4.51"
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if not ready.exists():
        venv.create(folder, with_pip=True, clear=True)
        pins = (REPOSITORY / "constraints.txt").read_text().splitlines()
        torch_pin = next(line for line in pins if line.startswith("torch=="))
        command = [str(python), "-m", "pip", "install", "--quiet", torch_pin, OLD]
        if subprocess.run(command, timeout=1800).returncode:
            return None
        ready.touch()
    return python


def read(python: Path, folder: Path, ids: Path, out: Path) -> torch.Tensor:
    done = subprocess.run(
        [str(python), "-c", READER, str(folder), str(ids), str(out)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "TRANSFORMERS_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out)["logits"]


def main() -> int:
    readers = {"transformers 5": Path(sys.executable)}
    old = old_python()
    if old is None:
        print(f"skipped: {OLD} is not in the cache folder, and no package index answers")
    else:
        readers["transformers 4.51"] = old
    worst = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        generator = torch.Generator().manual_seed(0)
        save_file({"ids": torch.randint(3, 99, (2, 48), generator=generator)}, root / "ids")
        for kind in MODEL_TYPES:
            model = save_model(root / kind, seed=1, model_type=kind, tied=kind == "llama").eval()
            model.config._attn_implementation = "eager"
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    # transformers 4.51 takes an expert of a group that was left out, at 0, before
                    # one whose score and bias are below 0: compare where none is.
                    if name.endswith("e_score_correction_bias"):
                        buffer.abs_()
            model.save_pretrained(root / kind)
            tensors = load_file(root / kind / "model.safetensors")
            out = root / f"{kind}-out"
            # In files of 100 kB: what transformers reads by the index.
            write_checkpoint(
                out, tensors, root / kind, {}, dtype=torch.float32, shard_bytes=100_000
            )
            with torch.no_grad():
                wanted = model(load_file(root / "ids")["ids"]).logits.float()
            for version, python in readers.items():
                found = read(python, out, root / "ids", root / "logits")
                error = float((found - wanted).abs().max() / wanted.abs().max())
                worst = max(worst, error)
                print(f"{kind:<12} {version:<18} {error:.1e} of {float(wanted.abs().max()):.2f}")
    print(f"worst {worst:.1e}, limit {LIMIT:.0e}")
    return 0 if worst <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
