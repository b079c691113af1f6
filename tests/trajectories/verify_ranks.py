"""Worker of test_read: four ranks on two nodes, of which one each compares shards with their seals;
then ranks that do not see the same.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from mtopd.config import ParallelConfig
from mtopd.megatron import parallel
from mtopd.megatron.agreement import decide, digest_of, gather, see_alike
from mtopd.megatron.devices import Sight, agree_on_devices
from mtopd.progress import quiet_libraries
from mtopd.trajectories import TokenStore, verify_shards
from mtopd.types import MtopdError


def main() -> None:
    quiet_libraries()
    ranks = parallel.initialize(ParallelConfig(dp=4), seed=0)
    assert ranks.local_rank == ranks.rank, "torchrun's, on one node"
    ranks = dataclasses.replace(ranks, local_rank=ranks.rank % 2)
    folder, looks = Path(sys.argv[1]), 0

    def verified() -> list[str]:
        nonlocal looks
        if ranks.local_rank == 0:
            looks += 1
            if ranks.rank == 2:  # the other node sees sound files
                verify_shards(folder)
        return [name for name, *_ in TokenStore(folder).seals]

    def described(names: list[str]) -> tuple[bytes, str]:
        return digest_of(names), f"lists {len(names)} shards"

    def listed(*stale: int, until: int = 9) -> Callable[[], list[str]]:
        """A look at two shards, of which the ``stale`` ranks miss one, up to look ``until``."""

        def look() -> list[str]:
            nonlocal looks
            looks += 1
            return ["a"] if ranks.rank in stale and looks < until else ["a", "b"]

        return look

    def vanished() -> list[str]:
        if ranks.rank == 3:
            (folder / "nothing").read_bytes()
        return []

    def refused() -> None:
        raise MtopdError(f"rank {ranks.rank} looked")

    cases: dict[str, Callable[[], object]] = {
        "damaged": lambda: see_alike(ranks, verified, described),
        "alike": lambda: see_alike(ranks, listed(), described),
        "stale": lambda: see_alike(ranks, listed(1), described),
        "stale first": lambda: see_alike(ranks, listed(0), described),
        "late": lambda: see_alike(ranks, listed(1, 3, until=3), described, waits_s=[0.01] * 3),
        "too late": lambda: see_alike(ranks, listed(2), described, waits_s=[0.01] * 2),
        "vanished": lambda: see_alike(ranks, vanished, described, waits_s=[100.0]),
        "gathered": lambda: gather(ranks, lambda: ranks.rank),
        "not gathered": lambda: gather(ranks, vanished),
        "decided": lambda: decide(ranks, lambda: ranks.rank),
        "refused": lambda: decide(ranks, refused),
    }
    rendezvous, _, _ = next(dist.rendezvous("env://"))

    def device(name: str, sight: Sight) -> str:
        store = dist.PrefixStore(name, rendezvous)
        return str(agree_on_devices(store, ranks.rank, ranks.world_size, sight))

    alone = str(ranks.rank)  # a launcher that shows each rank its own GPU
    host = f"node{ranks.rank // 2}"
    cases |= {
        "no GPU": lambda: device("none", Sight(host, ())),
        "two on each host": lambda: device("two", Sight(host, (f"{host}.0", f"{host}.1"))),
        "its own": lambda: device("own", Sight(host, (alone,))),
        "one too few": lambda: device("few", Sight(host, ("0", "1")[: 2 - ranks.rank // 2])),
    }
    result: dict[str, object] = {"rank": ranks.rank}
    for name, case in cases.items():
        looks, collectives = 0, count_collectives()
        try:
            found = case()
        except MtopdError as error:
            found = str(error)
        result[name] = [found, looks, collectives()]
    print(json.dumps(result) + "\n", end="", flush=True)


def count_collectives() -> Callable[[], list[str]]:
    """Names of the collectives called from now on until the result is called."""
    kept = {name: getattr(dist, name) for name in ("all_reduce", "all_gather_object")}
    called = []

    def counting(name: str) -> Callable[..., object]:
        return lambda *args, **options: (called.append(name), kept[name](*args, **options))[1]

    for name in kept:
        setattr(dist, name, counting(name))

    def stop() -> list[str]:
        for name, function in kept.items():
            setattr(dist, name, function)
        return called

    return stop


if __name__ == "__main__":
    main()
