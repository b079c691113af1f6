"""The trainer's state on disk, in Megatron's distributed format: it can be loaded at any layout.

A save copies weights, optimizer and random state to host memory, and a thread writes the copy while
training goes on; one save is in flight at most.  A folder is written under a temporary name and
published whole by rank 0, with its seal (sha256 of every file) already inside.  Nothing in it is
opened before all files match the seal, and even then nothing can execute: tensors and ``common.pt``
load with ``weights_only``, the index (a pickle) through an unpickler that knows the dozen classes
of an index and no others, and it may name nothing but tensors in sealed files.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import queue
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import (
    COMMON_STATE_FNAME,
    TorchCommonLoadStrategy,
)
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader, Metadata, TensorStorageMetadata

from mtopd.files import remove_tree, replace_tree, sync_file
from mtopd.megatron.agreement import decide, gather
from mtopd.megatron.optimizer import create_state
from mtopd.megatron.trainer import Trainer
from mtopd.run_dir import SEAL, RunDir, is_sealed, read_seal
from mtopd.safetensors_file import save_tensors
from mtopd.types import MtopdError

# Results of a write stay in this process: no manager process, which would outlive a killed rank.
filesystem_async._get_write_results_queue = queue.Queue


@dataclass(frozen=True)
class _Written:
    """What a rank's thread wrote: Megatron's results by bucket, sha256 by file name."""

    results: dict[int, object]
    digests: dict[str, str]


@dataclass
class _InFlight:
    iteration: int
    partial: Path
    request: AsyncRequest
    written: Future[_Written]
    contents: dict[str, object]  # of the seal


class CheckpointWriter:
    """Saves in the background.  Every method is collective: all ranks call it at the same place.

    ``published(iteration)`` is called on rank 0 once a checkpoint can be resumed from, in the
    writer's thread: it may remove what that checkpoint makes superfluous while training goes on.
    """

    def __init__(self, trainer: Trainer, run: RunDir, published: Callable[[int], None]) -> None:
        self._trainer = trainer
        self._run = run
        self._published = published
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._in_flight: _InFlight | None = None
        self._notified: Future[None] | None = None  # the last call of ``published``

    def save(self, iteration: int, state: Mapping[str, object]) -> None:
        """Begin ``checkpoints/<iteration>``; waits for the former save.  ``state`` is plain data
        for the next start.
        """
        self.wait()
        trainer = self._trainer
        rank = trainer.ranks.rank
        target = self._run.checkpoint(iteration)
        partial = target.with_name(f".{target.name}.tmp")
        if rank == 0:
            remove_tree(partial)
            partial.mkdir(parents=True)
        dist.barrier()
        trainer.finish_param_sync()
        # The asynchronous save plans the files and writes none: copy and write are done below.
        request = dist_checkpointing.save(
            _sharded_state(trainer, loading=False), str(partial), async_sharded_save=True
        )
        # Copied now, written later: the next train step changes the tensors in place.
        buckets = [
            (
                path,
                name,
                (objects, [(item, tensor.to("cpu", copy=True)) for item, tensor in tensors]),
            )
            for path, name, (objects, tensors) in (
                request.async_fn_args[1] if request.async_fn else []
            )
        ]
        transforms = request.async_fn.args[0] if request.async_fn else []
        contents = {
            "layout": _layout(trainer),
            "optimizer": _optimizer_kind(trainer),
            "state": dict(state),
            "train_steps": trainer.steps_done,
            "optimizer_updates": trainer.optimizer_updates,
        }
        written = self._thread.submit(
            _write_buckets, buckets, transforms, partial / _rng_file(rank), _rng_state()
        )
        self._in_flight = _InFlight(iteration, partial, request, written, contents)

    def advance(self) -> None:
        """Publish the save in flight if every rank has written its part; returns at once."""
        if self._in_flight is not None:
            # Ranks publish together: one that still writes keeps the others from it.
            done = torch.tensor(
                int(self._in_flight.written.done()), device=self._trainer.ranks.device
            )
            dist.all_reduce(done, op=dist.ReduceOp.MIN)
            if done.item():
                self.wait()

    def wait(self) -> None:
        """Publish the save in flight.  Raises MtopdError when a rank could not write."""
        if self._notified is not None:
            self._notified.result()  # raises what went wrong there
            self._notified = None
        if (save := self._in_flight) is None:
            return
        self._in_flight = None
        error = save.written.exception()
        outcomes: list[Any] = [None] * self._trainer.ranks.world_size
        dist.all_gather_object(outcomes, str(error) if error else save.written.result().digests)
        if errors := [outcome for outcome in outcomes if isinstance(outcome, str)]:
            raise MtopdError(
                f"cannot write checkpoint {save.partial}: {errors[0]}; the former one stays"
            )
        # Megatron's finalizers gather the results of all ranks and write the index.
        if save.request.async_fn:
            save.request.async_fn_args[2].put(save.written.result().results)
        for finalize in save.request.finalize_fns:
            finalize()
        if self._trainer.ranks.rank == 0:
            written = {name: digest for outcome in outcomes for name, digest in outcome.items()}
            # What rank 0 wrote beside the tensors: all others wait until it is done here, so the
            # writers' files, which are nearly all bytes, are neither hashed nor synced again.
            own = {
                path.name: _file_sha256(path)
                for path in save.partial.iterdir()
                if path.name not in written
            }
            # Sealed under its temporary name: what has the final name is whole.
            files = dict(sorted((written | own).items()))
            self._run.seal(save.partial, {"files": files, **save.contents})
            replace_tree(save.partial, self._run.checkpoint(save.iteration), durable=written)
            self._notified = self._thread.submit(self._published, save.iteration)
        dist.barrier()

    def close(self) -> None:
        self.wait()
        self._thread.shutdown()
        if self._notified is not None:
            self._notified.result()


def load(trainer: Trainer, run: RunDir, iteration: int) -> dict[str, Any]:
    """Restore the trainer, at whatever layout it has now, and return ``state``.  Collective.

    Random states are restored at the layout they were saved at; elsewhere the streams begin anew
    from the run's seed. Raises MtopdError when the folder does not match its seal, or holds the
    other kind of optimizer.
    """
    folder = run.checkpoint(iteration)
    seal = _verified_seal(folder, trainer)
    _load_tensors(trainer, folder, seal, steps_done=int(seal["train_steps"]))
    if seal["layout"] == _layout(trainer):
        _restore_rng(load_file(folder / _rng_file(trainer.ranks.rank)))
    plain: dict[str, Any] = seal["state"]
    return plain


def begin_with(trainer: Trainer, folder: Path, seal_sha256: str) -> None:
    """Take weights and optimizer moments of another run's checkpoint; steps, schedule and random
    states stay those of a new run.  Collective.

    Raises MtopdError when the seal is not the one with that sha256, and as ``load`` does.
    """

    def look() -> None:
        if not is_sealed(folder):
            raise MtopdError(f"{folder}, with which the run begins, is gone; put it back")
        if _file_sha256(folder / SEAL) != seal_sha256:
            raise MtopdError(
                f"{folder}, with which the run begins, was written again since its first start; "
                "choose another run_dir to begin with what is there now"
            )

    decide(trainer.ranks, look)
    _load_tensors(trainer, folder, _verified_seal(folder, trainer), steps_done=0)


def _load_tensors(
    trainer: Trainer, folder: Path, seal: Mapping[str, Any], *, steps_done: int
) -> None:
    """Restore weights and optimizer from a folder that matches ``seal``."""
    for option, value in _optimizer_kind(trainer).items():
        if seal["optimizer"][option] != value:
            raise MtopdError(
                f"{folder} was written with {option}={seal['optimizer'][option]} and cannot be "
                f"loaded with {option}={value}: Megatron keeps the optimizer's state in "
                "another form; set it as it was"
            )
    state = dist_checkpointing.load(
        _sharded_state(trainer, loading=True),
        str(folder),
        sharded_strategy=_LoadSharded(read_index(folder / ".metadata", seal["files"])),
        common_strategy=_LoadCommon(),
    )
    with torch.no_grad():
        for index, chunk in enumerate(trainer.chunks):
            # Not strict: `_sharded_state` leaves out Transformer Engine's (empty) extra state.
            missing, unexpected = chunk.load_state_dict(state[f"chunk{index}"], strict=False)
            assert not unexpected and all("_extra_state" in name for name in missing), (
                missing,
                unexpected,
            )
        trainer.load_optimizer(
            state["optimizer"], num_updates=int(seal["optimizer_updates"]), steps_done=steps_done
        )


def newest(run: RunDir) -> int | None:
    """Iteration of the newest sealed checkpoint."""
    return max(sealed(run), default=None)


def sealed(run: RunDir) -> list[int]:
    return run.sealed_checkpoints()


def prune(run: RunDir, *, keep: int) -> None:
    """Remove all sealed checkpoints but the newest ``keep``."""
    for iteration in sealed(run)[:-keep]:
        remove_tree(run.checkpoint(iteration))


def _sharded_state(trainer: Trainer, *, loading: bool) -> dict[str, Any]:
    """Megatron's description of every tensor: its place in the whole model, whatever the layout."""
    # The form of the distributed optimizer's state that another layout can load.
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": trainer.ranks.dp_cp_group,
    }
    # Before its first step an optimizer has no moments, and no place to load them into.
    create_state(trainer.optimizer)
    chunks = {
        f"chunk{index}": {
            name: value
            for name, value in chunk.sharded_state_dict(metadata=metadata).items()
            # pickled extra state, of which a model without fp8 has none
            if not isinstance(value, ShardedObject)
        }
        for index, chunk in enumerate(trainer.chunks)
    }
    optimizer = trainer.optimizer.sharded_state_dict(
        dict(chunks), is_loading=loading, metadata=metadata
    )
    return {**chunks, "optimizer": optimizer}


