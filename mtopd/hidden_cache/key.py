"""The key under which a sample's rows are cached: everything that decides what a teacher computes
for it.
"""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple

from mtopd.hidden_cache.layout import check_hidden_dtype
from mtopd.types import MtopdError

_VERSION = b"mtopd.hidden_cache.key.2"  # rows under keys of another version are computed again
_POSITIONS = "0..len-1"  # the position scheme of every forward pass


class RowKey(NamedTuple):
    """What names a trajectory's rows.  ``key`` alone is not enough: two samples may hold the same
    tokens.
    """

    key: bytes
    sample_id: int
    student_version: int


def sample_key(
    teacher_fingerprint: str, token_hash: str, dtype: str, teacher_prompt_hash: str = ""
) -> bytes:
    """32 bytes that differ when teacher, tokens, split into prompt and response, loss mask,
    positions or dtype do.

    ``token_hash`` is the one in the trajectory's metadata: the tokens themselves are not read.
    ``teacher_prompt_hash`` is empty where the teacher reads the student's own prompt.
    """
    check_hidden_dtype(dtype)
    if not re.fullmatch("[0-9a-f]{64}", token_hash):
        raise MtopdError(f"token_hash is {token_hash!r}; needed is a sha256 as 64 hex digits")
    digest = hashlib.sha256(_VERSION)
    for text in (teacher_fingerprint, token_hash, teacher_prompt_hash, _POSITIONS, dtype):
        field = text.encode()
        digest.update(len(field).to_bytes(8, "little"))  # so that no field runs into the next
        digest.update(field)
    return digest.digest()
