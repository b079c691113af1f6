"""What a start goes on from: its own run under another number of iterations, or, for a new run,
the checkpoint of another (``--from RUN[@ITERATION]``).  All is said and refused before ranks exist.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtopd.config import StudentConfig, TrainConfig
from mtopd.config_specialist import SpecialistConfig, SupervisedConfig
from mtopd.config_values import local_path
from mtopd.files import read_json, remove_tree
from mtopd.hf_checkpoint import load_hf_config
from mtopd.manifest import MANIFEST_SCHEMA, differences
from mtopd.metrics import read_metrics
from mtopd.planning import learning_rate
from mtopd.run_dir import SEAL, RunDir, is_sealed, numbered, read_seal
from mtopd.types import MtopdError

from .checks import check_optimizer_form

# Of an HF config: what changes no weight and nothing that is computed with them.
_NOT_ARCHITECTURE = {"use_cache", "initializer_range"}


# -- another number of iterations ------------------------------------------------------------------
def changed_end(run: RunDir, train: TrainConfig | SupervisedConfig) -> str | None:
    """A line about another number of iterations (of train steps) than the former start's, and what
    it does to the learning rate.  Raises MtopdError for fewer than the run has begun.
    """
    key, per_iteration = "num_steps", 1
    if isinstance(train, TrainConfig):
        key, per_iteration = "num_iterations", train.train_steps_per_iteration
    previous = read_json(run.manifest) if run.manifest.exists() else {}
    before = previous.get("config", {}).get("train", {}).get(key)
    now = getattr(train, key)
    if before is None or before == now:
        return None
    begun = [entry.iteration + 1 for entry in read_metrics(run.metrics) if entry.step is not None]
    checkpoints = run.sealed_checkpoints()
    if now < (done := max([*begun, *checkpoints], default=0)):
        raise MtopdError(
            f"train.{key} is {now}, but {run.path} has done {done} already; give at least {done}, "
            "or choose another run_dir"
        )
    said = f"train.{key} was {before}, is now {now}"
    if train.optimizer.decay == "constant":
        return f"{said}; the learning rate goes on as it was"
    step = 0
    if checkpoints:
        step = int(read_seal(run.checkpoint(checkpoints[-1]))["train_steps"])
    planned = [number * per_iteration for number in (before, now)]
    old, new = (_learning_rate(train, step, num_steps) for num_steps in planned)
    return (
        f"{said}: the learning rate at step {step} was {old:.4g}, is now {new:.4g}; its "
        f"{train.optimizer.decay} decay ends after {planned[1]} train steps, not {planned[0]}"
    )


def _learning_rate(train: TrainConfig | SupervisedConfig, step: int, num_steps: int) -> float:
    optimizer = train.optimizer
    return learning_rate(
        step,
        num_steps=num_steps,
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        warmup_steps=optimizer.warmup_steps,
        decay=optimizer.decay,
    )


def former_end(run: RunDir, config: SpecialistConfig) -> int | None:
    """How many train steps the final export has, where it is of another ``train.num_steps``.

    Raises MtopdError where the teacher store of such an export stands where the next one will.
    """
    final = _final(run)
    former: dict[str, int] = read_seal(final).get("train_steps", {}) if is_sealed(final) else {}
    goes_on = bool(former) and former["planned"] != config.train.num_steps
    was_set_aside = not is_sealed(final) and bool(numbered(final.parent))
    store = config.store
    if store is not None and store.path.exists() and (goes_on or was_set_aside):
        raise MtopdError(
            f"the teacher store {store.path} has the weights of {run.path} before it goes on; "
            "give store.path (and store.name) another value, or remove that store with `mtopd "
            "teachers rm`"
        )
    return former["done"] if goes_on else None


def set_aside_final(run: RunDir, num_steps: int) -> str:
    """Put the final export and its accuracy beside, under the number of their steps; a line."""
    kept = run.export(num_steps)
    remove_tree(kept)
    _final(run).replace(kept)
    accuracy = run.path / "evaluations" / "final.json"
    if accuracy.exists():
        accuracy.replace(run.evaluation(num_steps))
    return f"the export after {num_steps} train steps is now {kept}"


def _final(run: RunDir) -> Path:
    return run.path / "export" / "final"


# -- the checkpoint of another run -----------------------------------------------------------------
def architecture(folder: Path) -> dict[str, Any]:
    """What of a model's HF config decides its weights and what is computed with them."""
    from transformers import PretrainedConfig

    config = load_hf_config(folder)
    general = PretrainedConfig().to_dict().keys() - {"tie_word_embeddings", "model_type"}
    ignored = general | _NOT_ARCHITECTURE
    values = {
        name: value
        for name, value in config.to_dict().items()
        if name not in ignored and not name.endswith("_token_id")
    }
    found: dict[str, Any] = json.loads(json.dumps(values))  # as the manifest has it
    return found


