"""Forward one teacher over its own trajectories, layer-major: a layer is loaded, all tokens go
through, it goes.

The activations of all waiting batches are bounded by ``activation_budget``.  When they do not fit,
the pass runs in *waves*: each streams the whole teacher once for a part of the batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mtopd.megatron.layers import TeacherLayers
from mtopd.teacher_offload.layer_stream import StreamCounters, TeacherStream
from mtopd.types import MtopdError


@dataclass(frozen=True)
class TeacherSample:
    """Tokens the teacher reads: prompt and response less the last token.  ``rows``: positions whose
    state is kept.
    """

    key: Any  # handed back with the states
    input_ids: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True)
class Wave:
    """Batches of sample indices of one replica.  ``num_batches``: what every replica runs, with
    empty ones if need be.

    Experts of all ranks take part in every batch: a rank that ran fewer would leave the others
    waiting.
    """

    batches: list[list[int]]
    num_batches: int


@dataclass(frozen=True)
class PassResult:
    waves: list[StreamCounters]
    tokens: int  # of this replica


def plan_pass(
    lengths: Sequence[int],
    num_replicas: int,
    *,
    batch_tokens: int,
    token_bytes: int,
    activation_budget: int,
    wanted: Set[int] | None = None,
) -> list[list[Wave]]:
    """Which replica runs which samples, in which batches and waves: ``result[replica]``.  Pure.

    ``wanted``: the samples whose states are asked for, None for all; the others may run beside
    them.  The last bits of a state depend on how long and how many its neighbours in the batch are
    and, where experts are shared, on the batches of the other replicas at its side.  So what a
    killed pass lacks is run in the batches of the whole pass.

    Promises:

    - Every sample is in one batch of one replica; the k-th batches of all replicas are a round and
      run side by side.
    - Replicas are balanced by tokens: longest first onto the least loaded.
    - A batch holds neighbours in length; its padded tokens stay within ``batch_tokens`` unless it
      is a single sample.
    - A round without a wanted sample is left out; all others are the same for any ``wanted``.
    - The padded tokens of a wave's batches, times ``token_bytes``, stay within
      ``activation_budget``.
    - A wave ends after the same round on all replicas, and only where the next would exceed the
      budget of one.

    Raises MtopdError when one sample alone exceeds the budget.
    """
    if lengths and max(lengths) * token_bytes > activation_budget:
        raise MtopdError(
            f"teacher_offload.activation_budget is {activation_budget} bytes, but one sample of "
            f"{max(lengths)} tokens "
            f"takes {max(lengths) * token_bytes}; raise it to at least that"
        )
    wave_tokens = activation_budget // token_bytes
    parts = [
        _length_sorted_batches(part, lengths, min(batch_tokens, wave_tokens))
        for part in _split_over_replicas(lengths, num_replicas)
    ]
    waves: list[list[tuple[list[int], ...]]] = [[]]  # rounds of each
    held = [0] * num_replicas
    for batches in itertools.zip_longest(*parts, fillvalue=[]):
        if wanted is not None and all(wanted.isdisjoint(batch) for batch in batches):
            continue
        padded = [len(batch) * lengths[batch[0]] if batch else 0 for batch in batches]
        if any(h + p > wave_tokens for h, p in zip(held, padded, strict=True)):
            waves.append([])
            held = [0] * num_replicas
        waves[-1].append(batches)
        held = [h + p for h, p in zip(held, padded, strict=True)]
    # A replica that has run out of batches has none in any later round: its empty ones are the last
    # of a wave.
    return [
        [
            Wave([batches[replica] for batches in wave if batches[replica]], len(wave))
            for wave in waves
        ]
        for replica in range(num_replicas)
    ]


@torch.no_grad()
def run_teacher_pass(
    stream: TeacherStream,
    teacher: int,
    layers: TeacherLayers,
    tp_group: dist.ProcessGroup,
    samples: Mapping[int, TeacherSample],
    waves: Sequence[Wave],
    *,
    keep: Callable[[TeacherSample, torch.Tensor], None],
    probe_ids: Sequence[int] | None = None,
    check: Callable[[torch.Tensor], None] = lambda rows_TE: None,
) -> PassResult:
    """Run ``waves``, this replica's plan (the same on all its tp ranks), and hand the rows of
    samples to ``keep``.

    ``samples``: those that the plan's indices name. Collective over the job: a replica without
    samples still takes part in every layer.  The stream expects this teacher ``len(waves)`` times.
    ``keep(sample, rows_TE)`` gets the hidden states after the final norm, in the order of
    ``sample.rows``.  ``check(rows_TE)`` gets those of ``probe_ids`` first, on every rank.
    """
    done = []
    for wave in waves:
        probed = [probe_ids] if probe_ids is not None else []
        probe_ids = None  # once
        batches = [[samples[i] for i in batch] for batch in wave.batches]
        ids = [np.asarray(p, np.int64)[None] for p in probed] + [_pad(batch) for batch in batches]
        ids += [np.zeros((1, 1), np.int64)] * (wave.num_batches - len(batches))
        with stream.visit(teacher) as weights:
            rows_VE, first_row = weights.embedding()
            hidden = [_embed(ids_BS, rows_VE, first_row, tp_group, stream.device) for ids_BS in ids]
            del rows_VE
            for index, layer_weights in enumerate(weights.layers()):
                layers.bind(index, layer_weights)
                for i, hidden_SBE in enumerate(hidden):
                    hidden[i] = layers.forward_layer(hidden_SBE)
            del layer_weights  # views of a buffer that the next wave allocates anew
            layers.bind_norm(weights.final_norm())
            for _ in probed:
                check(layers.forward_norm(hidden.pop(0))[:, 0])
            for batch in batches:
                normed_SBE = layers.forward_norm(hidden.pop(0))
                for column, sample in enumerate(batch):
                    keep(sample, normed_SBE[torch.from_numpy(sample.rows), column])
            layers.release()
        done.append(weights.counters)
    return PassResult(done, sum(len(s.input_ids) for s in samples.values()))


def _split_over_replicas(lengths: Sequence[int], num_replicas: int) -> list[list[int]]:
    """Indices of samples for each replica: longest first onto the least loaded."""
    loads, parts = [0] * num_replicas, [[] for _ in range(num_replicas)]  # type: tuple[list[int], list[list[int]]]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        replica = min(range(num_replicas), key=lambda r: (loads[r], r))
        loads[replica] += lengths[i]
        parts[replica].append(i)
    return parts


def _length_sorted_batches(
    part: Sequence[int], lengths: Sequence[int], batch_tokens: int
) -> list[list[int]]:
    """Batches of neighbours in length, longest first (as ``part`` is)."""
    batches: list[list[int]] = []
    for i in part:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _pad(batch: Sequence[TeacherSample]) -> np.ndarray:
    """[B, S] right-padded: causal attention never looks at what follows."""
    ids_BS = np.zeros((len(batch), max(len(s.input_ids) for s in batch)), np.int64)
    for row, sample in enumerate(batch):
        ids_BS[row, : len(sample.input_ids)] = sample.input_ids
    return ids_BS


def _embed(
    ids_BS: np.ndarray,
    rows_VE: torch.Tensor,
    first_row: int,
    tp_group: dist.ProcessGroup,
    device: torch.device,
) -> torch.Tensor:
    """[S, B, E]: each tp rank looks up the ids it holds, the others add zero."""
    local_BS = torch.from_numpy(ids_BS).to(device) - first_row
    held_BS = (local_BS >= 0) & (local_BS < rows_VE.shape[0])
    hidden_BSE = rows_VE[local_BS.clamp(0, rows_VE.shape[0] - 1)] * held_BS[..., None]
    dist.all_reduce(hidden_BSE, group=tp_group)
    # A [S, 1, E] that is only contiguous in torch's lenient sense sends linear layers down another,
    # slower path.
    return hidden_BSE.transpose(0, 1).flatten().view(hidden_BSE.shape[1], hidden_BSE.shape[0], -1)
