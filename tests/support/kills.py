"""What the drivers that kill whole runs have in common."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from mtopd.run_dir import RunDir


def check_same_weights(run: RunDir, undisturbed: RunDir, num_iterations: int) -> None:
    """The finished run ends with the undisturbed one's student, bit for bit, and leaves no temporary
    file.
    """
    name = "model.safetensors"
    found, wanted = (load_file(r.export(num_iterations) / name) for r in (run, undisturbed))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), f"{name} differs from the undisturbed run"
    assert not list(run.path.rglob("*.tmp")) and not list(run.path.rglob("*.removed"))


def main(about: str, run: Callable[[int, Path, int], str], kills: int) -> None:
    """The command line of a driver: ``run(kills, folder, seed)`` gives one line of results."""
    parser = argparse.ArgumentParser(description=about.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=kills)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mtopd-kill-") as name:
        print(run(arguments.kills, Path(name), arguments.seed))
