"""Which device each rank of a job computes on: a GPU of its own, or all ranks on CPU.

NCCL refuses two ranks on one GPU, and half a job on gloo waits for the other half forever.  So the
ranks compare what they see before a process group exists, and all get one answer: no rank sees a GPU
(there is none, or CUDA_VISIBLE_DEVICES is empty) and the job runs on CPU, or each gets one of its
own, or the start is refused.  Where a launcher shows each rank its own GPU alone (Slurm's
--gpus-per-task), that one is taken.
"""

from __future__ import annotations

import json
import socket
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from mtopd.types import MtopdError


class Sight(NamedTuple):
    """What one rank sees."""

    host: str
    gpus: tuple[str, ...]  # names that no other GPU has, in the order of their indices


class SharedStore(Protocol):
    """What is used here of torch's key-value stores."""

    def set(self, key: str, value: str, /) -> object: ...
    def get(self, key: str, /) -> bytes: ...
    def multi_get(self, keys: list[str], /) -> list[bytes]: ...


def look() -> Sight:
    """What this rank sees."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = (str(torch.cuda.get_device_properties(i).uuid) for i in range(count))
    return Sight(socket.gethostname(), tuple(gpus))


def choose_devices(sights: Sequence[Sight]) -> list[int] | None:
    """The index of each rank's GPU among those it sees; None: all ranks compute on CPU.

    Raises MtopdError that names the host where GPUs are missing.
    """
    if not any(sight.gpus for sight in sights):
        return None
    on_host: dict[str, list[int]] = defaultdict(list)
    for rank, sight in enumerate(sights):
        on_host[sight.host].append(rank)
    chosen = [0] * len(sights)
    for host, ranks in on_host.items():
        taken: set[str] = set()
        for rank in ranks:
            free = [i for i, gpu in enumerate(sights[rank].gpus) if gpu not in taken]
            if not free:
                found = len({gpu for other in ranks for gpu in sights[other].gpus})
                raise MtopdError(_refusal(f"host {host}", found, len(ranks)))
            chosen[rank] = free[0]
            taken.add(sights[rank].gpus[free[0]])
    return chosen


def agree_on_devices(store: SharedStore, rank: int, world_size: int, sight: Sight) -> torch.device:
    """This rank's device, as rank 0 chose it for all.  Every rank calls it, or waits; MtopdError is
    raised on all of them.
    """
    store.set(f"sight/{rank}", json.dumps(sight))
    if rank == 0:
        keys = [f"sight/{other}" for other in range(world_size)]
        sights = [Sight(host, tuple(gpus)) for host, gpus in map(json.loads, store.multi_get(keys))]
        chosen, problem = None, None
        try:
            chosen = choose_devices(sights)
        except MtopdError as error:
            problem = str(error)
        store.set("devices", json.dumps([chosen, problem]))
    indices, refused = json.loads(store.get("devices"))
    if refused is not None:
        raise MtopdError(refused)
    return torch.device("cpu") if indices is None else torch.device("cuda", indices[rank])


def explain(num_gpus: int, num_ranks: int) -> tuple[str, str]:
    """("cuda" | "cpu" | "refused", why) for that many ranks on one host, of which all see the same
    GPUs.
    """
    sight = Sight("here", tuple(map(str, range(num_gpus))))
    try:
        chosen = choose_devices([sight] * num_ranks)
    except MtopdError:
        return "refused", _refusal("this host", num_gpus, num_ranks)
    if chosen is None:
        return "cpu", "no rank sees a GPU: gloo on CPU"
    return "cuda", f"{num_gpus} GPUs, one for each of {num_ranks} ranks"


def check_own_devices(num_ranks: int) -> None:
    """Raise MtopdError where ranks that are started on this host would not find a GPU each."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    decision, why = explain(num_gpus, num_ranks)
    if decision == "refused":
        raise MtopdError(why)


def _refusal(host: str, num_gpus: int, num_ranks: int) -> str:
    return (
        f"{host} has {num_gpus} GPUs for {num_ranks} ranks, and every rank needs one of its own: "
        "start as many ranks as there are GPUs, or hide the GPUs from all ranks with "
        "CUDA_VISIBLE_DEVICES= to run on CPU"
    )
