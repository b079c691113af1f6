"""The fused divergence behind Megatron's two mappings, plain tensor and sequence parallel, over
spawned gloo ranks.

The function never reduces the gradient of the hidden states; the mapping in front of it does.
Student and teacher differ, so a rank's part of that gradient is not the whole, and the last rank
holds nothing but padding in one case.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from divergence_cases import Case, dense, make_case, relative_error
from row_cases import SIX


def run_rank(rank: int, world_size: int, store_path: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    from mtopd.megatron import cpu

    cpu.install()

    store = dist.FileStore(store_path, world_size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=120)
    )
    for vocab_size in (None, 40 * (world_size - 1) - 3):
        for name, beta in SIX:
            case = make_case(
                8 * world_size,
                12,
                16,
                40 * world_size,
                distance=2.0,
                divergence=name,
                beta=beta,
                vocab_size=vocab_size,
            )
            for is_sequence_parallel in (False, True):
                check(case, rank, world_size, is_sequence_parallel)
    dist.barrier()
    dist.destroy_process_group()


def check(case: Case, rank: int, world_size: int, is_sequence_parallel: bool) -> None:
    from megatron.core.tensor_parallel.mappings import (
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
    )

    tokens = slice(rank * 8, (rank + 1) * 8) if is_sequence_parallel else slice(None)
    rows = slice(rank * 40, (rank + 1) * 40)
    hidden = case.student_hidden_TD[tokens].clone().requires_grad_()
    weight = case.student_weight_VD[rows].clone().requires_grad_()
    group = dist.group.WORLD
    if is_sequence_parallel:
        mapped = gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=True, group=group
        )
    else:
        mapped = copy_to_tensor_model_parallel_region(hidden, group=group)
    per_token = (case.token_weight_T, case.label_T)
    shard = Case(mapped, weight, case.teacher_hidden_TE, case.teacher_weight_VE[rows], *per_token)
    out = shard.call(mapped, weight, tp_group=group, workspace_bytes=20_000, **case.options)
    out.loss.backward()
    oracle, plain = dense(case), dense(case, torch.float32)
    for name, actual, part in (
        ("loss", out.loss.detach(), ...),
        ("hidden_grad", hidden.grad, tokens),
        ("weight_grad", weight.grad, rows),
    ):
        expected = getattr(oracle, name)[part]
        if not expected.any():  # a shard of padding
            assert not actual.any()
            continue
        bound = 2 * relative_error(getattr(plain, name)[part], expected) + 2e-6
        assert relative_error(actual, expected) <= bound, (name, case.options, is_sequence_parallel)


@pytest.mark.parametrize("world_size", [2, 4])
def test_mappings(world_size: int, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(run_rank, (world_size, str(tmp_path / "store")), nprocs=world_size)
