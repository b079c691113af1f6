"""What a teacher's head makes of hidden states, streamed from storage: no rank ever holds a head.

Each rank takes its share of the vocabulary, a few rows of the head at a time.  Every function is
collective over the job.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist

from mtopd.dtypes import item_size, torch_dtype
from mtopd.teacher_offload.store import TeacherStore, read_range

_CHUNK_BYTES = 16 << 20  # of the head held at a time


@torch.no_grad()
def log_probs(store: TeacherStore, rows_TE: torch.Tensor, targets_TK: np.ndarray) -> np.ndarray:
    """Log-probabilities [T, K] of the teacher's head on hidden states, in nats."""
    targets = torch.from_numpy(targets_TK).to(rows_TE.device)
    log_sum_T = torch.full(rows_TE.shape[:1], -torch.inf, device=rows_TE.device)
    picked_TK = torch.zeros(targets.shape, device=rows_TE.device)
    for first, last, weight_vE in _head_rows(store, rows_TE.device):
        logits_Tv = store.head_transform(rows_TE.float() @ weight_vE.T)
        log_sum_T = torch.logaddexp(log_sum_T, logits_Tv.logsumexp(-1))
        is_held = (targets >= first) & (targets < last)
        local = (targets - first).clamp(0, last - first - 1)
        picked_TK += torch.where(is_held, logits_Tv.gather(1, local), 0.0)
    sums = [torch.empty_like(log_sum_T) for _ in range(dist.get_world_size())]
    dist.all_gather(sums, log_sum_T)
    dist.all_reduce(picked_TK)
    result: np.ndarray = (picked_TK - torch.stack(sums).logsumexp(0)[:, None]).cpu().numpy()
    return result


@torch.no_grad()
def noise_floor(store: TeacherStore, exact_TE: torch.Tensor, cached_TE: torch.Tensor) -> float:
    """Mean KL(p_exact || p_cached) in nats: what rounding the cached states to their dtype does to
    the teacher's distribution.  A reverse KL below ten times this measures the cache.
    """
    device = exact_TE.device
    # log sum exp of both, and the sum of p_exact x difference of logits
    rank_sums = torch.full((2, len(exact_TE)), -torch.inf, dtype=torch.float64, device=device)
    moved_T = torch.zeros(len(exact_TE), dtype=torch.float64, device=device)
    for _, _, weight_vE in _head_rows(store, device):
        exact_Tv, cached_Tv = (
            store.head_transform(rows_TE.float() @ weight_vE.T).double()
            for rows_TE in (exact_TE, cached_TE)
        )
        chunk_sums = torch.stack([exact_Tv.logsumexp(-1), cached_Tv.logsumexp(-1)])
        sums = torch.logaddexp(rank_sums, chunk_sums)
        # Online softmax: what was summed so far moves to the new log-sum-exp.
        moved_T *= torch.exp(rank_sums[0] - sums[0])
        moved_T += (torch.exp(exact_Tv - sums[0][:, None]) * (exact_Tv - cached_Tv)).sum(-1)
        rank_sums = sums
    gathered = [torch.empty_like(rank_sums) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, rank_sums)
    totals = torch.stack(gathered).logsumexp(0)
    moved_T *= torch.exp(rank_sums[0] - totals[0])
    dist.all_reduce(moved_T)
    return float((moved_T - (totals[0] - totals[1])).clamp(min=0.0).mean())


def _head_rows(
    store: TeacherStore, device: torch.device
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """This rank's share of the vocabulary: (first id, end, float32 rows of the head [v, E])."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    begin, end = (store.vocab_size * r // world_size for r in (rank, rank + 1))
    row_bytes = store.hidden_size * item_size(store.dtype)
    start = store.head.slices(0, store.slices)[0].start
    step = max(1, _CHUNK_BYTES // row_bytes)
    for first in range(begin, end, step):
        last = min(first + step, end)
        data, _ = read_range(store.head, start + first * row_bytes, start + last * row_bytes)
        weight_vE = torch.from_numpy(data).view(torch_dtype(store.dtype))
        yield first, last, weight_vE.view(-1, store.hidden_size).to(device).float()
