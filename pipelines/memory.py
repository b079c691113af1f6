"""What a rank of a run will hold in memory, and the layouts of a model that fit a machine."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.table import Table

from mtopd.config import ConsolidateConfig, OffloadConfig, StudentConfig
from mtopd.config_specialist import SpecialistConfig
from mtopd.dtypes import torch_dtype
from mtopd.families import ModelFacts, check_variant, model_facts
from mtopd.hf_checkpoint import load_hf_config
from mtopd.megatron.options import has_distributed_optimizer, recomputes_layers, sort_fields
from mtopd.planning import (
    Capacity,
    Layout,
    fitting_layouts,
    in_binary_units,
    in_words,
    rank_capacity,
    working_sizes,
)
from mtopd.teacher_offload.store import TeacherStore
from mtopd.types import MtopdError

_WORLD_SIZES = (1, 2, 4, 8)
# heads of a table that fits into 80 columns; libraries are the same on every layout
_HEADS = {
    "weights": "weights",
    "gradients": "grads",
    "optimizer": "optim.",
    "engine": "engine",
    "activations": "activ.",
    "kept teachers": "teacher",
    "checkpoint copy": "copy",
}


def report_memory(
    config: ConsolidateConfig | SpecialistConfig,
    stores: Sequence[TeacherStore],
    ranks_on_node: int,
    say: Callable[[str], None],
) -> None:
    """Say what each rank will hold, and whether this machine has less.  Raises MtopdError where the
    embedded engine's model cannot be there for the rollouts.
    """
    facts = model_facts(load_hf_config(config.student.model))
    capacity = config_capacity(config, facts, sum(store.pass_bytes() for store in stores))
    say(f"each rank will hold about {capacity}")
    if isinstance(config, ConsolidateConfig) and config.rollout.engine == "embedded":
        refuse_engine(capacity, ranks_on_node)
    if lacking := too_little(capacity, ranks_on_node):
        say(f"warning: {lacking}")


def config_capacity(
    config: ConsolidateConfig | SpecialistConfig, facts: ModelFacts, teacher_bytes: int
) -> Capacity:
    """``teacher_bytes``: of all teachers together, which the ranks share."""
    parallel, fields = config.student.parallel, sort_fields(config.student.megatron)
    padded = (config.train.micro_batch_size or 1) * config.data.context_length
    if isinstance(config, ConsolidateConfig):
        tokens = config.train.token_budget or padded
        host_budget = config.teacher_offload.host_budget
        answers = config.rollout.engine == "embedded"
    else:  # held-out prompts are answered by the same engine
        tokens, host_budget = padded, 0
        answers = any(source.has_held_out for source in config.data.sources)
    return rank_capacity(
        facts.sizes,
        Layout(**parallel.model_dump() | {"etp": parallel.expert_tp}),
        dtype_bytes=torch_dtype(config.student.dtype).itemsize,
        micro_batch_tokens=-(-tokens // parallel.cp),
        distributed_optimizer=has_distributed_optimizer(fields.optimizer),
        recomputes=recomputes_layers(fields.transformer),
        kept_teachers=min(host_budget, teacher_bytes // parallel.world_size),
        embedded_engine=answers,
    )


def too_little(capacity: Capacity, ranks_on_node: int) -> str:
    """What this machine has less of than ``ranks_on_node`` ranks will hold; empty if of nothing."""
    import psutil

    host, needed = psutil.virtual_memory().available, ranks_on_node * capacity.total
    device = _device_bytes(ranks_on_node)
    if device:
        needed = ranks_on_node * capacity.host
        if capacity.device > device:
            (need, has), unit = in_binary_units([capacity.device, device])
            return (
                f"a device has {has} {unit}, a rank will hold {need} there: use more ranks, or "
                "student.megatron's recompute_* and use_distributed_optimizer options"
            )
    if needed > host:
        (need, has), unit = in_binary_units([needed, host])
        return (
            f"this machine has {has} {unit} of memory free, its {ranks_on_node} rank"
            f"{'s' * (ranks_on_node > 1)} will hold {need}"
        )
    return ""


def refuse_engine(capacity: Capacity, ranks_on_node: int) -> None:
    """Raise MtopdError where a rank has not the memory for the embedded engine's whole model beside
    what it keeps of the trainer: nothing of that is an estimate.
    """
    import psutil

    where, has = "device", _device_bytes(ranks_on_node)
    if not has:
        where = "share of the memory that is free"
        has = psutil.virtual_memory().available // ranks_on_node
    kept = capacity.weights + capacity.gradients + capacity.optimizer
    if kept + capacity.engine > has:
        (engine, beside, there), unit = in_binary_units([capacity.engine, kept, has])
        raise MtopdError(
            f"rollout.engine embedded holds the whole student on each rank, {engine} {unit}, beside "
            f"{beside} {unit} of weights, gradients and optimizer; a rank's {where} is {there} {unit}: "
            "take a machine with more memory, more ranks for the trainer's part, a smaller student, or "
            "SGLang servers (rollout.engine sglang)"
        )


def _device_bytes(ranks_on_node: int) -> int:
    """Memory of the smallest GPU, 0 where the ranks run on CPU.  The driver is asked: asking torch
    would leave a context on the device for as long as the launcher lives.
    """
    if shutil.which("nvidia-smi") is None:
        return 0
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        sizes = [int(line) << 20 for line in done.stdout.split()]
        return min(sizes) if len(sizes) >= ranks_on_node else 0
    return 0


def print_layouts(model: Path, console: Console, *, dtype: str, tokens: int) -> None:
    """Print which layouts fit a checkpoint, and what a rank holds on each.  Raises MtopdError for a
    folder that cannot be a student.
    """
    if dtype not in (known := get_args(StudentConfig.model_fields["dtype"].annotation)):
        raise MtopdError(f"--dtype {dtype}: a student's is {in_words(known, 'or')}")
    hf_config = load_hf_config(model)
    check_variant(hf_config, str(model / "config.json"))
    facts = model_facts(hf_config)
    counts, experts = facts.tp_counts, facts.num_experts
    tp_sizes = working_sizes(counts.values())
    console.print(
        f"{model}: {hf_config.model_type}, {facts.sizes.num_params:,} parameters, "
        f"{facts.num_layers} layers, "
        + ", ".join(f"{count} {what}" for what, count in counts.items())
        + (f", {experts} experts" if experts else "")
    )
    for axis, sizes in (
        ("tp, and slices of a teacher store", tp_sizes),
        ("pp x vpp", working_sizes([facts.num_layers])),
        ("ep", working_sizes([experts]) if experts else [1]),
    ):
        console.print(f"{axis}: {in_words(sizes, 'or')}")
    worlds = sorted({*_WORLD_SIZES, *(size for size in tp_sizes if size <= _WORLD_SIZES[-1])})
    whole = torch_dtype(dtype).itemsize * facts.sizes.num_params
    rows = [
        (
            layout,
            rank_capacity(
                facts.sizes,
                layout,
                dtype_bytes=torch_dtype(dtype).itemsize,
                micro_batch_tokens=tokens,
                kept_teachers=min(OffloadConfig().host_budget, whole // layout.world_size),
            ),
        )
        for world in worlds
        for layout in fitting_layouts(
            world,
            tp_counts=counts.values(),
            num_layers=facts.num_layers,
            expert_counts=[experts, facts.expert_ffn_size] if experts else [],
        )
    ]
    largest = max(capacity.total for _, capacity in rows)
    libraries, unit = in_binary_units([rows[0][1].libraries], of=largest)
    table = Table("ranks", "layout", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for head in (*_HEADS.values(), "total", "fits"):
        table.add_column(head, justify="right")
    for layout, capacity in rows:
        parts = [capacity.parts[part] for part in _HEADS]
        numbers, _ = in_binary_units([*parts, capacity.total], of=largest)
        fits = "no" if too_little(capacity, layout.world_size) else "yes"
        table.add_row(str(layout.world_size), str(layout), *numbers, fits)
    console.print(f"{unit} that one rank will hold ({dtype}, {tokens:,} tokens of a micro-batch):")
    console.print(table)
    console.print(
        "grads, optim.: gradients, state of the optimizer; engine: the student once more, which the "
        "embedded rollout engine holds; activ.: activations, an estimate; teacher: the rank's share of "
        "one teacher of this size, up to teacher_offload.host_budget; copy: of a checkpoint while it is "
        f"written, an estimate; total: with {libraries[0]} {unit} of libraries; fits: into the memory "
        "that this machine has free now"
        + (
            "; tp beyond 1 needs student.megatron.sequence_parallel=true"
            if experts or facts.is_latent_attention
            else ""
        )
    )
