"""Forward one teacher over its own trajectories, layer-major: a layer is loaded, all tokens go
through, it goes.

Where the activations of all batches do not fit, the plan (`planning.teacher_passes`) has several
*waves*: each streams the whole teacher once for a part of the batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from mtopd.megatron.layers import TeacherLayers
from mtopd.planning import Wave
from mtopd.teacher_offload.layer_stream import StreamCounters, TeacherStream


@dataclass(frozen=True)
class TeacherSample:
    """Tokens the teacher reads: prompt and response less the last token.  ``rows``: positions whose
    state is kept.
    """

    input_ids: np.ndarray
    rows: np.ndarray


class PassProbe(Protocol):
    """What proves that this is the right teacher (`teacher_offload.probe`)."""

    @property
    def input_ids(self) -> Sequence[int]: ...
    def check(self, rows_TE: torch.Tensor) -> None: ...


@dataclass(frozen=True)
class PassResult:
    waves: list[StreamCounters]
    tokens: int  # of this replica


@torch.no_grad()
def run_teacher_pass(
    stream: TeacherStream,
    teacher: int,
    layers: TeacherLayers,
    tp_group: dist.ProcessGroup,
    samples: Mapping[int, TeacherSample],
    waves: Sequence[Wave],
    *,
    keep: Callable[[int, torch.Tensor], None],
    probe: PassProbe | None = None,
) -> PassResult:
    """Run ``waves``, this replica's plan (the same on all its tp ranks), and hand the rows of
    samples to ``keep``.

    ``samples``: those that the plan's indices name. Collective over the job: a replica without
    samples still takes part in every layer.  The stream expects this teacher ``len(waves)`` times.
    ``keep(index, rows_TE)`` gets a sample's hidden states after the final norm, in the order of its
    ``rows``.  ``probe`` gets those of its own tokens first, on every rank.
    """
    done = []
    for wave in waves:
        probes = [probe] if probe is not None else []
        probe = None  # in the first wave only
        ids = [np.asarray(p.input_ids, np.int64)[None] for p in probes]
        ids += [_right_pad([samples[i] for i in batch]) for batch in wave.batches]
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
            for first in probes:
                first.check(layers.forward_norm(hidden.pop(0))[:, 0])
            for batch in wave.batches:
                normed_SBE = layers.forward_norm(hidden.pop(0))
                for column, i in enumerate(batch):
                    keep(i, normed_SBE[torch.from_numpy(samples[i].rows), column])
            layers.release()
        done.append(weights.counters)
    return PassResult(done, sum(len(s.input_ids) for s in samples.values()))


def _right_pad(batch: Sequence[TeacherSample]) -> np.ndarray:
    """[B, S] right-padded: causal attention never looks at what follows.  Of an empty batch a token of
    padding: layers of experts are collective.
    """
    if not batch:
        return np.zeros((1, 1), np.int64)
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
