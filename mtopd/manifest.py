"""``manifest.json`` of a run: which run this is, and what a later start of it may change."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mtopd.config import ConsolidateConfig
from mtopd.config_file import Root, load_config, resolved, validate
from mtopd.config_rollout import SERVER_KEYS
from mtopd.config_specialist import SpecialistConfig
from mtopd.files import read_json, write_atomic, write_json
from mtopd.run_dir import RunDir, read_seal
from mtopd.types import MtopdError
from mtopd.yaml_file import read_yaml

Keys = tuple[str | int, ...]
Inputs = dict[str, dict[str, str]]  # what an input is to the run -> its path and its sha256

MANIFEST_SCHEMA = 2  # 2: inputs by content
TOKENIZER = "tokenizer"  # begins the name of an input that may change on purpose

# Keys of manifest.json by what a later start may do with them; * stands for any place in a list.
FREE: tuple[Keys, ...] = (  # how the run is computed
    # where it and its inputs lie: these are compared by content
    ("config", "run_dir"),
    ("config", "student", "model"),
    ("config", "data", "sources", "*", "path"),
    ("config", "data", "sources", "*", "eval_path"),
    ("config", "data", "sources", "*", "environment", "timeout_s"),
    ("config", "data", "sources", "*", "environment", "threads"),
    ("inputs",),
    ("config", "student", "parallel"),
    ("config", "student", "bucket_bytes"),
    ("config", "teachers", "*", "parallel"),
    ("config", "teachers", "*", "store"),  # it may move; its fingerprint may not change
    *(("config", "rollout", key) for key in SERVER_KEYS),  # who answers, and for how long
    ("config", "rollout", "overlap_teacher_pass"),
    ("config", "teacher_offload"),
    ("config", "checkpoint"),
    ("config", "log_json"),
    ("config", "evaluation", "every"),
    ("config", "evaluation", "baselines"),  # their results are known by content
    ("config", "evaluation", "weight_average"),
    ("config", "evaluation", "baselines_at_end"),
    ("config", "train", "micro_batch_size"),
    ("config", "train", "token_budget"),
    ("config", "train", "max_bad_steps"),
    # A run goes on beyond its former end: pipelines/continuation.py says what that means.
    ("config", "train", "num_iterations"),
    ("config", "train", "num_steps"),
    ("config", "store"),
    ("architecture",),  # another transformers may know more settings
)
# who teaches what
ACCEPTABLE: tuple[Keys, ...] = (
    ("config", "teachers"),
    ("teachers",),
    ("tokenizer_hash",),
    ("end_ids",),
)


def read_manifest(run: RunDir) -> dict[str, Any]:
    """The manifest of a run that is gone on with.  Raises MtopdError for another version's."""
    found = read_json(run.manifest)
    schema = found.get("schema") if isinstance(found, dict) else None
    if not isinstance(found, dict) or schema != MANIFEST_SCHEMA:
        raise MtopdError(
            f"{run.manifest} has schema {schema!r}, this version writes {MANIFEST_SCHEMA}: go on "
            "with the version that began the run, or choose another run_dir (`mtopd report` and "
            "`mtopd cache` read it still)"
        )
    if not _is_sound(found):
        raise MtopdError(
            f"{run.manifest} was edited: it is not as a start writes it; put it back as it was, or "
            "choose another run_dir"
        )
    return found


def _is_sound(manifest: Mapping[str, Any]) -> bool:
    inputs, changes = manifest.get("inputs", {}), manifest.get("accepted_changes", [])
    return (
        isinstance(manifest.get("config"), dict)
        and isinstance(inputs, dict)
        and all(isinstance(entry, dict) for entry in inputs.values())
        and all(isinstance(e.get(k), str) for e in inputs.values() for k in ("path", "sha256"))
        and isinstance(changes, list)
        and all(isinstance(c, dict) and isinstance(c.get("start"), int) for c in changes)
    )


def check_schema(run: RunDir) -> None:
    """Raise MtopdError when the run, if there is one, cannot be gone on with by this version."""
    if run.manifest.exists():
        read_manifest(run)
    elif run.current_generation() and not run.is_unstarted():
        raise MtopdError(
            f"{run.path} has lost its {run.manifest.name}, which says what run it is; put it back, "
            "or choose another run_dir"
        )


def kept_config(run: RunDir, kind: type[Root]) -> Root:
    """The config in a run directory, to read what the run left: also of one that an older version
    began, which is not gone on with.  Raises MtopdError.
    """
    manifest, values = read_json(run.manifest), read_yaml(run.config)
    if not (
        isinstance(manifest, dict) and manifest.get("schema") == 1 and isinstance(values, dict)
    ):
        return load_config(run.config, [], kind)
    with contextlib.suppress(TypeError, AttributeError, KeyError):  # edited: told by ``validate``
        values = _without_idle_settings(values)
    return validate(values, kind, str(run.config))


