"""The vocabulary split over spawned gloo ranks gives what one rank gives, and every rank gives the
same.

The merge is exact algebra on sums over disjoint columns, so loss and gradients may not depend on
the number of ranks beyond the rounding of another summation order.  Not exercised: NCCL, and the
mapping that sums the hidden gradient.
"""

from pathlib import Path

import pytest
import torch
from divergence_ranks import run_rank


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_tensor_parallel(world_size: int, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(run_rank, (world_size, str(tmp_path / "store")), nprocs=world_size)
