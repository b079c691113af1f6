"""What proves that servers hold the weights they were sent: checksums of tensors, and log-probs.

A weight version is a name and proves nothing: an update that lacks a tensor, or has one under a name
that the server does not know, is answered 200 with the new version.  Checksums compare tensors, on a
CPU with those that were sent, elsewhere between servers.  The probe compares what the servers compute
with what the trainer computes: it also sees states of the old weights in a prefix cache.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtopd.files import read_json, write_json
from mtopd.progress import say

_FUSED = {  # as SGLang holds them: the parts' rows, one behind the other
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_PART_OF = {part: whole for whole, parts in _FUSED.items() for part in parts}
_VOCAB_ROWS = 64  # SGLang pads the vocabulary to a multiple of this, with zeros
_DIGITS = 16  # hexadecimal, of sha256 of the raw bytes: a CPU server's checksum
EXACT = 1e-5  # float32 log-probs of trainer and server
ROUNDED = (
    0.1  # bfloat16, where each rounds at other places; weights of another model differ by more
)
_MARGIN, _LEAST = 4.0, 0.01  # of a bound that was measured: times the difference, and at least
_SEQUENCES, _LENGTH = 8, 24


class ProbeBound:
    """How far a server's log-probs may be from the trainer's own.

    In float32 (``path`` None) ``EXACT``, whoever computes.  In bfloat16 it depends on model and kernels:
    until an update is proven anything up to ``ROUNDED`` may be rounding; what that update differed by
    is kept in ``path`` and bounds those behind it, of later starts too.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._measured: float | None = None
        if path is not None and path.is_file():
            self._measured = float(read_json(path)["limit"])

    @property
    def limit(self) -> float:
        """In nats."""
        if self._path is None:
            return EXACT
        return ROUNDED if self._measured is None else self._measured

    @property
    def origin(self) -> str:
        """Of the limit, behind the number in an error."""
        if self._measured is None:
            return ""
        return (
            f" ({_MARGIN:.0f} times the difference of this run's first update; if servers compute "
            f"otherwise than they did then, remove {self._path})"
        )

    def keep(self, difference: float) -> None:
        """An update that differed by this was proven."""
        if self._path is None or self._measured is not None:
            return
        assert difference <= ROUNDED, difference
        self._measured = min(max(_MARGIN * difference, _LEAST), ROUNDED)
        write_json(self._path, {"first_difference": difference, "limit": self._measured})
        say(
            f"log-probs of SGLang servers and trainer differ by up to {difference:.1e}: from now on "
            f"{self._measured:.1e} is allowed ({self._path})"
        )


class SentChecksums:
    """What a server at tp 1 on a CPU must answer after an update, gathered while it is sent.

    Parts of a fused tensor wait for those before them; nothing else is kept.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self._next: dict[str, int] = {}  # of a fused tensor: how many parts it has
        self._early: dict[tuple[str, int], torch.Tensor] = {}
        self._found: dict[str, str] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        *path, kind, last = name.split(".") if name.count(".") > 1 else ("", "", name)
        whole = _PART_OF.get(kind)
        if whole is None or "experts" in path:
            digest = hashlib.sha256(_bytes(tensor))
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                missing = -tensor.shape[0] % _VOCAB_ROWS
                digest.update(bytes(missing * tensor[0].nbytes))
            self._found[name] = digest.hexdigest()[:_DIGITS]
            return
        fused, parts = ".".join([*path, whole, last]), _FUSED[whole]
        # A copy: a view would keep the whole bucket.
        self._early[fused, parts.index(kind)] = tensor.clone()
        digest = self._sums.setdefault(fused, hashlib.sha256())
        while (part := self._early.pop((fused, self._next.get(fused, 0)), None)) is not None:
            digest.update(_bytes(part))
            self._next[fused] = self._next.get(fused, 0) + 1
        if self._next.get(fused) == len(parts):
            self._found[fused] = digest.hexdigest()[:_DIGITS]

    def differences(self, server: Mapping[str, str]) -> list[str]:
        """Names of tensors that the server has with other bytes, was never sent, or does not have.

        Tensors under names that are not known here (experts of a layer in one) are the probe's.
        """
        wrong = [name for name, found in server.items() if self._found.get(name, found) != found]
        wrong += [name for name in self._found if name not in server and "experts" not in name]
        sent_to = {name.rpartition(".")[0] for name in self._found}
        return sorted(
            wrong
            + [
                name
                for name in server
                if name not in self._found
                and name.rpartition(".")[2] in ("weight", "bias")
                and "experts" not in name
                and not (name == "lm_head.weight" and "model.embed_tokens" in sent_to)
            ]
        )


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data


# -- log-probs -------------------------------------------------------------------------------------
def probe_sequences(vocab_size: int, seed: int, longest: int) -> list[list[int]]:
    """Token ids that any student can score: random ones, other ones for another seed.

    The last id is left out: SGLang takes it for padding where it is read.
    """
    draw = random.Random(seed)
    length = max(2, min(_LENGTH, longest))
    return [
        [draw.randrange(max(vocab_size - 1, 1)) for _ in range(length)] for _ in range(_SEQUENCES)
    ]


def probe_body(sequences: Sequence[Sequence[int]], start: int) -> dict[str, Any]:
    """Score, sample nothing: log-probs of the tokens behind ``start``.

    From 0 on, all are computed and the prefix cache is passed by; from a late start on, what the
    cache holds of the beginning is used, as a rollout uses it.
    """
    return {
        "input_ids": [list(sequence) for sequence in sequences],
        "sampling_params": {"temperature": 1.0, "max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": start,
    }


def read_probe(answers: Any, sequences: Sequence[Sequence[int]], start: int) -> list[np.ndarray]:
    """Log-probs of tokens start + 1, ... of each sequence.  Raises ValueError."""
    if not isinstance(answers, list) or len(answers) != len(sequences):
        raise ValueError(f"{type(answers).__name__} for {len(sequences)} sequences")
    found = []
    for answer, sequence in zip(answers, sequences, strict=True):
        triples = answer["meta_info"]["input_token_logprobs"][1:]
        ids = [triple[1] for triple in triples]
        if ids != list(sequence[start + 1 :]):
            raise ValueError(f"log-probs of {len(ids)} other tokens than were asked for")
        found.append(np.array([triple[0] for triple in triples], np.float64))
    return found


def largest_difference(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """Over all tokens; NaN counts as infinite."""
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        difference = np.abs(one - other[len(other) - len(one) :])
        worst = max(worst, float(np.where(np.isnan(difference), np.inf, difference).max()))
    return worst
