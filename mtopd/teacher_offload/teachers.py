"""All teachers of a run on this rank: their stores and meshes, the stream of their layers, the empty
layer modules that streamed weights are bound to, the slot of their heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch

from mtopd.config import CacheConfig, OffloadConfig
from mtopd.megatron.layers import TeacherLayers
from mtopd.megatron.parallel import TeacherMesh
from mtopd.teacher_offload.head_slot import HeadSlot
from mtopd.teacher_offload.layer_stream import TeacherStream
from mtopd.teacher_offload.store import TeacherStore

BuildLayers = Callable[[TeacherStore, TeacherMesh, torch.device], TeacherLayers]


class Teachers:
    """By teacher index.  What is opened lives as long as the start: shares kept in host memory, the
    layer modules of each teacher, the head slot of this rank's vocabulary rows.
    """

    def __init__(
        self,
        stores: Sequence[TeacherStore],
        meshes: Sequence[TeacherMesh],
        device: torch.device,
        *,
        build_layers: BuildLayers,
        offload: OffloadConfig,
        cache: CacheConfig,
        head_rows: range | None,
    ) -> None:
        """``head_rows``: this rank's rows of the vocabulary, None off the student's last stage."""
        self.stores = stores
        self.meshes = meshes
        self._device = device
        self._build_layers = build_layers
        self._offload = offload
        self._cache = cache
        self._head_rows = head_rows
        self._layers: dict[int, TeacherLayers] = {}

    @cached_property
    def stream(self) -> TeacherStream:
        """All teachers, as this rank reads and receives them.  Collective when first asked for."""
        return TeacherStream(
            self.stores,
            self.meshes,
            self._device,
            host_budget=self._offload.host_budget,
            reader_threads=self._offload.reader_threads,
        )

    @cached_property
    def heads(self) -> HeadSlot | None:
        """The head slot of this rank's vocabulary rows; None off the last stage."""
        if self._head_rows is None:
            return None
        return HeadSlot(
            self.stores,
            first_row=self._head_rows.start,
            num_rows=len(self._head_rows),
            device=self._device,
        )

    def layers(self, index: int) -> TeacherLayers:
        """The layer modules of a teacher on its mesh, without weights."""
        if index not in self._layers:
            self._layers[index] = self._build_layers(
                self.stores[index], self.meshes[index], self._device
            )
        return self._layers[index]

    def hidden_dtype(self, index: int) -> str:
        """The dtype of a teacher's cached states."""
        chosen = self._cache.dtype
        return self.stores[index].dtype if chosen == "auto" else chosen

    def close(self) -> None:
        for name in ("stream", "heads"):
            if (opened := self.__dict__.get(name)) is not None:
                opened.close()
