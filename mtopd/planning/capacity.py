"""What a rank of a run holds in memory, in bytes, from the numbers of a model and a layout.

Strategy:

1. Count the parameters of each pipeline stage on one rank (``stage_params``): exact, the same number
   that Megatron's own modules have.  The rank that holds most is the one that is told.
2. Price what is kept for each parameter: weights, gradients, optimizer state, and what a checkpoint
   copies beside them (measured).
3. Price what is not of a parameter: the embedded engine's whole model (weights
   come into it in buckets), kept shares of teachers, the
   activations of the micro-batches in flight (estimated).

Promises:

- Parameters are exact for every supported family and layout that divides the model evenly.
- Weights, gradients and optimizer state follow from them without a constant of their own.
- Activations and the checkpoint's copy are estimates.  The parts do not all peak at once: the total
  was 1.2 to 1.4 times the measured peak of CPU ranks (21 M parameters; float32 and bfloat16, dp 1
  and 2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from mtopd.planning.layouts import Layout

# Bytes a parameter of the rank that gathering and copying the optimizer's state takes at the peak
# of a checkpoint; measured: 36 at dp 1, 27 to 32 at dp 4.
_CHECKPOINT_BYTES = 36
_CHECKPOINT_BYTES_DP = 32
# What a rank holds before it holds a model: torch, Megatron, transformers.
_LIBRARY_BYTES = 600 << 20


@dataclass(frozen=True)
class ModelSizes:
    """Numbers of a model from which its parameters follow.  FFNs are gated: three matrices."""

    num_layers: int
    num_dense_layers: int  # the first layers, which have no experts
    hidden_size: int
    vocab_size: int
    has_tied_embeddings: bool
    split_attention_params: int  # of a layer: what tp splits
    common_attention_params: int  # of a layer: what every tp rank holds
    dense_ffn_size: int
    num_experts: int
    expert_ffn_size: int
    shared_ffn_size: int
    active_ffn_size: int  # what one token goes through, routed experts and shared ones
    attention_size: int  # query heads x head width
    key_value_size: int  # key-value heads x head width
    num_attention_heads: int

    def layer_params(self, layer: int, layout: Layout) -> int:
        """Parameters of a layer on one rank."""
        attention = self.split_attention_params // layout.tp + self.common_attention_params
        norms = 2 * self.hidden_size
        if layer < self.num_dense_layers:
            return attention + norms + self._ffn(self.dense_ffn_size // layout.tp)
        experts = self.num_experts // layout.ep * self._ffn(self.expert_ffn_size // layout.etp)
        router = self.num_experts * self.hidden_size
        return attention + norms + router + experts + self._ffn(self.shared_ffn_size // layout.tp)

    def _ffn(self, columns: int) -> int:
        return 3 * self.hidden_size * columns

    @property
    def num_params(self) -> int:
        """Of the whole model, as a checkpoint has it."""
        matrices = 1 if self.has_tied_embeddings else 2
        ends = matrices * self.vocab_size * self.hidden_size + self.hidden_size
        return ends + sum(self.layer_params(i, Layout()) for i in range(self.num_layers))


def in_binary_units(sizes: Iterable[int], *, of: int = 0) -> tuple[list[str], str]:
    """Numbers of one unit, MiB or GiB by the largest (or ``of`` a larger one, whose table they
    stand in: then all with one decimal), and the unit.
    """
    sizes = list(sizes)
    unit, name = (1 << 30, "GiB") if max([of, *sizes]) >= 1 << 30 else (1 << 20, "MiB")
    return [f"{size / unit:.{2 if unit > size and not of else 1}f}" for size in sizes], name


@dataclass(frozen=True)
class Capacity:
    """Bytes on the rank that holds most.  ``device`` is where the model is trained, ``host`` the
    rank's share of its machine's memory; a CPU rank has all in ``host``.
    """

    params: int
    weights: int
    gradients: int
    optimizer: int
    engine: int
    activations: int
    kept_teachers: int
    checkpoint_copy: int
    libraries: int = _LIBRARY_BYTES

    @property
    def device(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.engine + self.activations

    @property
    def host(self) -> int:
        return self.kept_teachers + self.checkpoint_copy + self.libraries

    @property
    def parts(self) -> dict[str, int]:
        """What is held, by the words it is reported under."""
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "engine": self.engine,
            "activations": self.activations,
            "kept teachers": self.kept_teachers,
            "checkpoint copy": self.checkpoint_copy,
            "libraries": self.libraries,
        }

    @property
    def total(self) -> int:
        return self.device + self.host

    def __str__(self) -> str:
        (total, *numbers), unit = in_binary_units([self.total, *self.parts.values()])
        held = ", ".join(f"{what} {n}" for what, n in zip(self.parts, numbers, strict=True))
        return f"{total} {unit}: {held}"


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Rows of the embedding in Megatron: a multiple of 128, and of 8 on every tp rank.

    Megatron's own rule, 128 on every rank, would leave whole ranks of a small vocabulary with
    nothing but padding.
    """
    multiple = math.lcm(128, 8 * tp)
    return -(-vocab_size // multiple) * multiple


def stage_params(sizes: ModelSizes, layout: Layout) -> list[int]:
    """Parameters of each pipeline stage on one rank; layers in equal numbers.  A tied embedding
    stands on the first stage and on the last.
    """
    each = sizes.num_layers // (layout.pp * layout.vpp)
    stages = [0] * layout.pp
    for layer in range(sizes.num_layers):
        # Interleaved, a rank holds every pp-th run of layers.
        stages[layer // each % layout.pp] += sizes.layer_params(layer, layout)
    matrix = padded_vocab_size(sizes.vocab_size, layout.tp) // layout.tp * sizes.hidden_size
    stages[0] += matrix
    stages[-1] += sizes.hidden_size
    if layout.pp > 1 or not sizes.has_tied_embeddings:
        stages[-1] += matrix
    return stages


def activation_bytes(
    sizes: ModelSizes, layout: Layout, *, tokens: int, dtype_bytes: int, recomputes: bool = False
) -> int:
    """Estimate of what backward waits for: of all micro-batches that are in flight on the first stage,
    and of the last stage's hidden states and their gradient in float32.  ``tokens`` of a
    micro-batch on one cp rank.
    """
    width = sizes.hidden_size
    attention = 2 * sizes.attention_size + 2 * sizes.key_value_size
    split = attention + 3 * max(sizes.active_ffn_size, sizes.dense_ffn_size)
    # Norms' inputs and outputs, the projections' outputs, both residuals.
    per_layer = width if recomputes else 6 * width + split / layout.tp
    if recomputes:  # one layer is there whole while it is computed again
        extra = 6 * width + split / layout.tp
    else:
        extra = 0.0
    layers = sizes.num_layers // layout.pp
    in_flight = layout.pp
    return round(tokens * (dtype_bytes * (in_flight * layers * per_layer + extra) + 8 * width))


def rank_capacity(
    sizes: ModelSizes,
    layout: Layout,
    *,
    dtype_bytes: int,
    micro_batch_tokens: int,
    distributed_optimizer: bool = False,
    recomputes: bool = False,
    kept_teachers: int = 0,
    embedded_engine: bool = True,
) -> Capacity:
    """What the rank that holds most holds.

    ``kept_teachers``: bytes of teachers' shares that are read ahead and kept, the host budget or
    all there is.
    """
    params = max(stage_params(sizes, layout))
    # 16-bit weights have float32 copies in the optimizer; Adam's two moments are float32 always.
    state = (8 if dtype_bytes == 4 else 12) * params
    return Capacity(
        params=params,
        weights=dtype_bytes * params,
        gradients=4 * params,  # summed in float32 whatever the weights are
        optimizer=state // (layout.dp * layout.cp) if distributed_optimizer else state,
        engine=dtype_bytes * sizes.num_params if embedded_engine else 0,
        activations=activation_bytes(
            sizes,
            layout,
            tokens=micro_batch_tokens,
            dtype_bytes=dtype_bytes,
            recomputes=recomputes,
        ),
        kept_teachers=kept_teachers,
        checkpoint_copy=(_CHECKPOINT_BYTES if layout.dp == 1 else _CHECKPOINT_BYTES_DP) * params,
    )
