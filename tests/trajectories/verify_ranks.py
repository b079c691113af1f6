"""Worker of test_read: four ranks on two nodes, of which one each compares shards with their seals."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from mtopd.config import ParallelConfig
from mtopd.megatron import parallel
from mtopd.progress import quiet_libraries
from mtopd.trajectories import verify_shards
from mtopd.types import MtopdError


def main() -> None:
    quiet_libraries()
    ranks = parallel.initialize(ParallelConfig(dp=4), seed=0)
    assert ranks.local_rank == ranks.rank, "torchrun's, on one node"
    ranks = dataclasses.replace(ranks, local_rank=ranks.rank % 2)
    num_reads = 0

    def sound() -> None:
        nonlocal num_reads
        num_reads += 1

    def damaged() -> None:
        sound()
        if ranks.rank == 2:  # the other node sees sound files
            verify_shards(Path(sys.argv[1]))

    result: dict[str, object] = {"rank": ranks.rank}
    for check in (sound, damaged):
        try:
            parallel.check_once_per_node(ranks, check)
            result[check.__name__] = None
        except MtopdError as error:
            result[check.__name__] = str(error)
    print(json.dumps({**result, "num_reads": num_reads}) + "\n", end="", flush=True)


if __name__ == "__main__":
    main()
