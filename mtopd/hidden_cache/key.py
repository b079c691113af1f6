"""The key under which a sample's rows are cached: everything that decides what a teacher computes
for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mtopd.hidden_cache.layout import check_hidden_dtype
from mtopd.types import MtopdError

_POSITIONS = "0..len-1"  # the position scheme of every forward pass


class Request(NamedTuple):
    """What a trajectory asks the cache for.  The key alone is not enough: two samples may hold the
    same tokens.
    """

    key: bytes
    sample_id: int
    student_version: int


def sample_key(
    teacher_fingerprint: str,
    prompt_ids: Sequence[int] | np.ndarray,
    response_ids: Sequence[int] | np.ndarray,
    loss_mask: Sequence[int] | np.ndarray,
    dtype: str,
) -> bytes:
    """32 bytes that differ when teacher, tokens, split into prompt and response, loss mask,
    positions or dtype do.
    """
    check_hidden_dtype(dtype)
    if len(loss_mask) != len(response_ids):
        raise MtopdError(
            f"loss_mask has {len(loss_mask)} values for {len(response_ids)} response tokens; "
            "needed equal"
        )
    digest = hashlib.sha256(b"mtopd.hidden_cache.key.1")
    texts = [text.encode() for text in (teacher_fingerprint, dtype, _POSITIONS)]
    for field in (*texts, *map(_integer_bytes, (prompt_ids, response_ids, loss_mask))):
        digest.update(len(field).to_bytes(8, "little"))  # so that no field runs into the next
        digest.update(field)
    return digest.digest()


def _integer_bytes(values: Sequence[int] | np.ndarray) -> bytes:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iub"):
        raise MtopdError(
            f"token ids and loss_mask have to be flat lists of integers, found {array.dtype} "
            f"{array.shape}"
        )
    return array.astype("<i8").tobytes()
