"""Forward one teacher over its own trajectories, layer-major: a layer is loaded, all tokens go through, it goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mtopd.megatron.layers import TeacherLayers
from mtopd.teacher_offload.layer_stream import LayerStream, StreamCounters


@dataclass(frozen=True)
class TeacherSample:
    """Tokens the teacher reads: prompt and response less the last token.  ``rows``: positions whose state is kept."""

    key: Any  # handed back with the states
    input_ids: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True)
class PassResult:
    counters: StreamCounters
    waves: int
    tokens: int  # of this replica


def split_over_replicas(lengths: Sequence[int], num_replicas: int) -> list[list[int]]:
    """Indices of samples for each replica, balanced by tokens: longest first onto the least loaded.  Pure."""
    loads, parts = [0] * num_replicas, [[] for _ in range(num_replicas)]  # type: tuple[list[int], list[list[int]]]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        replica = min(range(num_replicas), key=lambda r: (loads[r], r))
        loads[replica] += lengths[i]
        parts[replica].append(i)
    return parts


@torch.no_grad()
def run_teacher_pass(
    stream: LayerStream,
    layers: TeacherLayers,
    tp_group: dist.ProcessGroup,
    samples: Sequence[TeacherSample],
    *,
    batch_tokens: int,
    keep: Callable[[TeacherSample, torch.Tensor], None],
) -> PassResult:
    """Run ``samples`` (this replica's own, the same on all its tp ranks) and hand their rows to ``keep``.

    Collective over the job: a replica without samples still takes part in every layer's broadcasts.
    ``keep(sample, rows_TE)`` gets the hidden states after the final norm, in the order of ``sample.rows``.
    """
    batches = _length_sorted_batches(samples, batch_tokens)
    waves = 1  # all activations of a replica wait in memory between layers; more waves come with activation_budget
    rows_VE, first_row = stream.embedding()
    hidden = [_embed(_pad(batch), rows_VE, first_row, tp_group, stream.device) for batch in batches]
    del rows_VE
    for weights in stream.layers():
        layers.bind(weights)
        for i, hidden_SBE in enumerate(hidden):
            hidden[i] = layers.forward_layer(hidden_SBE)
    layers.bind_norm(stream.final_norm())
    for batch, hidden_SBE in zip(batches, hidden, strict=True):
        normed_SBE = layers.forward_norm(hidden_SBE)
        for column, sample in enumerate(batch):
            keep(sample, normed_SBE[torch.from_numpy(sample.rows), column])
    layers.release()
    return PassResult(stream.counters, waves, sum(len(s.input_ids) for s in samples))


def _length_sorted_batches(samples: Sequence[TeacherSample], batch_tokens: int) -> list[list[TeacherSample]]:
    """Batches of neighbours in length whose padded size stays under ``batch_tokens`` (one sample always fits)."""
    batches: list[list[TeacherSample]] = []
    for sample in sorted(samples, key=lambda s: -len(s.input_ids)):
        if batches and (len(batches[-1]) + 1) * len(batches[-1][0].input_ids) <= batch_tokens:
            batches[-1].append(sample)
        else:
            batches.append([sample])
    return batches


def _pad(batch: Sequence[TeacherSample]) -> torch.Tensor:
    """[B, S] right-padded: causal attention never looks at what follows."""
    ids_BS = np.zeros((len(batch), max(len(s.input_ids) for s in batch)), np.int64)
    for row, sample in enumerate(batch):
        ids_BS[row, : len(sample.input_ids)] = sample.input_ids
    return torch.from_numpy(ids_BS)


def _embed(
    ids_BS: torch.Tensor, rows_VE: torch.Tensor, first_row: int, tp_group: dist.ProcessGroup, device: torch.device
) -> torch.Tensor:
    """[S, B, E]: each tp rank looks up the ids it holds, the others add zero."""
    local_BS = ids_BS.to(device) - first_row
    held_BS = (local_BS >= 0) & (local_BS < rows_VE.shape[0])
    hidden_BSE = rows_VE[local_BS.clamp(0, rows_VE.shape[0] - 1)] * held_BS[..., None]
    dist.all_reduce(hidden_BSE, group=tp_group)
    return hidden_BSE.transpose(0, 1).contiguous()
