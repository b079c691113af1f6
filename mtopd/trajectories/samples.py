"""What must hold of every sample of sealed shards, beyond what opening them checks: `mtopd trajectories
verify` looks at all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtopd.trajectories.format import FINISH_REASONS, check_seals
from mtopd.trajectories.read import TokenFields, TokenStore, verify_shards
from mtopd.types import MtopdError


def verify_folder(
    folder: Path,
    *,
    seals: Mapping[str, str] | None,
    iteration: int,
    vocab_size: int | None,
    teacher_vocab_sizes: Sequence[int],
    advance: Callable[[], None] = lambda: None,
) -> int:
    """Read all sealed shards of an iteration; returns how many samples there are.  Raises MtopdError
    that names the first bad file or sample.

    ``seals``: what the folder's own seal says of the shards'; None: it does not.  ``vocab_size``:
    of the student; None: ids are not compared with it.
    """
    if seals is not None:
        check_seals(folder, seals)
    verify_shards(folder)
    store = TokenStore(folder)
    for row in store.metadata.to_batches():
        for values in row.to_pylist():
            fields = store.tokens(values["sample_id"])
            broken = _broken(values, fields, iteration, vocab_size, teacher_vocab_sizes)
            if broken is not None:
                raise MtopdError(
                    f"sample {values['sample_id']} ({values['prompt_id']}) of {folder}: {broken}; "
                    "remove the folder and make the iteration's trajectories again"
                )
            advance()
    return len(store.metadata)


def _broken(
    values: dict[str, Any],
    fields: TokenFields,
    iteration: int,
    vocab_size: int | None,
    teacher_vocab_sizes: Sequence[int],
) -> str | None:
    teacher, reward = values["teacher_index"], values["reward"]
    if not 0 <= teacher < len(teacher_vocab_sizes):
        return f"teacher_index is {teacher}; the run has {len(teacher_vocab_sizes)} teachers"
    if values["finish_reason"] not in FINISH_REASONS:
        return f"finish_reason is {values['finish_reason']!r}"
    if reward is not None and not math.isfinite(reward):
        return f"reward is {reward}"
    log_probs = fields.rollout_log_probs
    if not (np.isfinite(log_probs).all() and (log_probs <= 0).all()):
        return "rollout_log_probs has a value that is not finite, or is above 0"
    ids = [("prompt_ids", fields.prompt_ids, vocab_size)]
    ids += [("response_ids", fields.response_ids, vocab_size)]
    if fields.teacher_prompt_ids is not None:
        sizes = teacher_vocab_sizes[teacher]
        ids += [("teacher_prompt_ids", fields.teacher_prompt_ids, sizes)]
    for name, found, size in ids:
        if found.min() < 0 or (size is not None and found.max() >= size):
            return f"{name} holds {found.min()} to {found.max()}; the vocabulary has {size} ids"
    # Their places, and that the last is student_version, opening has seen.
    versions = [version for _, version in fields.version_spans]
    if min(versions) < 0 or max(versions) > iteration:
        return (
            f"version_spans has students {min(versions)} to {max(versions)}, iteration {iteration} "
            f"has 0..{iteration}"
        )
    return None
