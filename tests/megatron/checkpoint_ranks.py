"""Worker of test_checkpoint: trains small students, saves after three steps, goes on; or resumes
and goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from mtopd.config import OptimizerConfig, ParallelConfig
from mtopd.convert.bridge import Bridge
from mtopd.convert.weight_stream import WeightStream
from mtopd.files import write_json
from mtopd.hf_checkpoint import load_hf_config
from mtopd.megatron import checkpoint, parallel
from mtopd.megatron.micro_batch import PackedMicroBatch, vocab_parallel_cross_entropy
from mtopd.megatron.model import build_chunks
from mtopd.megatron.options import config_overrides, sort_fields
from mtopd.megatron.packing import loss_rows_of_rank, pack_rows
from mtopd.megatron.trainer import Trainer
from mtopd.objectives import CrossEntropy
from mtopd.progress import quiet_libraries
from mtopd.run_dir import RunDir
from mtopd.types import MtopdError
from tests.small_models import whole

VOCAB, PADDED, BATCH = 100, 128, 8
NUM_STEPS = 10
OPTIMIZER = OptimizerConfig(
    lr=1e-3,
    min_lr=1e-4,
    warmup_steps=2,
    decay="cosine",
    weight_decay=0.01,
    adam_beta1=0.9,
    adam_beta2=0.98,
    clip_grad=1.0,
)


def build(root: Path, job: dict[str, Any]) -> tuple[Trainer, Bridge]:
    layout = ParallelConfig(**job["parallel"])
    own = parallel.initialize(layout, seed=0)
    hf_config, dtype = (
        load_hf_config(root / job["kind"]),
        getattr(torch, job.get("dtype", "float32")),
    )
    fields = sort_fields({"adam_eps": 1e-5, **job.get("megatron", {})})
    overrides = config_overrides(own.device, fields.transformer, interleaved=layout.vpp > 1)
    bridge = Bridge(hf_config, dtype=dtype, padded_vocab_size=PADDED, overrides=overrides)
    chunks = build_chunks(
        bridge.transformer_config,
        bridge.facts,
        own,
        padded_vocab=PADDED,
    )
    bridge.load(chunks, root / job["kind"])
    optimizer = OPTIMIZER.model_copy(update=job.get("optimizer", {}))
    num_steps = job.get("num_steps", NUM_STEPS)
    return Trainer(chunks, own, optimizer, num_steps, dtype, fields), bridge


def micro_batches(trainer: Trainer, step: int) -> list[PackedMicroBatch]:
    """The same eight samples of a step at every layout, two a micro-batch."""
    rng, own = np.random.default_rng(step), trainer.ranks
    samples = []
    for _ in range(BATCH):
        ids = rng.integers(3, VOCAB, 16)
        samples.append(
            SimpleNamespace(
                prompt_ids=ids[:4], response_ids=ids[4:], loss_mask=np.ones(12, np.uint8)
            )
        )
    mine = samples[own.dp_rank :: own.dp_size]
    batches = []
    for start in range(0, len(mine), 2):
        part = mine[start : start + 2]
        labels = [
            int(token)
            for sample in part
            for rows in loss_rows_of_rank(sample, 16, own)
            for token in sample.response_ids[rows.start : rows.stop]
        ]
        weights = [1 / (12 * BATCH)] * len(part)
        payload = torch.tensor(labels, dtype=torch.long)
        batches.append(
            pack_rows(part, weights, shape=(2, 16), packed=False, ranks=own, payload=payload)
        )
    return batches


def train(trainer: Trainer, steps: range, rates: list[float] | None = None) -> list[float]:
    losses = []
    for step in steps:
        objective = cross_entropy(trainer)
        trainer.forward_backward(micro_batches(trainer, step), objective)
        sums = trainer.reduce(objective.finish)
        _, lr = trainer.optimizer_step(sums)
        losses.append(objective.loss(sums))
        if rates is not None:
            rates.append(lr)
    return losses


def cross_entropy(trainer: Trainer) -> CrossEntropy:
    return CrossEntropy(
        vocab_size=VOCAB,
        tp_rank=trainer.ranks.tp_rank,
        cross_entropy=vocab_parallel_cross_entropy,
    )


def state(trainer: Trainer, bridge: Bridge) -> str:
    """A digest of all weights."""
    trainer.finish_param_sync()
    tensors = whole(WeightStream(bridge, trainer.chunks, trainer.ranks).buckets(1 << 20))
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_damages(trainer: Trainer, run: RunDir, iteration: int) -> tuple[int, int]:
    """(damages, refused): a changed byte in every file, one missing, one too many, a link."""
    folder = run.checkpoint(iteration)
    names = sorted(path.name for path in folder.iterdir() if path.name != "SEALED")
    tried = refused = 0

    def attempt(name: str) -> None:
        nonlocal tried, refused
        tried += 1
        dist.barrier()
        try:
            checkpoint.load(trainer, run, iteration)
        except MtopdError as error:
            refused += name in str(error) and "seal" in str(error)
        dist.barrier()

    first = trainer.ranks.rank == 0
    for name in names:
        whole = (folder / name).read_bytes()
        dist.barrier()
        if first:
            (folder / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        attempt(name)
        if first:
            (folder / name).write_bytes(whole)
    whole = (folder / names[0]).read_bytes()
    for change in ("missing", "link", "extra"):
        dist.barrier()
        path = folder / ("extra.pt" if change == "extra" else names[0])
        if first:
            path.unlink(missing_ok=True)
            if change == "extra":
                path.write_bytes(b"x")
            elif change == "link":
                (folder.parent / "elsewhere").write_bytes(whole)
                path.symlink_to(folder.parent / "elsewhere")
        attempt(path.name)
        if first:
            path.unlink(missing_ok=True)
            if change != "extra":
                path.write_bytes(whole)
    dist.barrier()
    return tried, refused


def check_forgeries(trainer: Trainer, run: RunDir, iteration: int) -> list[str]:
    """What is said to an index that was exchanged together with its seal; nothing of it may run."""
    folder = run.checkpoint(iteration)
    index, seal = folder / ".metadata", folder / "SEALED"
    whole, sealed = index.read_bytes(), seal.read_bytes()
    executed = folder.parent / "executed"

    class Executes:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(executed),)

    def foreign() -> Any:
        return Executes()

    def no_tensor() -> Any:
        entries = pickle.loads(whole)
        entries.state_dict_metadata[next(iter(entries.state_dict_metadata))] = (
            BytesStorageMetadata()
        )
        return entries

    def elsewhere() -> Any:
        entries = pickle.loads(whole)
        next(iter(entries.storage_data.values())).relative_path = "../elsewhere"
        return entries

    said = []
    for forge in (foreign, no_tensor, elsewhere):
        dist.barrier()
        if trainer.ranks.rank == 0:
            index.write_bytes(pickle.dumps(forge()))
            digest = hashlib.sha256(index.read_bytes()).hexdigest()
            contents = json.loads(sealed)
            contents["files"][index.name] = digest
            seal.write_text(json.dumps(contents))
        dist.barrier()
        try:
            checkpoint.load(trainer, run, iteration)
            said.append("")
        except MtopdError as error:
            said.append(str(error))
        dist.barrier()
    if trainer.ranks.rank == 0:
        index.write_bytes(whole)
        seal.write_bytes(sealed)
        assert not executed.exists()
    dist.barrier()
    return said


@contextlib.contextmanager
def slow_writer() -> Iterator[threading.Event]:
    """The writer's thread waits for the event before it writes."""
    write, released = filesystem_async.FileSystemWriterAsync.write_preloaded_data, threading.Event()

    def later(*arguments: Any, **options: Any) -> None:
        assert released.wait(120)
        write(*arguments, **options)

    filesystem_async.FileSystemWriterAsync.write_preloaded_data = staticmethod(later)
    yield released
    filesystem_async.FileSystemWriterAsync.write_preloaded_data = staticmethod(write)


