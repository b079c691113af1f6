"""What config.json of a checkpoint may not say, seen before transformers reads it: of two spellings
that differ it would take one without a word, and another version the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mtopd.dtypes import is_torch_dtype
from mtopd.families import rope_less_theta
from mtopd.hf_fp8 import fp8_of, not_read
from mtopd.types import MtopdError


def check_values(path: Path, values: Mapping[str, Any]) -> None:
    """Raise MtopdError for a config.json of weights quantised in a way that is not read, and for one
    that says a thing twice, and differently.  ``values``: what it holds, of a ``model_type`` that
    transformers knows.
    """
    for name in ("compression_config", "quantization"):
        if values.get(name) is not None:
            raise not_read(path, name, f"{name} tells of them")
    for name in ("dtype", "torch_dtype"):
        if isinstance(said := values.get(name), str) and not is_torch_dtype(said):
            raise MtopdError(
                f"{path} has {name} {said[:40]!r}; it is the name of a dtype of torch, such as bfloat16, or "
                "left out"
            )
    fp8_of(path, values)
    for first, second in _contradictions(values):
        raise MtopdError(
            f"{path} says {first}, but {second}: which of them counts depends on who reads it; leave the "
            "wrong one out"
        )


def renamed(model_type: object) -> Mapping[str, str]:
    """Fields that transformers 5 saves under another name, by the former one."""
    from transformers import CONFIG_MAPPING

    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return {}
    found: Mapping[str, str] = CONFIG_MAPPING[model_type].attribute_map
    return found


def _contradictions(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Pairs of what is said twice, and differently."""
    spellings = [{former, name} for former, name in renamed(values.get("model_type")).items()]
    given = [{name: values[name] for name in names & values.keys()} for names in spellings]
    rope, scaling = _table(values, "rope_parameters"), _table(values, "rope_scaling")
    thetas = {
        "rope_theta": values.get("rope_theta"),
        "rope_scaling.rope_theta": scaling.get("rope_theta"),
        "rope_parameters.rope_theta": rope.get("rope_theta"),
    }
    given.append({name: value for name, value in thetas.items() if value is not None})
    if rope and scaling:
        old, new = rope_less_theta(scaling), rope_less_theta(rope)
        given += [
            {f"rope_scaling.{key}": old.get(key), f"rope_parameters.{key}": new.get(key)}
            for key in sorted(old.keys() | new.keys())
        ]
    for said in given:
        for (name, value), (other, another) in itertools.combinations(sorted(said.items()), 2):
            if value != another:
                yield f"{name} {value!r:.60}", f"{other} {another!r:.60}"


def _table(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name)
    return found if isinstance(found, dict) else {}
