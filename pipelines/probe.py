"""Proof of the right teacher: once in every start, before any of its rows are kept, it must predict
what it did before.

The reference was made when the teacher was added, by transformers' own code.  A store without one
is probed against itself: the first pass of a run notes what the teacher predicts, later starts
compare; the report says ``self``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mtopd.dtypes import item_size, torch_dtype
from mtopd.files import read_json, write_json
from mtopd.teacher_offload.probe import check_probe
from mtopd.teacher_offload.store import TeacherStore, read_range

from .job import Job

# of a probe that we draw ourselves; each position's targets are its neighbours in the vocabulary
_OWN_TOKENS = 16
_CHUNK_BYTES = 16 << 20  # of the head held at a time


class Probe:
    """The probe of one teacher in one pass; nothing to do where this start has probed it already."""

    def __init__(self, job: Job, index: int) -> None:
        self._job, self._index, self._store = job, index, job.stores[index]
        self._path = job.run.path / "probes" / f"{self._store.fingerprint}.json"
        self.report: dict[str, object] = {}
        self.input_ids: list[int] | None = None
        if index not in job.probed:
            self._reference = self._find_reference()
            self.input_ids = self._reference["input_ids"]

    def check(self, rows_TE: torch.Tensor) -> None:
        """``rows_TE``: last hidden states of ``input_ids`` on every rank.  Raises MtopdError when
        they are another teacher's.  Collective over the job.
        """
        store, reference = self._store, self._reference
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
        if reference["by"] == "self" and self._job.ranks.rank == 0 and not self._path.exists():
            self._path.parent.mkdir(exist_ok=True)
            write_json(self._path, reference)
        cached_TE = rows_TE.to(torch_dtype(self._job.cache_dtype(store))).to(rows_TE.dtype)
        floor = 0.0 if torch.equal(cached_TE, rows_TE) else noise_floor(store, rows_TE, cached_TE)
        self._job.keep_noise_floor(self._index, floor)
        self._job.probed.add(self._index)
        self.report = {
            "probe": reference["by"],
            "probe_difference": difference,
            "kl_noise_floor": floor,
        }

    def _find_reference(self) -> dict[str, Any]:
        stored = self._store.manifest.get("probe")
        if stored is not None:
            return dict(stored)
        found = [read_json(self._path) if self._path.exists() else None]
        dist.broadcast_object_list(found, src=0)
        if found[0] is not None:
            return dict(found[0])
        vocab_size = self._store.vocab_size
        ids = random.Random(self._store.fingerprint).choices(range(vocab_size), k=_OWN_TOKENS)
        targets = [[(i + k) % vocab_size for k in range(4)] for i in ids]
        return {"by": "self", "input_ids": ids, "targets": targets, "log_probs": None}


@torch.no_grad()
def log_probs(store: TeacherStore, rows_TE: torch.Tensor, targets_TK: np.ndarray) -> np.ndarray:
    """Log-probabilities [T, K] of the teacher's head on hidden states.  Collective: each rank takes
    its share of the vocabulary, streamed from storage in chunks, so no rank ever holds a head.
    """
    targets = torch.from_numpy(targets_TK).to(rows_TE.device)
    log_sum_T = torch.full(rows_TE.shape[:1], -torch.inf, device=rows_TE.device)
    picked_TK = torch.zeros(targets.shape, device=rows_TE.device)
    for first, last, logits in _logits_by_chunk(store):
        logits_Tv = logits(rows_TE)
        log_sum_T = torch.logaddexp(log_sum_T, logits_Tv.logsumexp(-1))
        held = (targets >= first) & (targets < last)
        picked_TK += torch.where(
            held, logits_Tv.gather(1, (targets - first).clamp(0, last - first - 1)), 0.0
        )
    sums = [torch.empty_like(log_sum_T) for _ in range(dist.get_world_size())]
    dist.all_gather(sums, log_sum_T)
    dist.all_reduce(picked_TK)
    result: np.ndarray = (picked_TK - torch.stack(sums).logsumexp(0)[:, None]).cpu().numpy()
    return result


@torch.no_grad()
def noise_floor(store: TeacherStore, exact_TE: torch.Tensor, cached_TE: torch.Tensor) -> float:
    """Mean KL(p_exact || p_cached) in nats: what rounding the cached states to their dtype does to
    the teacher's distribution.  A reverse KL below ten times this measures the cache.  Collective,
    as ``log_probs``.
    """
    rank_sums = torch.full(
        (2, len(exact_TE)), -torch.inf, dtype=torch.float64, device=exact_TE.device
    )  # log sum exp
    moved_T = torch.zeros(
        len(exact_TE), dtype=torch.float64, device=exact_TE.device
    )  # sum of p_exact x difference
    for _, _, logits in _logits_by_chunk(store):
        exact_Tv, cached_Tv = logits(exact_TE).double(), logits(cached_TE).double()
        sums = torch.logaddexp(
            rank_sums, torch.stack([exact_Tv.logsumexp(-1), cached_Tv.logsumexp(-1)])
        )
        moved_T *= torch.exp(rank_sums[0] - sums[0])
        moved_T += (torch.exp(exact_Tv - sums[0][:, None]) * (exact_Tv - cached_Tv)).sum(-1)
        rank_sums = sums
    of_ranks = [torch.empty_like(rank_sums) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, rank_sums)
    whole = torch.stack(of_ranks).logsumexp(0)
    moved_T *= torch.exp(rank_sums[0] - whole[0])
    dist.all_reduce(moved_T)
    return float((moved_T - (whole[0] - whole[1])).clamp(min=0.0).mean())


def _logits_by_chunk(
    store: TeacherStore,
) -> Iterator[tuple[int, int, Callable[[torch.Tensor], torch.Tensor]]]:
    """This rank's share of the vocabulary, a few rows of the head at a time: (first id, end, states
    -> logits).
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    bounds = [store.vocab_size * r // world_size for r in (rank, rank + 1)]
    row_bytes = store.hidden_size * item_size(store.dtype)
    start = store.head.slices(0, store.slices)[0].start
    head = store.manifest["head"]
    step = max(1, _CHUNK_BYTES // row_bytes)
    for first in range(bounds[0], bounds[1], step):
        last = min(first + step, bounds[1])
        data, _ = read_range(store.head, start + first * row_bytes, start + last * row_bytes)
        weight_vE = (
            torch.from_numpy(data).view(torch_dtype(store.dtype)).view(-1, store.hidden_size)
        )

        def logits(rows_TE: torch.Tensor, weight_vE: torch.Tensor = weight_vE) -> torch.Tensor:
            logits_Tv = float(head["scale"]) * (
                rows_TE.float() @ weight_vE.to(rows_TE.device).float().T
            )
            return (
                head["softcap"] * torch.tanh(logits_Tv / head["softcap"])
                if head["softcap"]
                else logits_Tv
            )

        yield first, last, logits
