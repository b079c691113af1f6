"""docs/config.md, made of the models: ``python -m mtopd.config_docs > docs/config.md``."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from mtopd.config import ConsolidateConfig
from mtopd.config_specialist import SpecialistConfig
from mtopd.config_values import FieldText, ServerUrl, ShownText, StoreLocation

_HEAD = """# Every key of a config

Made by `python -m mtopd.config_docs`; a test keeps it true.  An unknown key is an error, and so is a
key that stands twice.  `KEY.SUB=VALUE` after the file overrides a key, the value read as YAML; a
number among the keys is a place in a list (`teachers.0.weight=0.5`).  A path is what a shell user
means: `~` and `$NAME` are expanded, a relative one begins at the folder of the command.
"""
_WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text", Path: "path"}
_BOUNDS = {"gt": "above {}", "ge": "at least {}", "lt": "below {}", "le": "at most {}"}
# what the validator in front of a text lets through
_TEXTS = {
    get_args(StoreLocation)[1]: "path or URL",
    get_args(ServerUrl)[1]: "http(s)://host:port",
    get_args(FieldText)[1]: "text, a number, true or false",
    get_args(ShownText)[1]: "text, a whole number, true or false",
}
_LARGEST = 1 << 53  # a bound that says nothing to a reader


def markdown() -> str:
    """The whole page."""
    parts, known = [_HEAD], set[tuple[str, type[BaseModel]]]()
    for verb, root in (("consolidate", ConsolidateConfig), ("specialist", SpecialistConfig)):
        parts.append(f"\n## mtopd {verb}\n")
        for place, model in _tables(root):
            if (place, model) in known:
                parts.append(f"\n### {place}\n\nAs above.\n")
                continue
            known.add((place, model))
            parts.append(f"\n### {place}\n" if place else "")
            parts.append("\n| key | value | default | meaning |\n|---|---|---|---|\n")
            parts += [_row(name, field) for name, field in model.model_fields.items()]
    return "".join(parts)


def _tables(model: type[BaseModel], place: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    yield place, model
    for name, field in model.model_fields.items():
        for inner in _models(field.annotation):
            mark = "[]" if get_origin(field.annotation) is list else ""
            yield from _tables(inner, f"{place}.{name}{mark}".removeprefix("."))


def _models(kind: object) -> Iterator[type[BaseModel]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    for inner in get_args(kind):
        yield from _models(inner)


def _row(name: str, field: FieldInfo) -> str:
    value = _value(field.annotation, field.metadata)
    meaning = " ".join((field.description or "").split())
    cells = (f"`{name}`", value, _default(field), meaning)
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |\n"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "needed"
    if field.default is None:
        return "-"
    if isinstance(field.default, BaseModel):
        return "its own"
    if isinstance(field.default, bool):
        return str(field.default).lower()
    return f"`{field.default}`" if field.default not in ({}, []) else "empty"


def _value(kind: object, metadata: Iterable[object] = ()) -> str:
    """What may stand there, in words."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _value(inner[0], inner[1:])
    if origin in (Union, types.UnionType):
        return " or ".join(_value(i) for i in inner if i is not type(None))
    if origin is Literal:
        return ", ".join(f"`{word}`" for word in inner)
    if origin in (list, dict):
        return f"{'list' if origin is list else 'table'} of {_value(inner[-1])}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "table"
    if not isinstance(kind, type) or kind not in _WORDS:
        return "any value"
    parts = [part for m in metadata for part in getattr(m, "metadata", [m])]
    if texts := [
        _TEXTS[part] for part in parts if isinstance(part, BeforeValidator) and kind is str
    ]:
        return texts[0]
    if any(getattr(part, "pattern", None) for part in parts):
        return "name"
    bounds = [
        words.format(bound)
        for part in parts
        for key, words in _BOUNDS.items()
        if (bound := getattr(part, key, None)) is not None and bound != _LARGEST
    ]
    return " ".join([_WORDS[kind], " and ".join(bounds)]).strip()


if __name__ == "__main__":
    print(markdown(), end="")
