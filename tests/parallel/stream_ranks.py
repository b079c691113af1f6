"""One process of tests/parallel/test_stream.py: a student at tp2 x pp2, a teacher streamed on
meshes of its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from mtopd.config import ParallelConfig
from mtopd.convert.bridge import Bridge
from mtopd.hf_checkpoint import hf_config_from_dict
from mtopd.megatron import parallel
from mtopd.megatron.model import build_chunks
from mtopd.megatron.options import config_overrides
from mtopd.pipelines.teachers import build_teacher_layers
from mtopd.planning import plan_pass
from mtopd.progress import quiet_libraries
from mtopd.teacher_offload import store as store_module
from mtopd.teacher_offload.layer_stream import TeacherStream
from mtopd.teacher_offload.store import TeacherStore, open_store
from mtopd.teacher_offload.teacher_pass import PassResult, TeacherSample, run_teacher_pass
from mtopd.types import MtopdError

store_module.BLOCK_BYTES = 4096  # as the stores were written: small models have many blocks
BATCH_TOKENS = 64


class Teacher:
    """A store on a mesh, and the states its pass gives on this replica."""

    def __init__(self, store: TeacherStore, tp: int, ep: int, ranks: parallel.Ranks) -> None:
        self.store, self.mesh = store, parallel.build_teacher_mesh(tp, ep)
        self.layers = build_teacher_layers(store, self.mesh, ranks.device)

    def run(
        self,
        stream: TeacherStream,
        index: int,
        samples: list[np.ndarray],
        activation_budget: int = 1 << 30,
    ) -> tuple[dict[int, torch.Tensor], PassResult]:
        plans = plan_pass(
            [[len(ids) for ids in samples]],
            self.mesh.num_replicas,
            batch_tokens=BATCH_TOKENS,
            token_bytes=4 * self.store.hidden_size,
            activation_budget=activation_budget,
        )
        waves = plans[self.mesh.replica]
        mine = [i for wave in waves for batch in wave.batches for i in batch]
        states: dict[int, torch.Tensor] = {}
        result = run_teacher_pass(
            stream,
            index,
            self.layers,
            self.mesh.tp_group,
            {i: TeacherSample(samples[i], np.arange(len(samples[i]))) for i in mine},
            waves,
            keep=lambda i, rows_TE: states.update({i: rows_TE.clone()}),
        )
        assert states.keys() == set(mine)
        return states, result


def count_ranges(streams: list[TeacherStream]) -> dict[str, int]:
    """How this rank's ranges travel: by an all-gather, by broadcasts of their owners, or not at
    all.
    """
    ranges = [
        r for stream in streams for teacher in stream.parts for part in teacher for r in part.ranges
    ]
    gathered = sum(r.share_bytes is not None for r in ranges)
    alone = sum(len(r.owners) == 1 for r in ranges)
    return {"all-gathered": gathered, "broadcast": len(ranges) - gathered - alone, "alone": alone}


def total(value: int) -> int:
    summed = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(summed)
    return int(summed[0])


def check_meshes(spec: dict[str, Any], student: parallel.Ranks) -> str:
    """Every mesh, with deep and shallow budgets: states as transformers gives them, storage read
    once, then never.
    """
    report, streams = [], []
    samples = [np.array(ids) for ids in spec["samples"]]
    for name, meshes in spec["meshes"].items():
        store = open_store(Path(spec["stores"]) / name)
        wanted = load_file(f"{spec['references']}/{name}.safetensors")
        for tp, ep in meshes:
            teacher = Teacher(store, tp, ep, student)
            whole = store.pass_bytes()
            stream = TeacherStream(
                [store], [teacher.mesh], student.device, host_budget=whole, reader_threads=2
            )
            worst = 0.0
            for reading in (whole, 0):
                stream.expect([0])
                states, result = teacher.run(stream, 0, samples)
                assert len(result.waves) == 1
                reads = stream.take_counters()
                assert (
                    total(reads.bytes_read) == reading
                    and total(reads.bytes_kept) == whole - reading
                )
                for i, rows_TE in states.items():
                    error = (rows_TE.double() - wanted[str(i)]).norm() / wanted[str(i)].norm()
                    worst = max(worst, float(error))
            stream.close()
            streams.append(stream)
            assert worst < 2e-6, (name, tp, ep, worst)
            report.append(f"{name} tp{tp} ep{ep} {worst:.0e}")
    counts = count_ranges(streams)
    assert all(counts.values()), f"not every way of a range was taken: {counts}"
    return f"{', '.join(report)}; ranges {counts}"


def check_waves(spec: dict[str, Any], student: parallel.Ranks) -> str:
    """A small activation budget gives the same bits in more waves; every byte is read once in each."""
    store = open_store(Path(spec["stores"]) / "qwen3")
    samples = [np.array(ids) for ids in spec["samples"]]
    teacher = Teacher(store, 2, 1, student)
    embedding, *layers, _ = (
        p
        for p in TeacherStream(
            [store], [teacher.mesh], student.device, host_budget=1 << 30, reader_threads=1
        ).parts[0]
    )
    budget = max(p.host_bytes for p in (embedding, *layers))
    stream = TeacherStream(
        [store], [teacher.mesh], student.device, host_budget=budget, reader_threads=3
    )
    stream.expect([0])
    once, _ = teacher.run(stream, 0, samples)
    stream.take_counters()
    longest = max(map(len, samples)) * 4 * store.hidden_size
    waves = len(
        plan_pass(
            [[len(s) for s in samples]],
            2,
            batch_tokens=BATCH_TOKENS,
            token_bytes=4 * store.hidden_size,
            activation_budget=longest,
        )[0]
    )
    stream.expect([0] * waves)
    again, result = teacher.run(stream, 0, samples, activation_budget=longest)
    assert len(result.waves) == waves > 1
    assert total(stream.take_counters().bytes_read) == waves * store.pass_bytes()
    for i, rows_TE in again.items():
        error = (rows_TE - once[i]).norm() / once[i].norm()
        assert error < 1e-6, "other batches, the same states"
    stream.close()
    return f"{waves} waves"


def check_damage(spec: dict[str, Any], student: parallel.Ranks) -> str:
    """A damaged block stops every rank with the same error that names the file; the others do not
    hang.
    """
    store = open_store(Path(spec["stores"]) / "damaged")
    teacher = Teacher(store, 2, 1, student)
    stream = TeacherStream(
        [store], [teacher.mesh], student.device, host_budget=1 << 30, reader_threads=2
    )
    stream.expect([0])
    try:
        teacher.run(stream, 0, [np.array(spec["samples"][0])])
    except MtopdError as error:
        assert "layers/00001" in str(error) and "checksum" in str(error), error
    else:
        raise AssertionError("a damaged block went through")
    stream.close()
    return "damage named on every rank"


def check_resident(spec: dict[str, Any]) -> str:
    """Bit for bit what a Megatron model with the same weights resident gives on the same mesh and
    batches (fp32).
    """
    student = parallel.build_groups(
        ParallelConfig(tp=2), rank=dist.get_rank(), world_size=4, device=torch.device("cpu"), seed=0
    )
    store = open_store(Path(spec["stores"]) / "qwen3")
    teacher = Teacher(store, 2, 1, student)
    hf_config = hf_config_from_dict(store.manifest["architecture"])
    bridge = Bridge(
        hf_config,
        dtype=torch.float32,
        padded_vocab_size=128,
        overrides=config_overrides(student.device),
    )
    chunks = build_chunks(
        bridge.transformer_config,
        bridge.facts,
        student,
        padded_vocab=128,
    )
    bridge.load(chunks, Path(spec["hf"]) / "qwen3")
    model = chunks[0].eval()
    stream = TeacherStream(
        [store], [teacher.mesh], student.device, host_budget=1 << 30, reader_threads=2
    )
    stream.expect([0] * 4)
    compared = 0
    # Below 4 tokens MKL takes another kernel for weights that stand transposed.
    for length in (7, 16, 33, 64):
        ids = (np.arange(length) * 7 + 3) % 90
        states, _ = teacher.run(stream, 0, [ids, ids])  # one for each replica
        positions = torch.arange(length)[None]
        with torch.no_grad():
            resident_SBD = model(torch.from_numpy(ids)[None], positions, None)
        for rows_TE in states.values():
            worst = (rows_TE - resident_SBD[:, 0]).abs().max().item()
            assert worst == 0, f"{length} tokens: not bit for bit but within {worst}"
            compared += rows_TE.numel()
    stream.close()
    return f"{compared} values bit for bit"


def main() -> None:
    quiet_libraries()
    spec = json.loads(Path(sys.argv[1]).read_text())
    student = parallel.initialize(ParallelConfig(tp=2, pp=2), seed=0)
    checks: list[Callable[[], str]] = [
        lambda: check_meshes(spec, student),
        lambda: check_waves(spec, student),
        lambda: check_resident(spec),
        lambda: check_damage(spec, student),
    ]
    for check in checks:
        line = check()
        dist.barrier()
        if dist.get_rank() == 0:
            print(f"PASSED {line}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
