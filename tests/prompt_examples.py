"""The demo's prompt sources, and files of prompts, for the tests of data and tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

DOMAINS = {
    "rot": ("rotate_matrix", {"min_n": 2, "max_n": 2}),
    "rev": ("spell_backward", {"min_word_len": 3, "max_word_len": 5}),
    "spir": ("spiral_matrix", {"min_n": 2, "max_n": 3}),
}
ROUTES = {domain: {"domain": domain} for domain in DOMAINS}
PAD, EOS, SEP = 0, 1, 2


def write_jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path
