"""What a run is made of beside its teachers, by content: the student's checkpoint, its tokenizer,
the prompts.  A later start compares; where a file lies does not matter.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from mtopd.config import StudentConfig
from mtopd.config_data import SourceConfig
from mtopd.content import ContentNotes
from mtopd.data import source_identity
from mtopd.hf_checkpoint import HFTensors
from mtopd.manifest import TOKENIZER, Inputs
from mtopd.user_cache import note_path

# Whatever transformers may read of a tokenizer
_TOKENIZER_FILES = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
)


def inputs_of(
    student: StudentConfig, sources: list[SourceConfig], say: Callable[[str], None]
) -> Inputs:
    """Path and sha256 of each input, by what it is to the run.  Large files are read once: what is
    known of them is kept between starts, and between runs.
    """
    notes, folder = ContentNotes(note_path("contents")), student.model
    weights = [path.name for path in HFTensors(folder).files()]
    parts = {"student": ["config.json", *weights], TOKENIZER: _tokenizer_files(folder)}
    found = {
        f"{what} {name}": {"path": str(folder / name), "sha256": file.sha256}
        for what, names in parts.items()
        for name, file in notes.content_of(folder, names, say=say).items()
    }
    with contextlib.suppress(OSError):  # notes only save time
        notes.save()
    for source in sources:
        identity = source_identity(source)
        if source.reasoning_gym is None:
            for key, digest in identity.items():
                path = str(getattr(source, key))
                found[f"{key} of source {source.name}"] = {"path": path, "sha256": digest}
        else:
            text = json.dumps(identity, sort_keys=True)
            found[f"prompts of source {source.name}"] = {
                "path": f"reasoning-gym {identity['version']}, {source.reasoning_gym}",
                "sha256": hashlib.sha256(text.encode()).hexdigest(),
            }
    return found


def _tokenizer_files(folder: Path) -> list[str]:
    found = {path for form in _TOKENIZER_FILES for path in folder.glob(form) if path.is_file()}
    return sorted(str(path.relative_to(folder)) for path in found)