def _write_buckets(
    buckets: list[Any], transforms: object, rng_path: Path, rng_state: Mapping[str, torch.Tensor]
) -> _Written:
    """In the writer's thread: every bucket a file, written and synced by Megatron's own function."""
    results: dict[int, object] = {}
    digests: dict[str, str] = {}
    for index, bucket in enumerate(buckets):
        outcome: queue.Queue[tuple[int, object]] = queue.Queue()
        ticket: queue.Queue[int] = queue.Queue()  # taken back when the bucket is written
        ticket.put(index)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms, index, bucket, outcome, ticket, use_fsync=True
        )
        _, result = outcome.get()
        if isinstance(result, Exception):
            raise result
        results[index] = result
        digests[bucket[1]] = _file_sha256(Path(bucket[0]))
    save_tensors(rng_state, rng_path)
    sync_file(rng_path)
    digests[rng_path.name] = _file_sha256(rng_path)
    return _Written(results, digests)


def _layout(trainer: Trainer) -> dict[str, int]:
    sizes = ("world", "tp", "pp", "vpp", "cp", "dp", "ep", "expert_tp")
    return {name: getattr(trainer.ranks, f"{name}_size") for name in sizes}


def _optimizer_kind(trainer: Trainer) -> dict[str, bool]:
    """What a resume may not change.  Experts that ep splits have an optimizer of their own."""
    return {
        "student.megatron.use_distributed_optimizer": trainer.distributed_optimizer,
        "student.parallel.ep > 1": trainer.ranks.ep_size > 1,
    }


