"""Two ranks whose collectives may take three seconds; rank 0 decides in six.  Run with torchrun."""

from __future__ import annotations

import datetime
import time

import torch.distributed as dist

from mtopd.config import ParallelConfig
from mtopd.megatron import parallel
from mtopd.megatron.agreement import decide
from mtopd.types import MtopdError


def slowly() -> str:
    time.sleep(6)
    return "found"


def badly() -> str:
    time.sleep(6)
    raise MtopdError("no such file")


if __name__ == "__main__":
    parallel.COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=3)
    ranks = parallel.initialize(ParallelConfig(dp=2), seed=0)
    assert decide(ranks, slowly) == "found"
    try:
        decide(ranks, badly)
    except MtopdError as error:
        assert str(error) == "no such file"
    else:
        raise AssertionError("the error of rank 0 is every rank's")
    assert decide(ranks, lambda: ranks.rank) == 0
    print("decided")
    dist.destroy_process_group()
