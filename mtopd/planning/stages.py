"""Price a model and split its layers over the pipeline stages.

Strategy:

1. Count the flops of one token in a layer and in the output layer from the numbers of an
   ``Architecture``; no weight is looked at.
2. Price each stage of a train step: its layers forward and backward, and on the last stage the
   student's and the teacher's output layers for the trained tokens (``price_stages``).
3. If the even split's most expensive stage costs more than 1.1 times the mean, price every split that
   Megatron's options can express (``expressible_splits``).
4. Propose the one whose most expensive stage is cheapest (``propose_split``).

Promises:

- A split puts every layer in one stage, and on each stage at least one in each of its model chunks.
- A proposal is better than the even split, and no split that Megatron can be told is better than
  the proposal.
- Of equally good splits the one with the most even layers is proposed: beside an expensive last
  stage the others can often be cut in many ways.
- Nothing is proposed where the even split is within the limit, or where it is the best.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

MAX_STAGE_IMBALANCE = 1.1


@dataclass(frozen=True)
class SampleCost:
    """What a sample of n tokens costs the model: ``per_token * n + per_pair * n^2``, in any unit."""

    per_token: float = 1.0
    per_pair: float = 0.0

    def __call__(self, num_tokens: int) -> float:
        return self.per_token * num_tokens + self.per_pair * num_tokens**2


@dataclass(frozen=True)
class Architecture:
    """Numbers of a model from which its cost follows; for experts ``ffn_size`` is what one token
    goes through.
    """

    num_layers: int
    hidden_size: int
    ffn_size: int
    attention_size: int  # query heads x head width
    key_value_size: int  # key-value heads x head width
    vocab_size: int

    @property
    def layer_flops(self) -> float:
        """Of one token in one layer, forward, less attention over other tokens."""
        width, attention = self.hidden_size, self.attention_size
        return 2.0 * width * (2 * attention + 2 * self.key_value_size + 3 * self.ffn_size)

    @property
    def head_flops(self) -> float:
        """Of one token in the output layer, forward."""
        return 2.0 * self.hidden_size * self.vocab_size

    @property
    def sample_cost(self) -> SampleCost:
        """Of a sample's forward through all layers; causal attention sees half of the pairs, in two
        products.
        """
        return SampleCost(
            self.num_layers * self.layer_flops, self.num_layers * 2.0 * self.attention_size
        )


@dataclass(frozen=True)
class StageSplit:
    """Layers of each pipeline stage; ``imbalance`` is the price of the most expensive stage over
    the mean.
    """

    layers: tuple[int, ...]
    imbalance: float


def price_stages(
    student: Architecture, layers: Sequence[int], *, teacher_hidden_size: int, loss_share: float
) -> StageSplit:
    """Price the stages of a train step, in flops of a token: layers forward and backward (x 3), and
    on the last stage, for the ``loss_share`` of tokens that are trained, the student's head x 3 and
    the teacher's x 1.  Interleaved, a stage is all chunks of a pipeline rank: in the steady state
    ranks wait for the one with most work.
    """
    prices = [3.0 * count * student.layer_flops for count in layers]
    prices[-1] += loss_share * (
        3.0 * student.head_flops + 2.0 * teacher_hidden_size * student.vocab_size
    )
    return StageSplit(tuple(layers), max(prices) * len(prices) / sum(prices))


def propose_split(
    student: Architecture,
    pp_size: int,
    *,
    vpp_size: int = 1,
    teacher_hidden_size: int,
    loss_share: float,
) -> tuple[StageSplit, StageSplit | None]:
    """(the even split, the proposed one or None)."""
    assert student.num_layers % (pp_size * vpp_size) == 0, (student.num_layers, pp_size, vpp_size)
    price = partial(
        price_stages, student, teacher_hidden_size=teacher_hidden_size, loss_share=loss_share
    )
    even = price([student.num_layers // pp_size] * pp_size)
    if pp_size == 1 or even.imbalance <= MAX_STAGE_IMBALANCE:
        return even, None
    splits = map(price, expressible_splits(student.num_layers, pp_size, vpp_size))
    best = min(splits, key=lambda split: (split.imbalance, sum(count**2 for count in split.layers)))
    return even, best if best.imbalance < even.imbalance else None


def expressible_splits(
    num_layers: int, pp_size: int, vpp_size: int = 1
) -> Iterator[tuple[int, ...]]:
    """All splits over two stages or more that Megatron can be told: any first and last stage, equal
    ones between, all of at least one layer in each model chunk.  ``num_layers`` is a multiple of
    ``vpp_size``.
    """
    between = pp_size - 2
    for each in range(vpp_size, num_layers, vpp_size) if between else [0]:
        ends = num_layers - between * each
        for last in range(vpp_size, ends, vpp_size):
            yield (ends - last, *[each] * between, last)