def _rng_file(rank: int) -> str:
    return f"rng_{rank:05d}.safetensors"


def _rng_state() -> dict[str, torch.Tensor]:
    """torch's generator and Megatron's tracked ones, on this rank."""
    tracked = tensor_parallel.get_cuda_rng_tracker().get_states()
    states = {
        "torch": torch.get_rng_state(),
        **{f"tracked/{name}": state for name, state in tracked.items()},
    }
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: state.cpu().clone() for name, state in states.items()}


def _restore_rng(states: dict[str, torch.Tensor]) -> None:
    prefix = "tracked/"
    tracked = {
        name.removeprefix(prefix): state
        for name, state in states.items()
        if name.startswith(prefix)
    }
    tensor_parallel.get_cuda_rng_tracker().set_states(tracked)
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


# -- reading nothing that could execute ------------------------------------------------------------
def _verified_seal(folder: Path, trainer: Trainer) -> dict[str, Any]:
    """The seal, after every file was compared with it; the ranks share the reading.  Collective."""
    ranks = trainer.ranks
    # Names first, and as rank 0 lists them: no file is read while one is missing, unknown or a link.
    seal = decide(ranks, lambda: _seal_of_names(folder))
    share = sorted(seal["files"])[ranks.rank :: ranks.world_size]
    wrong_by_rank = gather(
        ranks,
        lambda: [name for name in share if _file_sha256(folder / name) != seal["files"][name]],
    )
    if bad := [name for names in wrong_by_rank for name in names]:
        raise _damaged(folder, bad[0])
    return seal


