"""Which device a rank computes on: all on CPU, each on a GPU of its own, or one line."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.distributed as dist

from mtopd.megatron import devices
from mtopd.megatron.devices import Sight, agree_on_devices, choose_devices, explain
from mtopd.types import MtopdError


def host(name: str, num_gpus: int, num_ranks: int) -> list[Sight]:
    """Ranks of a host that all see the same GPUs."""
    return [Sight(name, tuple(f"{name}/{i}" for i in range(num_gpus)))] * num_ranks


def tasks(name: str, num_tasks: int, gpus_per_task: int = 1) -> list[Sight]:
    """Ranks of a host that see GPUs of their own only, each from index 0 on."""
    return [
        Sight(name, tuple(f"{name}/{rank}/{i}" for i in range(gpus_per_task)))
        for rank in range(num_tasks)
    ]


@pytest.mark.parametrize(
    ("sights", "chosen"),
    [
        (host("a", 0, 4) + host("b", 0, 4), None),
        (host("a", 8, 8) + host("b", 8, 8), [*range(8), *range(8)]),
        (host("a", 4, 2), [0, 1]),
        (tasks("a", 4) + tasks("b", 4), [0] * 8),
        (tasks("a", 2, 2) + host("b", 2, 1), [0, 0, 0]),
        # Hosts in turn, as a launcher may number ranks.
        ([Sight("ab"[rank % 2], ("0", "1")) for rank in range(4)], [0, 0, 1, 1]),
    ],
)
def test_every_rank_has_a_gpu_of_its_own_or_none_has(
    sights: list[Sight], chosen: list[int] | None
) -> None:
    found = choose_devices(sights)
    assert found == chosen
    if found is not None:
        used = [(s.host, s.gpus[i]) for s, i in zip(sights, found, strict=True)]
        assert len(set(used)) == len(sights)


@pytest.mark.parametrize(
    ("sights", "said"),
    [
        (host("a", 8, 8) + host("b", 7, 8), "host b has 7 GPUs for 8 ranks"),
        (host("a", 8, 8) + host("b", 0, 8), "host b has 0 GPUs for 8 ranks"),
        (host("a", 1, 2), "host a has 1 GPUs for 2 ranks"),
        (tasks("a", 3) + host("a", 0, 1), "host a has 3 GPUs for 4 ranks"),
    ],
)
def test_a_mixture_is_refused_by_host_and_counts(sights: list[Sight], said: str) -> None:
    with pytest.raises(MtopdError, match=f"^{said}, .*CUDA_VISIBLE_DEVICES= to run on CPU"):
        choose_devices(sights)


def agreed(sights: list[Sight]) -> list[torch.device | str]:
    """What each rank of a job, on a thread of its own, gets: its device, or why there is none."""
    store = dist.HashStore()

    def of_rank(rank: int, sight: Sight) -> torch.device | str:
        try:
            return agree_on_devices(store, rank, len(sights), sight)
        except MtopdError as error:
            return str(error)

    with ThreadPoolExecutor(len(sights)) as threads:
        started = [threads.submit(partial(of_rank, r, s)) for r, s in enumerate(sights)]
        return [one.result(30) for one in started]


def test_all_ranks_get_one_answer() -> None:
    """Each for itself, a task that Slurm shows one GPU of four took the CPU without a word."""
    assert agreed(tasks("a", 4)) == [torch.device("cuda", 0)] * 4
    assert agreed(host("a", 2, 2)) == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert agreed(host("a", 0, 2)) == [torch.device("cpu")] * 2
    refused = agreed(host("a", 1, 1) + host("b", 0, 1))
    assert refused[0] == refused[1] and "host b has 0 GPUs for 1 ranks" in str(refused[0])


def test_what_the_doctor_says_is_what_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    assert explain(0, 4) == ("cpu", "no rank sees a GPU: gloo on CPU")
    assert explain(4, 4)[0] == explain(4, 1)[0] == "cuda"
    decision, why = explain(4, 5)
    assert decision == "refused" and why.startswith("this host has 4 GPUs for 5 ranks")
    monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices.torch.cuda, "device_count", lambda: 4)
    devices.check_own_devices(4)
    with pytest.raises(MtopdError, match="has 4 GPUs for 5 ranks"):
        devices.check_own_devices(5)
