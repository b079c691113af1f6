"""The trainer's state on disk: one safetensors file per (tp, pp) rank, nothing that could execute.

A checkpoint folder is written under a temporary name and published whole by rank 0, with its seal (sha256 of every
file) already inside.  It belongs to one layout: resuming needs the tp and pp it was written with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from mtopd.megatron.train_step import Trainer
from mtopd.run_dir import RunDir, is_sealed, publish_tree, read_seal, remove_tree
from mtopd.safetensors_file import read_header
from mtopd.types import MtopdError


def save(trainer: Trainer, run: RunDir, iteration: int, state: Mapping[str, Any]) -> None:
    """Publish ``checkpoints/<iteration>``.  ``state`` is plain data that ``load`` gives back.  Collective."""
    ranks, target = trainer.ranks, run.checkpoint(iteration)
    partial = target.with_name(f".{target.name}.tmp")
    if ranks.rank == 0:
        remove_tree(partial)
        partial.mkdir(parents=True)
    dist.barrier()
    digest = None
    if ranks.dp_rank == 0:
        path = partial / _file_name(trainer)
        save_file({k: v.detach().cpu().contiguous() for k, v in _tensors(trainer).items()}, path)
        with open(path, "rb") as file:
            digest = (path.name, hashlib.file_digest(file, "sha256").hexdigest())
    digests: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(digests, digest)
    if ranks.rank == 0:
        files = dict(sorted(d for d in digests if d is not None))
        layout = {"tp": ranks.tp_size, "pp": ranks.pp_size}
        run.seal(partial, {"layout": layout, "files": files, "state": dict(state), "train_steps": trainer.steps_done})
        remove_tree(target)
        publish_tree(partial, target)
    dist.barrier()


def load(trainer: Trainer, run: RunDir, iteration: int) -> dict[str, Any]:
    """Restore the trainer and return ``state``.  Raises MtopdError when the files do not match the seal or layout."""
    folder, ranks = run.checkpoint(iteration), trainer.ranks
    seal = read_seal(folder)
    if seal["layout"] != (layout := {"tp": ranks.tp_size, "pp": ranks.pp_size}):
        raise MtopdError(f"{folder} was written with {seal['layout']}, this run has {layout}; resume with that layout")
    path = folder / _file_name(trainer)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != seal["files"][path.name]:
        raise MtopdError(f"{path} does not match its seal; remove {folder} to resume from an earlier checkpoint")
    read_header(path)
    stored = load_file(path)
    trainer.create_optimizer_state()
    with torch.no_grad():
        for name, tensor in _tensors(trainer).items():
            tensor.copy_(stored[name])
    trainer.resume_schedule(int(seal["train_steps"]))
    state: dict[str, Any] = seal["state"]
    return state


def newest(run: RunDir) -> int | None:
    """Iteration of the newest sealed checkpoint."""
    return max(sealed(run), default=None)


def sealed(run: RunDir) -> list[int]:
    folder = run.path / "checkpoints"
    return sorted(int(p.name) for p in folder.glob("[0-9]*") if is_sealed(p)) if folder.is_dir() else []


def _file_name(trainer: Trainer) -> str:
    return f"tp{trainer.ranks.tp_rank:03d}_pp{trainer.ranks.pp_rank:03d}.safetensors"


def _tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Live tensors of this rank's state by a name that does not depend on the order of parameters."""
    tensors: dict[str, torch.Tensor] = {}
    (chunk,) = trainer.chunks
    for name, parameter in chunk.named_parameters():
        tensors[f"model/{name}"] = parameter.data
        master = getattr(parameter, "main_param", None)
        if master is not None:
            tensors[f"master/{name}"] = master.data
        state = trainer.adam_state(parameter if master is None else master)
        for key in ("exp_avg", "exp_avg_sq", "step"):
            if key in state:
                tensors[f"{key}/{name}"] = state[key]
    return tensors
