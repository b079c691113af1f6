"""Process groups: torch.distributed, Megatron's parallel state, and a teacher's own mesh over the
same ranks.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mtopd.config import ParallelConfig
from mtopd.megatron.devices import agree_on_devices, look
from mtopd.planning import Mesh

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ranks:
    """Where this process stands.  Groups are torch.distributed groups.

    A dp rank trains on its own samples; the cp ranks of one dp rank share each sample's positions.
    Gradients are summed over ``dp_cp_group``.
    """

    rank: int
    local_rank: int  # on its node
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    vpp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    ep_rank: int
    ep_size: int
    expert_tp_rank: int
    expert_tp_size: int
    model_group: dist.ProcessGroup  # tp x pp: the ranks that have everything but experts once
    expert_model_group: dist.ProcessGroup  # ep x expert tp x pp: those that have every expert once
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    dp_cp_group: dist.ProcessGroup
    device: torch.device

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1


def initialize(layout: ParallelConfig, *, seed: int) -> Ranks:
    """Join the job torchrun started and build Megatron's groups.  Reads torchrun's RANK,
    WORLD_SIZE, LOCAL_RANK.

    What the layout leaves over is data parallel.  Raises MtopdError on every rank where some find
    no GPU and others do.
    """
    world_size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    if dist.is_initialized():  # the layout changes, not the device
        is_cuda = dist.get_backend() == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if is_cuda else CPU
    else:
        rendezvous, _, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore("devices", rendezvous)
        device = agree_on_devices(store, rank, world_size, look())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        from mtopd.megatron import cpu

        cpu.install()
        torch.set_num_threads(1)
    from mtopd.megatron import without_te

    without_te.install()
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    return build_groups(layout, rank=rank, world_size=world_size, device=device, seed=seed)


def build_groups(
    layout: ParallelConfig, *, rank: int, world_size: int, device: torch.device, seed: int
) -> Ranks:
    """Megatron's groups for one layout; a former layout of this process is taken down first."""
    from megatron.core import parallel_state, tensor_parallel

    stage, rest = divmod(world_size, layout.pp)
    fits = rest == 0 and stage % (layout.tp * layout.cp) == 0
    assert fits and stage % (layout.ep * layout.expert_tp) == 0, (layout, world_size)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.expert_tp,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Ranks(
        rank=rank,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        world_size=world_size,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=layout.tp,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=layout.pp,
        vpp_size=layout.vpp,
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=layout.cp,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_size=layout.ep,
        expert_tp_rank=parallel_state.get_expert_tensor_parallel_rank(),
        expert_tp_size=layout.expert_tp,
        model_group=parallel_state.get_model_parallel_group(),
        expert_model_group=parallel_state.get_expert_tensor_model_pipeline_parallel_group(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        device=device,
    )


@dataclass(frozen=True)
class TeacherMesh(Mesh):
    """A teacher's mesh with its process groups."""

    tp_group: dist.ProcessGroup
    peer_group: dist.ProcessGroup  # the ranks with this tp rank, one in each replica
    expert_peer_group: dist.ProcessGroup  # the ranks with this ep rank
    collection: object  # Megatron's ProcessGroupCollection for layers of this teacher


def build_teacher_mesh(tp: int, ep: int = 1) -> TeacherMesh:
    """Collective: every rank calls it with the same sizes, which divide the world."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    rank, world_size = dist.get_rank(), dist.get_world_size()
    assert world_size % tp == 0 and world_size % ep == 0, (tp, ep, world_size)
    tp_group, peer_group = _rows_and_columns(tp)
    ep_group, expert_peer_group = _rows_and_columns(ep)
    single, _ = _rows_and_columns(1)
    collection = ProcessGroupCollection()
    # A teacher has only tp and ep: every other kind of group is this rank alone.
    for name in ("tp", "tp_cp", "tp_dp_cp", "mp"):
        setattr(collection, name, tp_group)
    for name in ("ep", "tp_ep", "tp_ep_pp"):
        setattr(collection, name, ep_group)
    for name in ("pp", "cp", "dp", "dp_cp", "embd", "pos_embd", "expt_tp", "expt_dp"):
        setattr(collection, name, single)
    return TeacherMesh(
        tp_rank=rank % tp,
        tp_size=tp,
        replica=rank // tp,
        num_replicas=world_size // tp,
        tp_group=tp_group,
        peer_group=peer_group,
        ep_rank=rank % ep,
        ep_size=ep,
        expert_replica=rank // ep,
        num_expert_replicas=world_size // ep,
        expert_peer_group=expert_peer_group,
        collection=collection,
    )


def _rows_and_columns(width: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """The ranks laid out in rows of ``width``: this rank's row, and its column (ascending)."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    rows = [list(range(start, start + width)) for start in range(0, world_size, width)]
    columns = [list(range(first, world_size, width)) for first in range(width)]
    # new_group is collective: every rank creates every group, in the same order.
    groups = [
        (ranks, dist.new_group(ranks, timeout=COLLECTIVE_TIMEOUT)) for ranks in (*rows, *columns)
    ]
    row, column = (group for ranks, group in groups if rank in ranks)
    return row, column