def find_origin(
    run: RunDir, given: str | None, student: StudentConfig, known: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The checkpoint of another run that this one begins with, as the manifest notes it: ``given``
    is the command's RUN[@ITERATION], ``known`` this run's architecture and tokenizer_hash.

    A later start need not name it again, and once the run has a checkpoint of its own, the other
    may be gone.  Raises MtopdError for one that does not fit, or another than the first start's.
    """
    if not run.manifest.exists():
        if given is None:
            return None
        path, iteration = _parse(given)
        return _origin(run, path, iteration, student, known)
    origin: dict[str, Any] | None = read_json(run.manifest).get("from")
    if given is not None:
        _check_same(run, origin, given)
    if origin is not None and not run.sealed_checkpoints():
        path, iteration = Path(origin["run"]), int(origin["iteration"])
        if _origin(run, path, iteration, student, known) != origin:
            raise MtopdError(
                f"the checkpoint of iteration {iteration} in {path}, with which {run.path} begins, "
                "was written again since the first start; choose another run_dir"
            )
    return origin


def describe(origin: Mapping[str, Any]) -> str:
    return f"starting from {origin['run']} at iteration {origin['iteration']}"


def _parse(given: str) -> tuple[Path, int | None]:
    name, at, number = given.rpartition("@")
    has_number = bool(at) and number.isascii() and number.isdigit()
    try:
        path = local_path(name if has_number else given)
    except ValueError as error:
        raise MtopdError(f"--from {given}: {error}") from None
    return path, int(number) if has_number else None


def _check_same(run: RunDir, origin: Mapping[str, Any] | None, given: str) -> None:
    if origin is None:
        raise MtopdError(
            f"{run.path} was begun without --from, and what a run begins with does not change; "
            "choose another run_dir, or leave --from out to go on"
        )
    path, iteration = _parse(given)
    if str(path) != origin["run"] or iteration not in (None, origin["iteration"]):
        raise MtopdError(
            f"{run.path} began with {origin['run']}@{origin['iteration']}, not with {given}; "
            "choose another run_dir, or leave --from out to go on"
        )


def _origin(
    run: RunDir,
    path: Path,
    iteration: int | None,
    student: StudentConfig,
    known: Mapping[str, Any],
) -> dict[str, Any]:
    """The checkpoint, after it was found to fit."""
    where, source = f"--from {path}", RunDir(path)
    if path == run.path:
        raise MtopdError(f"{where} is this run itself; a run goes on without --from")
    if not source.is_ours():
        raise MtopdError(f"{where}: not a run directory (no {source.manifest.name} of a run)")
    available = source.sealed_checkpoints()
    if not available:
        raise MtopdError(f"{where}: the run has no finished checkpoint")
    chosen = available[-1] if iteration is None else iteration
    if chosen not in available:
        raise MtopdError(
            f"{where}: there is no checkpoint of iteration {chosen}; iterations with a checkpoint: "
            f"{', '.join(map(str, available))}"
        )
    manifest = read_json(source.manifest)
    if manifest.get("schema") != MANIFEST_SCHEMA or "architecture" not in manifest:
        raise MtopdError(
            f"{where}: another version began that run (schema {manifest.get('schema')}, this "
            f"version has {MANIFEST_SCHEMA}); begin with an export of it as student.model instead"
        )
    _check_fits(where, manifest, student, known)
    folder = source.checkpoint(chosen)
    check_optimizer_form(folder, student)
    seal = hashlib.sha256((folder / SEAL).read_bytes()).hexdigest()
    return {"run": str(path), "iteration": chosen, "seal": seal}


def _check_fits(
    where: str, manifest: Mapping[str, Any], student: StudentConfig, known: Mapping[str, Any]
) -> None:
    needed = known["architecture"]
    found = manifest["architecture"]
    common = found.keys() & needed.keys()  # another transformers may know more settings
    for _, text in differences(
        {name: found[name] for name in common}, {name: needed[name] for name in common}
    ):
        raise MtopdError(
            f"{where}: another architecture than student.model {student.model}: {text}; give the "
            "folder of that run's student, or begin with an export as student.model"
        )
    if manifest["tokenizer_hash"] != known["tokenizer_hash"]:
        raise MtopdError(
            f"{where}: another tokenizer than that of student.model {student.model}; a run begins "
            "with a checkpoint of the same tokens"
        )
    for key in ("dtype", "freeze_router"):  # they decide which weights an optimizer keeps, and how
        before, now = manifest["config"].get("student", {}).get(key), getattr(student, key)
        if before != now:
            raise MtopdError(
                f"{where}: student.{key} is {before!r} there and {now!r} here; set it as it was, "
                "or begin with an export as student.model, without the optimizer's moments"
            )
