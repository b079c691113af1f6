"""Proof of the right teacher: once in every start, before any of its rows are kept, it must predict
what it did before.

The reference was made when the teacher was added, by transformers' own code.  A store without one
is probed against itself: the first pass of a run notes what the teacher predicts, later starts
compare; the report says ``self``.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mtopd.dtypes import torch_dtype
from mtopd.files import read_json, write_json
from mtopd.teacher_offload.head_scores import log_probs, noise_floor
from mtopd.teacher_offload.probe import check_probe
from mtopd.teacher_offload.store import TeacherStore
from mtopd.teacher_offload.teachers import Teachers

# Tokens of a probe without a reference; each position's targets are its neighbours in the
# vocabulary.
_NUM_TOKENS = 16


class TeacherProbes:
    """The teachers that this start has proved to be the right ones, and what rounding their states
    costs: nats, kept in the run directory, since a start that finds its cache sealed probes none.
    """

    def __init__(self, run_dir: Path, teachers: Teachers) -> None:
        self.teachers = teachers
        self.proved: set[int] = set()
        self._run_dir = run_dir
        paths = {index: self.noise_floor_path(index) for index in range(len(teachers.stores))}
        self.noise_floors: dict[int, float] = {
            index: float(read_json(path)["nats"]) for index, path in paths.items() if path.exists()
        }

    def noise_floor_path(self, index: int) -> Path:
        name = f"{self.teachers.stores[index].fingerprint}.{self.teachers.hidden_dtype(index)}.json"
        return self._run_dir / "noise_floors" / name

    def reference_path(self, index: int) -> Path:
        """Of a store without a probe of its own."""
        return self._run_dir / "probes" / f"{self.teachers.stores[index].fingerprint}.json"

    def probe(self, index: int) -> Probe | None:
        """The probe of a teacher; None where this start has proved it already.  Collective."""
        return None if index in self.proved else Probe(self, index)


class Probe:
    """The probe of one teacher in one pass."""

    def __init__(self, probes: TeacherProbes, index: int) -> None:
        self._proofs = probes
        self._index = index
        self._store = probes.teachers.stores[index]
        self._reference = _find_reference(self._store, probes.reference_path(index))
        self.input_ids: list[int] = self._reference["input_ids"]
        # What the pass reports: who made the reference, and differences in nats
        self.report: dict[str, Any] = {}

    def check(self, rows_TE: torch.Tensor) -> None:
        """``rows_TE``: last hidden states of ``input_ids`` on every rank.  Raises MtopdError when
        they are another teacher's.  Collective over the job.
        """
        probes, store, reference = self._proofs, self._store, self._reference
        found = log_probs(store, rows_TE, np.asarray(reference["targets"]))
        if reference["log_probs"] is None:
            reference["log_probs"] = found.tolist()
        difference = check_probe(
            reference,
            found,
            name=store.name,
            vocab_size=store.vocab_size,
            dtype=store.dtype,
        )
        hidden_dtype = torch_dtype(probes.teachers.hidden_dtype(self._index))
        cached_TE = rows_TE.to(hidden_dtype).to(rows_TE.dtype)
        floor = 0.0
        if not torch.equal(cached_TE, rows_TE):
            floor = noise_floor(store, rows_TE, cached_TE)
        if dist.get_rank() == 0:
            if reference["by"] == "self" and not probes.reference_path(self._index).exists():
                _write_values(probes.reference_path(self._index), reference)
            _write_values(probes.noise_floor_path(self._index), {"nats": floor})
        probes.noise_floors[self._index] = floor
        probes.proved.add(self._index)
        self.report = {
            "probe": reference["by"],
            "probe_difference": difference,
            "kl_noise_floor": floor,
        }


def _find_reference(store: TeacherStore, path: Path) -> dict[str, Any]:
    stored = store.manifest.get("probe")
    if stored is not None:
        return dict(stored)
    # rank 0 looks for all: another host may not see the file yet
    found = [read_json(path) if dist.get_rank() == 0 and path.exists() else None]
    dist.broadcast_object_list(found, src=0)
    if found[0] is not None:
        return dict(found[0])
    vocab_size = store.vocab_size
    ids = random.Random(store.fingerprint).choices(range(vocab_size), k=_NUM_TOKENS)
    targets = [[(i + k) % vocab_size for k in range(4)] for i in ids]
    return {"by": "self", "input_ids": ids, "targets": targets, "log_probs": None}


def _write_values(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    write_json(path, values)
