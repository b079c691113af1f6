"""What one value of a config may be, and the model that all tables of a config are.

A path is what a shell user means: ~ and $NAME are expanded, a relative one begins at the current
folder.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from mtopd.types import plain_text

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]

MOST_RANKS = 1 << 20


def _whole(value: object) -> object:
    # 1e4 is a float to YAML and a count to everybody else.
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
# A bound is far above what anybody needs and far below what would hang a start, or fill its memory.
Count = Annotated[Whole, Field(ge=1, le=1 << 53)]  # of bytes, or of what is never counted up to
Items = Annotated[Whole, Field(ge=1, le=1 << 24)]  # that are held one by one: prompts, tokens
Ranks = Annotated[Whole, Field(ge=1, le=MOST_RANKS)]
Turns = Annotated[Whole, Field(ge=1, le=10**9)]  # of a loop: iterations, train steps
Seed = Annotated[Whole, Field(ge=0, lt=1 << 32)]  # a word of the generator that draws tokens


def local_path(value: object) -> Path:
    """The absolute path that a shell user means.  The current folder is that of the start: a run
    keeps what it was, for commands given in other folders.
    """
    if not isinstance(value, str | Path):
        raise ValueError(f"a path is a text, found {type(value).__name__}")
    text = str(value)
    # The message does not repeat the value: a URL may carry a password.
    if "://" in text:
        raise ValueError("a URL is not read here; give a local path")
    if not text or text != text.strip() or not text.isprintable():
        raise ValueError(
            f"path {text!r:.80} is empty, or has spaces around it or characters that do not print"
        )
    expanded = os.path.expanduser(os.path.expandvars(text))
    if unset := re.search(r"\$(\w+|\{[^}]*\})", expanded):
        raise ValueError(f"path {text!r}: the variable {unset[0]} is not set")
    if expanded.startswith("~"):
        raise ValueError(f"path {text!r}: there is no such user")
    absolute = os.path.join(os.getcwd(), expanded)
    short = os.path.normpath(absolute)
    # After a link, .. leads elsewhere than the text says.
    return Path(short if os.path.realpath(short) == os.path.realpath(absolute) else absolute)


def _store_location(value: object) -> str:
    if not (isinstance(value, str) and "://" in value):
        return str(local_path(value))
    # The whole config is kept in the run directory: a URL with a password must not even reach it.
    if any(mark in value for mark in "@?#") or not value.isprintable():
        raise ValueError(
            "a store's URL is scheme://bucket/path alone; credentials come from the environment"
        )
    return value


LocalPath = Annotated[Path, BeforeValidator(local_path)]


def _server_url(value: object) -> str:
    # The message does not repeat the value: it may carry a password.
    refusal = ValueError("a server's URL is http://host:port or https://host:port, and no more")
    if not isinstance(value, str) or not value.isprintable():
        raise refusal
    try:
        parts = urlsplit(value)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise refusal from None
    alone = f"{parts.scheme}://{parts.netloc}"
    if parts.scheme not in ("http", "https") or not host or not port or "@" in alone:
        raise refusal
    if value.rstrip("/") != alone or any(mark.isspace() for mark in alone):
        raise refusal
    return alone


def _field_text(value: Any) -> Any:
    # A prompt's field from a file is text; YAML makes numbers and booleans of what looks like them.
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no value of a field")
    if isinstance(value, bool | int | float):
        return plain_text(value)
    if not isinstance(value, str):
        kind = "empty" if value is None else type(value).__name__
        raise ValueError(f"is {kind}; it must be text, a number, or true or false")
    return value


def _shown_text(value: Any) -> Any:
    if isinstance(value, float) and math.isfinite(value):
        raise ValueError(f"is the number {value}, its text may be another one (2.50); quote it")
    return _field_text(value)


FieldText = Annotated[str, BeforeValidator(_field_text)]
ShownText = Annotated[str, BeforeValidator(_shown_text)]  # that a model reads as it is


# a folder, or a URL: s3://bucket/teachers/code
StoreLocation = Annotated[str, BeforeValidator(_store_location)]
ServerUrl = Annotated[str, BeforeValidator(_server_url)]
# How pydantic tells apart what is given from the word auto; neither is a part of a setting's name.
FORMS = "given", "word"
Servers = Annotated[
    Annotated[list[ServerUrl], Tag(FORMS[0])] | Annotated[Literal["auto"], Tag(FORMS[1])],
    Discriminator(lambda value: FORMS[not isinstance(value, list)]),
]
Slices = Annotated[
    Annotated[Items, Tag(FORMS[0])] | Annotated[Literal["auto"], Tag(FORMS[1])],
    Discriminator(lambda value: FORMS[isinstance(value, str)]),
]


class Model(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,  # docs/config.md is made of them
    )
