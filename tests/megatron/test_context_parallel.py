"""The positions of context-parallel ranks."""

from __future__ import annotations

import numpy as np
import pytest

from mtopd.megatron.context_parallel import zigzag_chunks


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_zigzag_ranges_tile_the_row_and_cost_every_rank_the_same(cp_size: int) -> None:
    parts = [zigzag_chunks(48, rank, cp_size) for rank in range(cp_size)]
    positions = [np.concatenate([np.arange(48)[chunk] for chunk in part]) for part in parts]
    assert sorted(np.concatenate(positions).tolist()) == list(range(48))
    assert len({int(p.sum()) for p in positions}) == 1  # causal attention of position p costs p + 1