@dataclass(frozen=True)
class Hashed:
    """A file that this rank read to hash it."""

    name: str
    size: int
    awaited: bool  # in the main thread: of rank 0, every other rank waits for it


@contextlib.contextmanager
def hashed_files() -> Iterator[list[Hashed]]:
    """What is hashed meanwhile, in any thread of this rank."""
    original, found = hashlib.file_digest, list[Hashed]()

    def counted(file: Any, kind: str) -> Any:
        awaited = threading.current_thread() is threading.main_thread()
        size = os.fstat(file.fileno()).st_size
        found.append(Hashed(Path(file.name).name, size, awaited))
        return original(file, kind)

    hashlib.file_digest = counted
    yield found
    hashlib.file_digest = original


def count_hashed(root: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Bytes that each rank hashes for a checkpoint, all and awaited ones, and to load it again."""
    trainer, _ = build(root, job)
    run = new_run(root, job["count"])
    train(trainer, range(1))
    with hashed_files() as saving:
        writer = checkpoint.CheckpointWriter(trainer, run, lambda published: None)
        writer.save(1, {})
        writer.close()
    with hashed_files() as loading:
        checkpoint.load(trainer, run, 1)
    counts = [
        sum(file.size for file in saving),
        sum(file.size for file in saving if file.awaited),
        sum(file.size for file in loading),
    ]
    by_rank: list[Any] = [None] * trainer.ranks.world_size
    dist.all_gather_object(by_rank, counts)
    whole = sum(p.stat().st_size for p in run.checkpoint(1).iterdir() if p.name != "SEALED")
    saved, awaited, loaded = zip(*by_rank, strict=True)
    return {"whole": whole, "saved": saved, "awaited": awaited, "loaded": loaded}


def die_while_writing(trainer: Trainer, writer: checkpoint.CheckpointWriter) -> None:
    """Rank 1's thread is killed with half a file written, while all ranks train on."""
    write = filesystem_async.FileSystemWriterAsync.write_preloaded_data

    def half(*arguments: Any, **options: Any) -> None:
        write(*arguments, **options)
        path = Path(arguments[2][0])
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    if trainer.ranks.rank == 1:
        filesystem_async.FileSystemWriterAsync.write_preloaded_data = staticmethod(half)
    writer.save(6, {})
    train(trainer, range(6, 10))
    writer.close()


def new_run(root: Path, name: str) -> RunDir:
    run = RunDir(root / "runs" / name, 1)
    if dist.get_rank() == 0:
        run.path.mkdir(parents=True)
        write_json(run.path / "generation.json", {"generation": 1})
    dist.barrier()
    return run


def begin(root: Path, job: dict[str, Any]) -> dict[str, Any]:
    """A new run that begins with another's checkpoint: one step of a weight as Adam's formula has
    it from the tensors in the folder, then the run's own checkpoint 0 and a start from that.
    """
    folder = root / "runs" / job["begin"] / "checkpoints" / "000003"
    seal = hashlib.sha256((folder / "SEALED").read_bytes()).hexdigest()
    trainer, bridge = build(root, job)
    said = []
    for path, digest in ((folder.with_name("000001"), seal), (folder, seal[::-1])):
        try:
            checkpoint.begin_with(trainer, path, digest)
        except MtopdError as error:
            said.append(str(error))
    checkpoint.begin_with(trainer, folder, seal)
    result = {"loaded": state(trainer, bridge), "steps_done": trainer.steps_done, "refused": said}
    run = new_run(root, job["run"])
    writer = checkpoint.CheckpointWriter(trainer, run, lambda published: None)
    writer.save(0, {})
    writer.close()
    rates: list[float] = []
    result["moved"] = moved_by_hand(trainer, folder)
    rates.append(trainer.optimizer.param_groups[0]["lr"])
    losses = train(trainer, range(1, 3))
    again, _ = build(root, job)
    checkpoint.load(again, run, 0)
    same = train(again, range(3), rates)
    return {**result, "losses": losses, "again": same[1:], "rates": rates[1:]}


def moved_by_hand(trainer: Trainer, folder: Path) -> float:
    """Take a train step; the largest relative difference of a weight's update from Adam's formula."""
    weight = trainer.chunks[-1].decoder.final_layernorm.weight
    name, before = "decoder.final_layernorm.weight", weight.detach().double()
    names = {
        "weight": name,
        "mean": f"optimizer.state.exp_avg.{name}",
        "square": f"optimizer.state.exp_avg_sq.{name}",
    }
    stored = {key: torch.empty_like(weight.detach(), dtype=torch.float32) for key in names.values()}
    dcp.load(stored, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    assert torch.equal(stored[name], weight.detach())
    settings = trainer.optimizer.param_groups[0]
    (beta1, beta2), lr = settings["betas"], settings["lr"]
    objective = cross_entropy(trainer)
    trainer.forward_backward(micro_batches(trainer, 0), objective)
    gradient = weight.main_grad.double().clone()
    norm, used = trainer.optimizer_step(trainer.reduce(objective.finish))
    assert used == lr
    gradient *= min(1.0, OPTIMIZER.clip_grad / (norm + 1e-6))
    count = 3 + 1  # the other run's updates, and this one
    mean = beta1 * stored[names["mean"]].double() + (1 - beta1) * gradient
    square = beta2 * stored[names["square"]].double() + (1 - beta2) * gradient**2
    step = (mean / (1 - beta1**count)) / ((square / (1 - beta2**count)).sqrt() + 1e-5)
    moved = weight.detach().double() - before
    return float(((moved + lr * step) / (lr * step.abs().max())).abs().max())


def run_job(root: Path, job: dict[str, Any]) -> dict[str, Any]:
    if "begin" in job:
        return begin(root, job)
    if "count" in job:
        return count_hashed(root, job)
    trainer, bridge = build(root, job)
    if "straight" in job:
        train(trainer, range(3))
        losses = train(trainer, range(3, 6))
        return {"losses": losses, "state": state(trainer, bridge)}
    if "ended" in job:  # a run that was planned to end here
        train(trainer, range(3))
        writer = checkpoint.CheckpointWriter(trainer, new_run(root, job["ended"]), lambda n: None)
        writer.save(3, {})
        writer.close()
        return {}
    run = RunDir(root / "runs" / job.get("save", job.get("resume")), 1)
    if "save" in job:
        new_run(root, job["save"])
        published: list[int] = []
        writer = checkpoint.CheckpointWriter(trainer, run, published.append)
        train(trainer, range(3))
        result: dict[str, Any] = {"saved": state(trainer, bridge)}
        with slow_writer() as released, hashed_files() as hashed:
            writer.save(3, {"shares": {"a": 1.5}})
            # Weights and moments change before they are written.
            losses = train(trainer, range(3, 6))
            writer.advance()
            assert checkpoint.newest(run) is None, "a save under way is no checkpoint"
            released.set()
            writer.wait()
        if job.get("dies"):
            if trainer.ranks.rank == 0:
                write_json(run.path / "before.json", {**result, "losses": losses})
            die_while_writing(trainer, writer)
        result["awaited"] = [file.name for file in hashed if file.awaited]
        writer.close()
        assert published == ([3] if trainer.ranks.rank == 0 else []) and checkpoint.newest(run) == 3
        result |= {"losses": losses, "state": state(trainer, bridge)}
        result["forgeries"] = check_forgeries(trainer, run, 3)
        result["damages"], result["refused"] = check_damages(trainer, run, 3)
        return result
    try:
        plain = checkpoint.load(trainer, run, 3)
    except MtopdError as error:
        return {"error": str(error)}
    loaded = {"loaded": state(trainer, bridge), "plain": plain, "newest": checkpoint.newest(run)}
    rates: list[float] = []
    losses = train(trainer, range(3, 6), rates)
    return {
        **loaded,
        "losses": losses,
        "rates": rates,
        "state": state(trainer, bridge),
        "steps_done": trainer.steps_done,
    }


if __name__ == "__main__":
    quiet_libraries()
    for spec in json.loads(sys.argv[2]):
        found = run_job(Path(sys.argv[1]), spec)
        if dist.get_rank() == 0:
            print("RESULT " + json.dumps({**spec, **found}), flush=True)
    dist.barrier()
    dist.destroy_process_group()
