"""The files of a user's tokenizer, looked at before a library reads them: a library's error does not
name the file, and some classes make up a vocabulary of four tokens where theirs is missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mtopd.files import LFS_POINTER
from mtopd.types import MtopdError

CONFIG = "tokenizer_config.json"
# Any of these holds a vocabulary; which of them a class reads is transformers' affair.
_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.*.json",  # of one version of transformers each
    "vocab.json",
    "vocab.txt",
    "*.model",  # sentencepiece
    "*.tiktoken",
    "tekken.json",
)
_OBJECTS = (CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "tokenizer.json")
# Text; of bytes in another encoding the library's error names neither file nor place.
_TEXTS = ("*.jinja", "additional_chat_templates/*.jinja", "merges.txt", "vocab.txt")
_ADVICE = "save the model's tokenizer there again"


def vocabularies(folder: Path) -> list[Path]:
    """The files of a folder that hold a tokenizer's vocabulary."""
    return [path for pattern in _VOCABULARIES for path in sorted(folder.glob(pattern))]


def check_tokenizer_files(folder: Path, named: str) -> None:
    """Raise MtopdError for the first file of the folder that cannot be a tokenizer's; ``named`` is
    how the user knows the folder.
    """
    found = vocabularies(folder)
    texts = [path for pattern in _TEXTS for path in sorted(folder.glob(pattern))]
    for path in [*found, *(folder / name for name in _OBJECTS), *texts]:
        if path.exists():
            where = f"{named}/{path.relative_to(folder)}"
            with errors_named(where):
                _check_file(path, where, is_text=path in texts)
    if not found:
        raise MtopdError(
            f"{named} has no tokenizer (no tokenizer.json, nor another file with a vocabulary); save "
            "the model's tokenizer there"
        )


def _check_file(path: Path, named: str, *, is_text: bool) -> None:
    with open(path, "rb") as file:
        start = file.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        raise MtopdError(f"{named} is a git-lfs pointer, not the file; fetch it with git lfs pull")
    if not start and path.suffix != ".jinja":
        raise MtopdError(f"{named} is empty; {_ADVICE}")
    if path.name in _OBJECTS:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise MtopdError(f"{named} holds a {type(value).__name__}, no JSON object; {_ADVICE}")
        if path.name == CONFIG:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
            _refuse_code(value, named)
            _check_templates(value.get("chat_template"), named)
    elif is_text:
        _check_text(path.read_bytes(), named)


def _check_text(data: bytes, named: str) -> None:
    if data.startswith(b"\xef\xbb\xbf"):
        raise MtopdError(
            f"{named} begins with a byte order mark, which would be taken for text; save the file without"
        )
    try:
        data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise MtopdError(
            f"{named} is not UTF-8: byte {error.start} (line {line}) is 0x{data[error.start]:02x}; "
            "save the file as UTF-8"
        ) from None


def _check_templates(templates: object, named: str) -> None:
    """One chat template as text, or several by name."""
    for entry in templates if isinstance(templates, list) else []:
        if not isinstance(entry, dict) or not all(
            isinstance(entry.get(key), str) for key in ("name", "template")
        ):
            raise MtopdError(
                f"{named}: chat_template is a list, and an entry of it lacks name or template; correct it"
            )


def _refuse_code(config: dict[str, Any], named: str) -> None:
    """A class that only code beside the tokenizer defines is not replaced by another."""
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    kind = config.get("tokenizer_class")
    if "auto_map" in config and isinstance(kind, str) and not tokenizer_class_from_name(kind):
        raise MtopdError(
            f"{named} names the class {kind!r}, which code of its own defines (auto_map); no code of "
            "a model is run: save the tokenizer as a class of transformers"
        )


def end_ids_of_configs(folder: Path) -> list[tuple[int, Path]]:
    """``eos_token_id`` of config.json and generation_config.json, an id, a list of ids, or none: each
    id with its file.
    """
    found: list[tuple[int, Path]] = []
    for path in (folder / "config.json", folder / "generation_config.json"):
        if not path.exists():
            continue
        try:
            value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, RecursionError, AttributeError) as error:
            raise MtopdError(f"{path}: no JSON object ({said(error)}); export it again") from None
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(index, int) and not isinstance(index, bool) for index in ids):
            raise MtopdError(
                f"{path}: eos_token_id is {value!r}; it must be a token id or a list of token ids"
            )
        found += [(index, path) for index in ids]
    return found


@contextmanager
def errors_named(named: str) -> Iterator[None]:
    """Whatever a library raises becomes one MtopdError that begins with ``named``.

    tokenizers raises bare Exception; where it panics, a class derived from BaseException alone.
    """
    try:
        yield
    except (MtopdError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise MtopdError(f"{named}: no readable tokenizer ({said(error)}); {_ADVICE}") from error


def said(error: BaseException) -> str:
    """An error of a library on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"