def _seal_of_names(folder: Path) -> dict[str, Any]:
    """The seal, after the folder was found to hold the files it names and no others."""
    if folder.is_symlink():
        raise MtopdError(
            f"{folder} is a link; a checkpoint lies in its run directory itself: remove the link"
        )
    seal = read_seal(folder)
    if not isinstance(seal.get("files"), dict):
        raise MtopdError(
            f"{folder / SEAL} lists no files: another version wrote {folder}; remove it or use "
            "that version"
        )
    found = {path.name: path for path in folder.iterdir() if path.name != SEAL}
    wrong = sorted(found.keys() ^ seal["files"].keys())
    wrong += [
        name
        for name, path in {**found, SEAL: folder / SEAL}.items()
        if path.is_symlink() or not path.is_file()
    ]
    if wrong:
        raise _damaged(folder, wrong[0])
    return seal


def _damaged(folder: Path, name: str) -> MtopdError:
    return MtopdError(
        f"{folder / name} does not match the checkpoint's seal; it was damaged or exchanged: "
        f"remove {folder} to resume from an earlier checkpoint"
    )


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _LoadCommon(TorchCommonLoadStrategy):
    def load_common(self, checkpoint_dir: str | Path) -> dict[str, object]:
        return torch.load(
            Path(checkpoint_dir) / COMMON_STATE_FNAME, map_location="cpu", weights_only=True
        )

    def load_sharded_objects(
        self, sharded_objects_state_dict: object, checkpoint_dir: str | Path
    ) -> NoReturn:
        raise MtopdError(
            f"{checkpoint_dir} holds pickled objects; a checkpoint of this program has none"
        )


class _LoadSharded(torch_strategy.TorchDistLoadShardedStrategy):
    def __init__(self, index: Metadata) -> None:
        super().__init__()
        self._index = index

    def load(self, sharded_state_dict: object, checkpoint_dir: str | Path) -> object:
        # Megatron's load opens the index itself, by an unrestricted unpickler.
        original = torch_strategy._get_filesystem_reader
        torch_strategy._get_filesystem_reader = lambda folder, cache_metadata=False: _SealedReader(
            folder, self._index
        )
        try:
            return super().load(sharded_state_dict, checkpoint_dir)
        finally:
            torch_strategy._get_filesystem_reader = original


class _SealedReader(FileSystemReader):
    """Reads tensors as torch does (``weights_only``), by an index that was read before."""

    def __init__(self, folder: str | Path, index: Metadata) -> None:
        super().__init__(folder)
        self._index = index

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        return self._index


def read_index(path: Path, files: Collection[str]) -> Metadata:
    """Megatron's index of a checkpoint, which may name tensors in sealed ``files`` and nothing
    else.

    Raises MtopdError for anything more: an entry that is no tensor would be unpickled by torch,
    whatever it holds.
    """
    # An unpickler that refuses foreign classes is not enough: torch loads an entry that the index
    # calls bytes with weights_only=False.
    index = _IndexUnpickler(io.BytesIO(path.read_bytes())).load()
    names_tensors = isinstance(index, Metadata) and all(
        isinstance(entry, TensorStorageMetadata) for entry in index.state_dict_metadata.values()
    )
    if not names_tensors:
        raise MtopdError(
            f"{path} names pickled objects, which no checkpoint of this program holds; {_EXCHANGED}"
        )
    for place in index.storage_data.values():
        if place.relative_path not in files or place.transform_descriptors:
            raise MtopdError(
                f"{path} points to {place.relative_path}, which is not a sealed file; {_EXCHANGED}"
            )
    found: Metadata = index
    return found


_EXCHANGED = "it was exchanged: remove its folder to resume from an earlier checkpoint"
_CHECKPOINT = "torch.distributed.checkpoint"
_INDEX_NAMES = {
    f"{_CHECKPOINT}.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
        "BytesStorageMetadata",  # known, so that read_index can say what is wrong
    },
    f"{_CHECKPOINT}.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    f"{_CHECKPOINT}.filesystem": {"_StorageInfo"},
    "torch": {
        "Size",
        *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
    },
    "torch.serialization": {"_get_layout"},
}


class _IndexUnpickler(pickle.Unpickler):
    """Admits what Megatron's index is made of and nothing else: data classes, sizes, dtypes."""

    def find_class(self, module: str, name: str) -> object:
        if name in _INDEX_NAMES.get(module, ()):
            return super().find_class(module, name)
        raise MtopdError(
            f"the checkpoint's index asks for {module}.{name}, which no checkpoint needs; "
            f"{_EXCHANGED}"
        )
