"""YAML as settings need it: plain values, each key once, numbers that mean what they look like.

Refused with the line it stands in: a key twice (a key that replaces one of a merged table is none),
tags, keys that are no words, what reads in two ways (012, 1:30; yes, no, on, off, which are words to
many readers), numbers that are not finite, aliases that hold themselves or expand without bound.
Dates stay text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from yaml import ScalarNode
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.reader import ReaderError

from mtopd.types import MtopdError

_MAX_BYTES = 1 << 20
_MAX_DEPTH = 50
_MAX_VALUES = 100_000  # with every alias written out
_MAX_DIGITS = 40


def read_yaml(path: Path) -> Any:
    """The values of a file.  Raises MtopdError that names file and line."""
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise MtopdError(f"cannot read config {path}: {error.strerror}") from None
    if len(data) > _MAX_BYTES:
        raise MtopdError(
            f"config {path} is larger than {_MAX_BYTES:,} bytes: is it the right file?"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise MtopdError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> Any:
    """The values of a text; ``where`` it stands is named in the MtopdError for what is wrong."""
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f"character {error.character!r} is not allowed"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else 1
        problem = f"{error.context or ''} {error.problem or ''}"
    except (ValueError, ArithmeticError, LookupError, RecursionError) as error:
        # of escapes and numbers that Python cannot hold
        line = loader.line + 1 if loader is not None else 1
        problem = str(error)
    raise MtopdError(f"{where}, line {line}: not valid YAML: {' '.join(problem.split())}")


def dump_yaml(values: Any) -> str:
    """Text that ``parse_yaml`` reads as ``values``."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        # How many values each node holds, aliases written out.  Nodes live as long as the loader.
        self._num_values: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()
        is_alias = isinstance(event, yaml.AliasEvent)
        if getattr(event, "tag", None) is not None:
            raise ComposerError(
                None, None, f"tag {event.tag!r} is not read; write plain values", event.start_mark
            )
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise ComposerError(None, None, "nested too deeply", event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None or (is_alias and node in self._num_values):
            return node
        if is_alias:
            raise ComposerError(
                None, None, f"*{event.anchor} stands inside what it names", event.start_mark
            )
        if isinstance(node, yaml.MappingNode):
            self._check_keys(node)
        inner = [] if isinstance(node, ScalarNode) else [*_inner(node)]
        self._num_values[node] = 1 + sum(self._num_values[n] for n in inner)
        if self._num_values[node] > _MAX_VALUES:
            raise ComposerError(
                None, None, f"aliases expand to more than {_MAX_VALUES:,} values", event.start_mark
            )
        return node

    def _check_keys(self, table: yaml.MappingNode) -> None:
        first: dict[Any, yaml.Mark] = {}
        for node, _ in table.value:
            if not isinstance(node, ScalarNode):
                raise ComposerError(
                    None, None, "a key must be a word, not a list or a table", node.start_mark
                )
            key = "<<" if node.tag == _MERGE else self.construct_object(node)
            if key in first:
                said = f"key {node.value!r} stands twice, first in line {first[key].line + 1}"
                raise ComposerError(None, None, said, node.start_mark)
            first[key] = node.start_mark

    def construct_yaml_int(self, node: ScalarNode) -> int:
        text = self.construct_scalar(node)
        if re.fullmatch(r"[-+]?0[0-9_]+|.*:.*", text):
            said = f"{text} reads in two ways; write a plain number, or quote it"
            raise ConstructorError(None, None, said, node.start_mark)
        if len(text) > _MAX_DIGITS:
            raise ConstructorError(None, None, "a number is too large", node.start_mark)
        return super().construct_yaml_int(node)

    def construct_yaml_bool(self, node: ScalarNode) -> bool:
        text = self.construct_scalar(node)
        if text.lower() not in ("true", "false"):
            said = f"{text} reads in two ways; write true or false, or quote it"
            raise ConstructorError(None, None, said, node.start_mark)
        return super().construct_yaml_bool(node)

    def construct_yaml_float(self, node: ScalarNode) -> float:
        text = self.construct_scalar(node)
        value = super().construct_yaml_float(node)
        if ":" in text or value - value != 0:
            said = f"{text} is no finite number; write one, or quote it"
            raise ConstructorError(None, None, said, node.start_mark)
        return value

    def construct_yaml_str(self, node: ScalarNode) -> str:
        text = self.construct_scalar(node)
        if any(0xD800 <= ord(character) < 0xE000 for character in text):
            raise ConstructorError(
                None, None, "half of a character (\\ud800 to \\udfff)", node.start_mark
            )
        return text


def _inner(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [n for pair in node.value for n in pair]
    return list(node.value)


class _Dumper(yaml.SafeDumper):
    pass


_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
for _name in ("bool", "int", "float", "str"):
    _Loader.add_constructor(_TAG + _name, getattr(_Loader, f"construct_yaml_{_name}"))
# Both classes hold the same table: what is text to the one must not be a number to the other.
_Loader.yaml_implicit_resolvers = _Dumper.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag not in (f"{_TAG}timestamp", f"{_TAG}value")]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# 2e-3 is a number, as everybody expects.
_Loader.add_implicit_resolver(
    f"{_TAG}float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)
