"""A run directory: names, atomic writes, seals, the lock, the manifest.

What is promised:
* A file appears under its name whole or not at all (temporary name, fsync, rename, fsync of the
  folder).
* A sealed folder was complete when it was sealed, by the newest start of this run: every start
  takes the next generation number, and a process of an older generation can no longer seal.
* Only one launcher works in a run directory (flock; the kernel drops it when the launcher dies,
  however it dies).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mtopd.types import MtopdError

SCHEMA = 1
SEAL = "SEALED"
_ASIDE = ".aside"  # ending of what waits until its successor has its name


def fsync_dir(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old file or the whole new one, after a
    crash too.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_atomic(
        path, (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
    )


def read_json(path: Path) -> Any:
    """Parse a JSON file; raises MtopdError that names the file when it is not JSON."""
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise MtopdError(
            f"{path} is not valid JSON ({error}); it was damaged or edited: remove it and run again"
        ) from None


class RunDir:
    """Paths and seals of one run.  ``generation`` is the number of the start this process belongs
    to.
    """

    def __init__(self, path: Path, generation: int = 0) -> None:
        self.path = path
        self.generation = generation

    # -- names -------------------------------------------------------------------------------------
    def iteration(self, iteration: int) -> Path:
        return self.path / "iterations" / f"{iteration:06d}"

    def trajectories(self, iteration: int) -> Path:
        return self.iteration(iteration) / "trajectories"

    def hidden_cache(self, iteration: int) -> Path:
        return self.iteration(iteration) / "hidden_cache"

    def evaluation(self, iteration: int) -> Path:
        return self.path / "evaluations" / f"{iteration:06d}.json"

    def checkpoint(self, iteration: int) -> Path:
        return self.path / "checkpoints" / f"{iteration:06d}"

    def export(self, iteration: int) -> Path:
        return self.path / "export" / f"{iteration:06d}"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    # -- start -------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold ``run/lock`` while the block runs.  Raises MtopdError when another launcher holds
        it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise MtopdError(
                f"cannot write to the run directory {self.path}: {error.strerror}; choose another "
                "run_dir or mend its "
                "permissions"
            ) from None
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = (
                    os.pread(descriptor, 200, 0).decode(errors="replace").strip()
                    or "another process"
                )
                raise MtopdError(
                    f"run directory {self.path} is in use by {holder}; wait for it to end, or "
                    "choose another run_dir"
                ) from None
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"host {socket.gethostname()} pid {os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def start(
        self,
        config: Mapping[str, Any],
        manifest: Mapping[str, Any],
        config_yaml: str,
        *,
        accept_changed: bool = False,
        drop_unfinished: Callable[[], None] = lambda: None,
    ) -> list[str]:
        """Write or check config and manifest, and take the next generation number.  The caller
        holds the lock.

        Layout and sizing (``FREE``) may differ from the former start's.  Teachers, routes and
        tokenizer (``ACCEPTABLE``) only with ``accept_changed``: then ``drop_unfinished`` is called
        before the new ones are written down, and the changes are returned.  Raises MtopdError for
        any other change: that is another run.
        """
        known = {"schema": SCHEMA, "config": dict(config), **manifest}
        changes: list[str] = []
        if self.manifest.exists():
            previous = read_json(self.manifest)
            accepted = previous.pop("accepted_changes", [])
            found = [
                (path, text)
                for path, text in differences(previous, known)
                if not _matches(path, FREE)
            ]
            for path, text in found:
                if not _matches(path, ACCEPTABLE):
                    raise MtopdError(
                        f"run directory {self.path} belongs to another run: {text}; "
                        "choose another run_dir, or remove this one to start over"
                    )
            changes = [text for _, text in found]
            if changes and not accept_changed:
                raise MtopdError(
                    f"the teachers, routes or tokenizer of {self.path} have changed: {changes[0]}; "
                    "start with "
                    "--accept-changed to go on from the newest checkpoint with the new ones, or "
                    "choose another run_dir"
                )
            if changes:
                drop_unfinished()
            here = self.current_generation() + 1
            known["accepted_changes"] = accepted + [
                {"start": here, "change": text} for text in changes
            ]
        else:
            known["accepted_changes"] = []
        write_atomic(self.config, config_yaml.encode())
        write_json(self.manifest, known)
        self.generation = self.current_generation() + 1
        write_json(self.path / "generation.json", {"generation": self.generation})
        return changes

    def check_accepted(
        self, folder: Path, found: Mapping[str, Any], here: Mapping[str, Any]
    ) -> None:
        """Raise MtopdError when ``found``, noted in a sealed folder, is not ``here`` and no start
        since accepted it.
        """
        accepted = max(
            (change["start"] for change in read_json(self.manifest)["accepted_changes"]), default=0
        )
        if accepted > read_seal(folder)["generation"]:
            return
        for _, text in differences(found, here):
            raise MtopdError(
                f"{folder} was made with other teachers than {self.manifest} names: {text}, no "
                "start accepted that; "
                "put the manifest back, or remove the folder"
            )

    def current_generation(self) -> int:
        path = self.path / "generation.json"
        return int(read_json(path)["generation"]) if path.exists() else 0

    # -- seals -------------------------------------------------------------------------------------
    def seal(self, folder: Path, contents: Mapping[str, Any] | None = None) -> None:
        """Mark ``folder`` complete.  Raises MtopdError when a newer start of the run has taken
        over.
        """
        newest = self.current_generation()
        if newest != self.generation:
            raise MtopdError(
                f"this process belongs to start {self.generation} of {self.path}, but start "
                f"{newest} has taken over; "
                "it may not seal anything any more"
            )
        write_json(
            folder / SEAL, {"schema": SCHEMA, "generation": self.generation, **(contents or {})}
        )


def is_sealed(folder: Path) -> bool:
    return (folder / SEAL).is_file()


def read_seal(folder: Path) -> dict[str, Any]:
    seal = read_json(folder / SEAL)
    if not isinstance(seal, dict) or seal.get("schema") != SCHEMA:
        raise MtopdError(
            f"{folder / SEAL} has schema {seal.get('schema')!r}, this version reads {SCHEMA}"
        )
    return seal


def remove_tree(folder: Path) -> None:
    """Delete a folder of this run in one visible step: renamed first, so that a crash leaves no
    half of it.
    """
    if not folder.exists():
        return
    doomed = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.removed")
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def publish_tree(partial: Path, target: Path) -> None:
    """Give a complete folder its final name: everything in it durable first, then one rename."""
    _make_durable(partial)
    os.replace(partial, target)
    fsync_dir(target.parent)


def replace_tree(partial: Path, target: Path) -> None:
    """Publish a folder of this run in place of another, if there is one; that one goes last.

    A crash between the two renames leaves it aside, from where ``sweep`` puts it back.
    """
    aside = target.with_name(f".{target.name}{_ASIDE}")
    _make_durable(partial)
    if target.exists():
        os.replace(target, aside)
    os.replace(partial, target)
    fsync_dir(target.parent)
    remove_tree(aside)


def _make_durable(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            fsync_dir(path)
        else:
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def sweep(run: RunDir) -> None:
    """Mend what a killed start left in the run directory: a folder whose successor did not come
    takes its name again; temporary files and half-removed folders go.
    """
    for aside in list(run.path.rglob(f".*{_ASIDE}")):
        target = aside.with_name(aside.name.removeprefix(".").removesuffix(_ASIDE))
        if target.exists():
            remove_tree(aside)
        else:
            os.replace(aside, target)
            fsync_dir(target.parent)
    for pattern in (".*.tmp", ".*.removed"):
        for path in list(run.path.rglob(pattern)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


Keys = tuple[str | int, ...]

# Megatron's options that say where and when something is computed, and nothing of what; * stands
# for any letters. (Of use_distributed_optimizer a checkpoint itself demands that it stays.)
FREE_MEGATRON = (
    # layout and split
    *(
        "sequence_parallel",
        "cp_comm_type",
        "hierarchical_context_parallel_sizes",
        "microbatch_group_size_per_vp_stage",
    ),
    *(
        "pipeline_model_parallel_*",
        "num_layers_in_*_pipeline_stage",
        "account_for_*_in_pipeline_split",
    ),
    # memory
    *(
        "recompute_*",
        "num_microbatches_with_partial_activation_checkpoints",
        "distribute_saved_activations",
    ),
    *(
        "cpu_offloading*",
        "fine_grained_activation_offloading",
        "offload_modules",
        "min_offloaded_tensor_size",
    ),
    *("moe_layer_recompute", "deallocate_pipeline_outputs", "clone_scatter_output_in_embedding"),
    *("use_distributed_optimizer", "use_cpu_initialization", "perform_initialization"),
    # communication
    *(
        "overlap_grad_reduce",
        "overlap_param_gather",
        "align_param_gather",
        "bucket_size",
        "pad_buckets_*",
        "nccl_ub",
    ),
    *(
        "overlap_p2p_comm*",
        "batch_p2p_*",
        "use_ring_exchange_p2p",
        "tp_comm_*",
        "symmetric_ar_type",
    ),
    *("delay_wgrad_compute", "defer_embedding_wgrad_compute", "wgrad_deferral_limit"),
    *(
        "overlap_moe_expert_parallel_comm",
        "ep_overlap_*",
        "moe_shared_expert_overlap",
        "moe_token_dispatcher_type",
    ),
    *("moe_enable_deepep", "moe_deepep_*", "moe_flex_dispatcher_backend", "moe_hybridep_*"),
    # checks and logs
    *("check_for_*", "barrier_with_L1_time", "config_logger_dir"),
)

# Keys of manifest.json by what a later start may do with them; * stands for any place in a list.
FREE: tuple[Keys, ...] = (  # how the run is computed
    ("config", "student", "parallel"),
    *(("config", "student", "megatron", option) for option in FREE_MEGATRON),
    ("config", "teachers", "*", "parallel"),
    ("config", "teachers", "*", "store"),  # it may move; its fingerprint may not change
    ("config", "teacher_offload"),
    ("config", "checkpoint"),
    ("config", "log_json"),
    ("config", "evaluation", "every"),
    ("config", "train", "micro_batch_size"),
    ("config", "train", "token_budget"),
    ("config", "train", "max_bad_steps"),
)
ACCEPTABLE: tuple[Keys, ...] = (
    ("config", "teachers"),
    ("teachers",),
    ("tokenizer_hash",),
)  # who teaches what


def _matches(path: Keys, patterns: Sequence[Keys]) -> bool:
    return any(
        len(path) >= len(pattern)
        and all(fnmatchcase(str(part), str(p)) for p, part in zip(pattern, path, strict=False))
        for pattern in patterns
    )


def differences(found: Any, wanted: Any, path: Keys = ()) -> Iterator[tuple[Keys, str]]:
    """Every place where two JSON values differ, with "key: found X, wanted Y"."""
    where = "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in path
    ).removeprefix(".")
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            if key not in found or key not in wanted:
                inner = f"{where}.{key}" if where else str(key)
                yield (
                    (*path, key),
                    (
                        f"{inner} is only in "
                        f"{'this config' if key not in found else 'the run directory'}"
                    ),
                )
            else:
                yield from differences(found[key], wanted[key], (*path, key))
    elif isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
            yield from differences(a, b, (*path, i))
    elif found != wanted:
        yield path, f"{where} is {found!r} there and {wanted!r} here"