def _without_idle_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` of schema 1 less what is refused today because it does nothing, which was written
    down with every config then, and less what ended or followed a supervised run.
    """
    found = copy.deepcopy(dict(values))
    sources = found["data"]["sources"]
    for source in sources:
        if source.get("reasoning_gym") is None:
            for key in ("config", "train_size", "eval_size", "seed", "eval_seed"):
                source.pop(key, None)
    if not any(s.get("reasoning_gym") or s.get("eval_path") for s in sources):
        found.get("evaluation", {}).pop("every", None)
    found["train"].pop("stop", None)
    found.pop("store", None)
    return found


def has_origin(run: RunDir) -> bool:
    """The run begins with another run's checkpoint."""
    return run.manifest.exists() and "from" in read_manifest(run)


def start_run(
    run: RunDir,
    config: Mapping[str, Any],
    manifest: Mapping[str, Any],
    config_yaml: str,
    *,
    free: Sequence[Keys] = (),
    accept_changed: bool = False,
    drop_unfinished: Callable[[], None] = lambda: None,
) -> list[str]:
    """Write or check config and manifest, and take the next generation number.  The caller holds
    the lock.

    Layout and sizing (``FREE`` and the patterns in ``free``) may differ from the former start's.
    Teachers, routes and tokenizer (``ACCEPTABLE``) only with ``accept_changed``: then
    ``drop_unfinished`` is called before the new ones are written down, and the changes are
    returned.  Raises MtopdError for any other change: that is another run.
    """
    known = {"schema": MANIFEST_SCHEMA, "config": dict(config), **manifest}
    accepted: list[dict[str, Any]] = []
    changes: list[str] = []
    if run.manifest.exists():
        previous = read_manifest(run)
        accepted = previous.pop("accepted_changes", [])
        previous["config"] = _with_new_keys(previous["config"])
        inputs = changed_inputs(previous.get("inputs", {}), known.get("inputs", {}))
        for name, text in inputs.items():
            if not name.startswith(TOKENIZER):
                raise MtopdError(f"{text}; put it back, or choose another run_dir")
        found = [
            (path, text)
            for path, text in differences(previous, known)
            if not _matches(path, (*FREE, *free))
        ]
        for path, text in found:
            if not _matches(path, ACCEPTABLE):
                raise MtopdError(
                    f"run directory {run.path} belongs to another run: {text}; "
                    "choose another run_dir, or remove this one to start over"
                )
        changes = [*inputs.values(), *(text for _, text in found)]
        if changes and not accept_changed:
            raise MtopdError(
                f"the teachers, routes or tokenizer of {run.path} have changed: {changes[0]}; "
                "start with --accept-changed to go on from the newest checkpoint with the new "
                "ones, or choose another run_dir"
            )
        if changes:
            drop_unfinished()
    start = run.current_generation() + 1
    accepted += [{"start": start, "change": text} for text in changes]
    write_json(run.manifest, {**known, "accepted_changes": accepted})  # it marks the folder: first
    write_atomic(run.config, config_yaml.encode())
    run.take_generation()
    return changes


def _with_new_keys(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a former start with the keys that came to be since then, at their defaults: what
    they say was not done.
    """
    try:
        if "teachers" in config:
            return resolved(validate(config, ConsolidateConfig, "manifest.json"))
        return resolved(validate(config, SpecialistConfig, "manifest.json"))
    except MtopdError:  # it holds what is refused today: told as a difference
        return config


def changed_inputs(before: Inputs, now: Inputs) -> dict[str, str]:
    """What is said of each input whose content differs, by its name."""
    found = {}
    for name in sorted(before.keys() | now.keys()):
        if name not in now:
            found[name] = f"{before[name]['path']} ({name}) is gone, the run began with it"
        elif name not in before:
            found[name] = f"{now[name]['path']} ({name}) is new, the run began without it"
        elif before[name]["sha256"] != now[name]["sha256"]:
            moved = before[name]["path"] != now[name]["path"]
            found[name] = (
                f"{now[name]['path']} ({name}) is not what the run began with"
                + (f", {before[name]['path']}" if moved else "")
                + f": sha256 {before[name]['sha256'][:12]} there, {now[name]['sha256'][:12]} here"
            )
    return found


def check_accepted(
    run: RunDir, folder: Path, found: Mapping[str, Any], expected: Mapping[str, Any]
) -> None:
    """Raise MtopdError when ``found``, noted in a sealed folder, is not ``expected`` and no start
    since accepted it.
    """
    accepted = max(
        (change["start"] for change in read_json(run.manifest)["accepted_changes"]), default=0
    )
    if accepted > read_seal(folder)["generation"]:
        return
    for _, text in differences(found, expected):
        raise MtopdError(
            f"{folder} was made with other teachers than {run.manifest} names: {text}, no "
            "start accepted that; put the manifest back, or remove the folder"
        )


def _matches(path: Keys, patterns: Sequence[Keys]) -> bool:
    return any(
        len(path) >= len(pattern)
        and all(fnmatchcase(str(part), str(p)) for p, part in zip(pattern, path, strict=False))
        for pattern in patterns
    )


def differences(found: Any, expected: Any, path: Keys = ()) -> Iterator[tuple[Keys, str]]:
    """Every place where two JSON values differ, with "key: found X, needed Y"."""
    where = "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in path
    ).removeprefix(".")
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in sorted(found.keys() | expected.keys()):
            if key not in found or key not in expected:
                inner = f"{where}.{key}" if where else str(key)
                yield (
                    (*path, key),
                    (
                        f"{inner} is only in "
                        f"{'this config' if key not in found else 'the run directory'}"
                    ),
                )
            else:
                yield from differences(found[key], expected[key], (*path, key))
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            yield from differences(a, b, (*path, i))
    elif found != expected:
        yield path, f"{where} is {found!r} there and {expected!r} here"
