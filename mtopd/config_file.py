"""The file of a config: read, overridden by the command line, validated, written back.

An unknown key is an error that names the nearest known one, and whether it stands in the file or on
the command line.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from mtopd.config import ConsolidateConfig
from mtopd.config_specialist import SpecialistConfig
from mtopd.config_values import FORMS
from mtopd.types import MtopdError
from mtopd.yaml_file import dump_yaml, parse_yaml, read_yaml

_SHOWN_ERRORS = 20

Root = TypeVar("Root", ConsolidateConfig, SpecialistConfig)


def load_config(path: Path, overrides: Sequence[str], kind: type[Root]) -> Root:
    """Read a YAML file, apply ``key.sub=value`` overrides (values are YAML), validate.  Raises
    MtopdError.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise MtopdError(f"{path} must hold a table of settings, found {found}")
    _check_overrides(overrides)
    given = {place for override in overrides for place in _override(values, override)}
    return validate(values, kind, str(path), given)


def validate(
    values: dict[str, Any], kind: type[Root], where: str, given: Collection[str] = ()
) -> Root:
    """The config of a file's ``values``; ``given`` names those that the command line put there.

    Raises MtopdError that names every unknown key, or else the first error.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as refusal:
        found: list[dict[str, Any]] = [
            {**one, "loc": tuple(part for part in one["loc"] if part not in FORMS)}
            for one in refusal.errors()
        ]
    unknown = [error for error in found if error["type"] == "extra_forbidden"]
    shown = (unknown or found)[: _SHOWN_ERRORS if unknown else 1]
    lines: dict[str, list[str]] = {}
    for error in shown:
        lines.setdefault(_origin(error["loc"], where, given), []).append(_explain(error, kind))
    also = f" (and {len(found) - len(shown)} more)" if len(found) > len(shown) else ""
    raise MtopdError("; ".join(f"{o}: {', '.join(said)}" for o, said in lines.items()) + also)


def _origin(loc: Sequence[int | str], where: str, given: Collection[str]) -> str:
    """What a value at ``loc`` came from."""
    places = (".".join(map(str, loc[:end])) for end in range(1, len(loc) + 1))
    return "the command line" if any(place in given for place in places) else where


def _check_overrides(overrides: Sequence[str]) -> None:
    """No override may undo one before it."""
    given: dict[str, str] = {}
    for override in overrides:
        key, _, _ = override.partition("=")
        for before, text in given.items():
            if (before == key or before.startswith(f"{key}.")) and text != override:
                raise MtopdError(f"override {override!r} undoes {text!r}; give one of them")
        given[key] = override


def _override(values: dict[str, Any], override: str) -> list[str]:
    """Put one value into the tables.  The places that were not there before, or hold another value
    now.
    """
    key, separator, text = override.partition("=")
    if not separator:
        raise MtopdError(f"override {override!r} must look like key.sub=value")
    value = parse_yaml(text, f"override {override!r:.200}")
    *parents, leaf = key.split(".")
    table: Any = values
    passed: list[str] = []
    given: list[str] = []
    for part in parents:
        place = _place(part, table, passed, override)
        passed.append(str(place))
        if isinstance(table, dict) and table.get(place) is None:
            table[place] = {}
            given.append(".".join(passed))
        table = table[place]
    place = _place(leaf, table, passed, override)
    table[place] = value
    return [*given, ".".join([*passed, str(place)])]


def _place(part: str, table: Any, passed: Sequence[str], override: str) -> int | str:
    """Where in ``table``, which stands at ``passed``, an override goes on.  Raises MtopdError."""
    if isinstance(table, dict):
        return part
    here = ".".join(passed)
    if not isinstance(table, list):
        raise MtopdError(f"override {override!r}: {here!r} is not a table in the config")
    if re.fullmatch(r"[0-9]{1,9}", part) is None or int(part) >= len(table):
        last = len(table) - 1
        numbers = {0: ": 0", 1: ": 0 and 1"}.get(last, f": 0 to {last}" if table else "")
        entries = "entry" if len(table) == 1 else "entries"
        raise MtopdError(
            f"override {override!r}: {here} has {len(table)} {entries}{numbers}; {part!r} is none "
            "of them"
        )
    return int(part)


def _explain(error: Any, kind: type[BaseModel]) -> str:
    where = ".".join(str(p) for p in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _known_keys(kind, error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = (
            f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(sorted(known))}"
        )
        return f"unknown key {where!r} ({hint})"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{where} is missing"
    if error["type"] == "value_error":
        return f"{where}: {message}" if where else message
    if error["type"] in ("model_type", "dict_type"):
        message = "it must be a table of settings; leave it out for the defaults"
    found = reprlib.repr(error["input"])
    if "://" in found:  # of a URL, which may carry a password, only the kind is told
        found = type(error["input"]).__name__
    return f"{where} is {found}: {message}"


def _known_keys(kind: Any, path: Sequence[Any]) -> list[str]:
    for part in path:
        if isinstance(part, int):
            continue
        annotation = kind.model_fields[part].annotation
        kind = next(iter(_models_in(annotation)))
    return list(kind.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for inner in getattr(annotation, "__args__", ()) for m in _models_in(inner)]


def resolved(config: BaseModel) -> dict[str, Any]:
    """Plain values of a config, as JSON and YAML take them."""
    values = config.model_dump(mode="json")
    assert isinstance(values, dict)
    return values


def to_yaml(config: BaseModel) -> str:
    return dump_yaml(resolved(config))
