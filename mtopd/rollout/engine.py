"""What a rollout engine is asked, whoever answers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class Request:
    """One response to a prompt."""

    prompt_id: str
    prompt_ids: tuple[int, ...]
    sample: int = 0  # which of this prompt's responses

    @property
    def prompt_number(self) -> int:
        return int.from_bytes(hashlib.sha256(self.prompt_id.encode()).digest()[:8], "little")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is drawn from the student's distribution.  Rollouts take it as it is: only its own
    unfiltered tokens are trained on.
    """

    temperature: float = 1.0  # 0: the most likely token
    top_p: float = 1.0  # of the fewest most likely tokens that hold this probability together


UNFILTERED = Sampling()
GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True, slots=True)
class Response:
    """What was sampled."""

    response_ids: tuple[int, ...]  # with the end token, or the stop string's, that ended it
    log_probs: tuple[float, ...]  # of the model's own distribution, whatever the sampling
    finish_reason: str  # "stop" (an end token or a stop string) | "length"


class Engine(Protocol):
    """Answers with the weights it was last given."""

    def update_weights(self, buckets: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Take HF-named tensors, bucket by bucket; a tied output layer may be left out, nothing else
        may.
        """

    def generate(
        self,
        batch: Sequence[Request],
        *,
        max_response: int,
        seed: int = 0,
        iteration: int = 0,
        sampling: Sampling = UNFILTERED,
    ) -> list[Response]:
        """Answer a batch, the unit of replay: the same weights, batch, seed and iteration give the
        same tokens.
        """
