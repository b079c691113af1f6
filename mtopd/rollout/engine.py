"""What a rollout engine is asked, and what it answers: one protocol, whoever samples.

Promises of every engine (``tests/rollout/test_engine_contract.py``):

- A response is sampled by the weights of the last ``update_weights`` that returned, or continues
  what the log holds of it.
- What the log holds of a response is never drawn again: its tokens stay, the rest of its budget is
  drawn behind them.
- The draw of a token follows from (seed, iteration, prompt, sample, position) alone, so it does not
  matter who draws it, when, or after how many deaths.
- A response is handed on only after the log has it for good; each on one rank, once.
- A response of several turns is several requests, each behind all that was said before: an engine
  continues ids within a budget and knows of no conversation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from mtopd.metrics_lines import WeightUpdateLine
from mtopd.rollout.memory_log import MemoryLog, Response


@dataclass(frozen=True, slots=True)
class Request:
    """One response to a prompt, or a later turn of it."""

    sample_id: int  # unique in a log, which knows the response by it
    prompt_id: str
    prompt_ids: Sequence[int] | npt.NDArray[np.int32]  # all that stands before what is drawn
    sample: int = 0  # which of this prompt's responses
    # Tokens of the whole response that ``prompt_ids`` ends with: the next draw is that of this
    # position, and the budget is what they leave of ``max_response``.
    position: int = 0
    iteration: int = 0  # that planned it: the draws stay the same wherever the response ends

    @property
    def prompt_number(self) -> int:
        return int.from_bytes(hashlib.sha256(self.prompt_id.encode()).digest()[:8], "little")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How responses are drawn.  Rollouts take the student's distribution as it is: only its own
    unfiltered tokens are trained on.  Evaluation may be greedy, or keep to a nucleus.
    """

    max_response: int  # tokens
    # An end token or stop string before this many tokens ends nothing: it is a token like any other
    # and no distribution is changed for it.
    min_response: int = 0
    temperature: float = 1.0  # 0: the most likely token
    top_p: float = 1.0  # of the fewest most likely tokens that hold this probability together
    seed: int = 0

    @property
    def is_exact(self) -> bool:
        """Tokens are drawn from the model's own distribution."""
        return self.temperature == 1 and self.top_p == 1

    def budget(self, request: Request) -> int:
        """Tokens that may be drawn for it."""
        return self.max_response - request.position


# Of requests that are answered, on the rank that handed the answers on: those that go on from them.
Follow = Callable[[Sequence[Request]], Sequence[Request]]


def student_version(version: str) -> int:
    """The iteration whose weights ``version``, "<run>/<start>/<iteration>", names: what the spans
    of a trajectory say.
    """
    return int(version.rpartition("/")[2])


class Engine(Protocol):
    """Answers with the weights it was last given.  Every method is called on every rank."""

    kind: str  # as the config names it; responses of one kind are replayed to the same tokens
    version: str | None  # of the weights it answers with; None: it has none
    # Not in these processes: a thread may ask it, while the ranks do something else.
    answers_elsewhere: bool
    update: WeightUpdateLine | None  # what the last update_weights cost, where it is counted

    def taker(self, bucket: int) -> int | None:
        """The rank that needs the student's bucket of this number, from 0; None: all do.  Others may
        be given an empty one.
        """

    def update_weights(self, buckets: Iterable[Mapping[str, torch.Tensor]], version: str) -> None:
        """Take HF-named tensors, bucket by bucket; a tied output layer may be left out, nothing else
        may.  Returns when they are proven to have arrived, or raises MtopdError.  Collective.
        """

    def generate(
        self,
        requests: Sequence[Request],
        log: MemoryLog,
        sampling: Sampling,
        follow: Follow | None = None,
    ) -> Iterator[Response]:
        """Answer the requests, the same on every rank; each response comes out on one rank, as it
        ends.  Ranks do not wait for one another.

        ``follow`` is asked whenever all responses to some requests are out, those that it named
        included; what it names is answered on this rank too.
        """

    def pause(self) -> None:
        """Draw nothing more: a ``generate`` that runs ends at its next step, open responses stay in
        the log.
        """

    def resume(self) -> None:
        """A ``generate`` after this goes on with what the log holds."""

    def release(self) -> None:
        """Give the memory of this process back; the next ``update_weights`` takes it again."""

    def close(self) -> None:
        """Give everything back."""
