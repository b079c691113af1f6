"""Worker of the parity matrix: runs the rows of one world size, checks residency and states, saves
the numbers.
"""

from __future__ import annotations

import itertools
import json
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from mtopd.convert.weight_stream import WeightStream
from mtopd.hf_weights import read_weights
from mtopd.hidden_cache import HiddenCacheReader, shared_read
from mtopd.megatron import packing
from mtopd.megatron.layers import TeacherLayers
from mtopd.megatron.optimizer import torch_optimizers
from mtopd.metrics_lines import to_values
from mtopd.pipelines import micro_batches, teacher_pass, train
from mtopd.pipelines.engines import embedded
from mtopd.pipelines.export import export
from mtopd.pipelines.iteration import Iteration
from mtopd.pipelines.session import Session
from mtopd.planning import Part, row_length
from mtopd.progress import quiet_libraries
from mtopd.rollout.engine import Request, Sampling
from mtopd.step_sums import LocalSums, StepSums
from mtopd.teacher_offload import head_slot, layer_stream
from mtopd.trajectories import read_metadata
from mtopd.types import MicroBatch, PlannedSample, SampleMetadata, TrainStepPlan
from tests.parallel import mutants
from tests.rollout.engines import alone, answer
from tests.small_models import whole

METRICS = (
    "grad_norm",
    "reverse_kl",
    "reverse_kl_by_teacher",
    "entropy",
    "log_prob_difference",
    "token_mult_prob_error",
    "share_by_teacher",
    "tokens",
)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def named_like_weights(
    session: Session, tensor_of: Callable[[Any], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Tensors in place of the weights, as HF tensors; on tied models the embedding's is the sum
    over its two uses.
    """
    of_chunks = []
    for chunk in session.student.trainer.chunks:
        pairs = []
        for name, parameter in chunk.named_parameters():
            pairs.append((name, tensor_of(parameter).detach().clone()))
        of_chunks.append(pairs)
    student = session.student
    stream = WeightStream(student.bridge, student.trainer.chunks, student.ranks, of_chunks)
    return whole(stream.buckets(1 << 20))


def gradients(session: Session) -> dict[str, torch.Tensor]:
    """The accumulated gradients.  The distributed optimizer leaves each rank the sum of its shard
    only: join them.
    """
    if session.student.trainer.distributed_optimizer:
        for module in session.student.trainer.ddp:
            for buffer in (*module.buffers, *module.expert_parallel_buffers):
                group = buffer.data_parallel_group
                for bucket in buffer.buckets:
                    shards = list(bucket.grad_data.chunk(group.size()))
                    dist.all_gather(shards, shards[group.rank()].clone(), group=group)
    return named_like_weights(session, lambda parameter: parameter.main_grad)


def check_states(
    session: Session, iteration: Iteration, reference: dict[str, torch.Tensor]
) -> float:
    """Streamed states in the cache against transformers' own, row by row; returns the worst
    relative error.
    """
    worst = 0.0
    metadata = read_metadata(iteration.trajectories)
    names = dict(
        zip(metadata["sample_id"].to_pylist(), metadata["prompt_id"].to_pylist(), strict=True)
    )
    with HiddenCacheReader(iteration.hidden_cache) as reader:
        for sample in iteration.samples:
            store = session.teachers.stores[sample.teacher_index]
            entry = reader.lookup(iteration.cache_key(sample), sample.sample_id, 0)
            assert entry is not None and entry.n_tokens == sample.num_loss_tokens
            rows = torch.empty(entry.n_tokens, store.hidden_size)
            reader.read(entry, rows.numpy())
            wanted = reference[f"states/{names[sample.sample_id]}"]
            assert rows.shape == wanted.shape
            # Each token on its own: a shifted row cannot hide.
            for row, want in zip(rows, wanted, strict=True):
                worst = max(worst, relative(row, want))
    return worst


class LiveHeads:
    """Counts live head storages by weak references, not by the slot's own books."""

    def __init__(self) -> None:
        self.live = self.peak = self.made = 0
        original = head_slot.HeadSlot._load

        def load(slot: head_slot.HeadSlot, index: int) -> head_slot.TeacherHead:
            head = original(slot, index)
            self.made += 1
            self.live += 1
            self.peak = max(self.peak, self.live)
            weakref.finalize(head.weight_vE.untyped_storage(), self._gone)
            return head

        head_slot.HeadSlot._load = load

    def _gone(self) -> None:
        self.live -= 1


class LiveLayers:
    """Bytes of live storages that teacher weights were loaded into, by weak references; peak over
    all passes.
    """

    def __init__(self) -> None:
        self.live: dict[int, int] = {}
        self.worst = 0.0  # peak bytes over what two layers and the largest other part take
        original = layer_stream.LayerStream._load

        def load(
            stream: layer_stream.LayerStream, key: tuple, part: Part, buffer: torch.Tensor
        ) -> None:
            embedding, *layers, norm = (part.device_bytes for part in stream._parts)
            for held in (buffer, *stream._buffers):
                storage = held.untyped_storage()
                if id(storage) not in self.live:
                    self.live[id(storage)] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, id(storage))
            self.worst = max(
                self.worst, sum(self.live.values()) / (2 * max(layers) + embedding + norm)
            )
            original(stream, key, part, buffer)

        layer_stream.LayerStream._load = load
        bind = TeacherLayers.bind

        def checked_bind(
            teacher: TeacherLayers, index: int, weights: dict[str, torch.Tensor]
        ) -> None:
            bind(teacher, index, weights)
            storages = {id(p.untyped_storage()) for p in teacher.layer.parameters()}
            assert len(storages) == 1 and storages <= self.live.keys(), (
                "parameters are views of one buffer, no copies"
            )

        TeacherLayers.bind = checked_bind


def unsorted(
    plan: TrainStepPlan, samples: Sequence[SampleMetadata], micro_batch_size: int | None
) -> TrainStepPlan:
    """The plan's samples in the order of their ids, teachers mixed, in as full micro-batches."""
    ((*mine,),) = plan.micro_batches
    length = {s.sample_id: row_length(s) for s in samples}
    batches: list[list[PlannedSample]] = [[]]
    for sample in sorted((s for batch in mine for s in batch.samples), key=lambda s: s.sample_id):
        tokens = sum(length[s.sample_id] for s in [*batches[-1], sample])
        if tokens > plan.seq_length if plan.packed else len(batches[-1]) == micro_batch_size:
            batches.append([])
        batches[-1].append(sample)
    return replace(plan, micro_batches=(tuple(MicroBatch(tuple(batch)) for batch in batches),))


def allow_swaps(heads: head_slot.HeadSlot) -> None:
    """The product refuses a step that loads a head twice: let it count each once, `LiveHeads`
    counts them all.
    """
    take_counters = heads.take_counters

    def once() -> head_slot.HeadCounters:
        counters = take_counters()
        return replace(counters, loads=dict.fromkeys(counters.loads, 1))

    heads.take_counters = once


def run_row(row: dict[str, Any], heads: LiveHeads, layers: LiveLayers) -> None:
    # Of so small micro-batches every tp rank reads all states; in some rows they are shared out and
    # gathered.
    shared_read._SMALLEST_SHARE = 1 if "+sp" in row["name"] else 1 << 20
    session = Session(Path(row["run"]), 1)
    iteration, teachers = session.iteration(0), session.teachers
    trainer = session.student.trainer
    teacher_pass.run(session, iteration)
    assert 0 < layers.worst <= 1, f"more than two layers were on the device: {layers.worst}"
    assert not layers.live, "a teacher's weights outlive its pass"
    lines = (
        [json.loads(line) for line in session.run.metrics.read_text().splitlines()]
        if session.ranks.rank == 0
        else []
    )
    for line in lines:
        for name, values in line.get("teachers", {}).items():
            assert values["bytes_read"] == values["stored_bytes"], (name, values)
            assert values["waves"] == 1
            store, mesh = next(
                (s, m)
                for s, m in zip(teachers.stores, teachers.meshes, strict=True)
                if s.name == name
            )
            assert values["relayouts"] == (0 if mesh.tp_size == 2 else store.num_layers), values
    assert iteration.seed == 0
    (plan,) = micro_batches.plan(session, iteration, iteration.samples)
    if row["unsorted"]:
        plan = unsorted(plan, iteration.samples, session.config.train.micro_batch_size)
        allow_swaps(teachers.heads)
    found: dict[str, torch.Tensor] = {}
    optimizer_step = trainer.optimizer_step

    def keep_gradients(sums: StepSums) -> tuple[float, float]:
        if not found:
            summed = gradients(session)
            found.update({f"gradients/{name}": tensor for name, tensor in summed.items()})
        return optimizer_step(sums)

    trainer.optimizer_step = keep_gradients
    results = []
    for step in range(3):
        before = heads.made
        with train.open_hidden_states(session, iteration) as states:
            assert (states is not None) == session.ranks.is_last_stage, (
                "other stages never open the cache"
            )
            runs = micro_batches.teacher_runs(session, iteration, plan)
            line = train.train_step(session, iteration, plan, runs, states, step)
            results.append(to_values(line))
        in_order = [run.teacher_index for of_batch in runs for run in of_batch]
        swaps, distinct = len(list(itertools.groupby(in_order))), len(set(in_order))
        assert swaps == distinct or (row["unsorted"] and swaps > 4 * distinct), (swaps, distinct)
        assert heads.made - before == swaps, (heads.made - before, swaps)
        assert heads.live == 0 and heads.peak <= 1, (heads.live, heads.peak)
    trainer.optimizer_step = optimizer_step
    found |= {
        f"weights/{name}": tensor for name, tensor in whole(session.student.weights()).items()
    }
    values = results[0]
    rounded = row["cache_dtype"] == "bfloat16"
    # Of a teacher held against itself the KL is what rounding makes it.
    for index, floor in session.probes.noise_floors.items():
        kl = values["reverse_kl_by_teacher"][teachers.stores[index].name]
        assert kl / 4 < floor < kl * 4 if rounded else floor == 0, (floor, kl)
    assert values["below_10x_noise_floor"] == (row["teachers"] if rounded else [])
    check_metrics(session, row, values)
    checks = []
    if row["teachers"][0] == "self":
        if row["cache_dtype"] == "float32":
            checks.append(check_argmax(session))
    elif row["teachers"][0] == "t0":
        error = check_states(session, iteration, load_file(row["reference"]))
        assert error < 1e-5, f"streamed states are {error} from transformers'"
        checks.append(f"states {error:.1e}")
    check_off_device(session)
    assert session.probes.proved == set(range(len(teachers.stores))), (
        "every teacher was proved to be the right one"
    )
    if session.ranks.rank == 0:
        save_file(
            {k: v.contiguous() for k, v in found.items()}, session.run.path / "parity.safetensors"
        )
        metrics = {name: values[name] for name in METRICS}
        numbers = {"loss": values["loss"], "metrics": metrics, "checks": ", ".join(checks)}
        (session.run.path / "parity.json").write_text(json.dumps(numbers))
    session.metrics.close()
    session.checkpoints.close()


def check_metrics(session: Session, row: dict[str, Any], values: dict[str, Any]) -> None:
    assert values["peak_resident_heads"] == 1
    assert sum(values["head_loads"].values()) == values["teachers_in_step"]
    for name, statistics in values["statistics"].items():
        assert 0 < statistics["tokens"] <= 64 * session.ranks.dp_size * session.ranks.cp_size, (
            name,
            statistics,
        )
        assert (
            0 < statistics["teacher_overlap_mass"] <= 1 + 1e-5
            and 0 < statistics["overlap_ratio"] <= 1
        ), statistics
        if row["teachers"][0] == "self":
            assert statistics["forward_kl"] < 1e-4 and statistics["overlap_ratio"] > 0.95, (
                statistics
            )
        elif row["teachers"][0] == "t0":
            assert statistics["forward_kl"] > 1e-3 and statistics["entropy_gap"] > 1e-5, statistics
    assert (
        values["statistics"].keys() == values["reverse_kl_by_teacher"].keys()
        and values["statistics_s"] > 0
    )


def check_off_device(session: Session) -> None:
    """Gradients and optimizer state leave no byte on the device, and come back bit for bit, with
    all views.
    """
    trainer = session.student.trainer
    states = [
        t
        for adam in torch_optimizers(trainer.optimizer)
        for s in adam.state.values()
        for t in s.values()
        if torch.is_tensor(t)
    ]
    parameters = [p for chunk in trainer.chunks for p in chunk.parameters()]
    gradients = [p.main_grad for p in parameters]
    moved = [*states, *gradients]
    for tensor in moved:
        tensor.uniform_()
    before = [t.clone() for t in moved]
    with trainer.offloaded():
        assert all(t.untyped_storage().nbytes() == 0 for t in moved)
        assert all(p.untyped_storage().nbytes() > 0 for p in parameters), "weights stay"
    for tensor, wanted in zip(moved, before, strict=True):
        assert torch.equal(tensor, wanted)
    assert all(g is p.main_grad for g, p in zip(gradients, parameters, strict=True))


def check_argmax(session: Session) -> str:
    """Greedy answers of the exported HF model, teacher-forced through Megatron: the same argmax
    where it is clear.
    """
    trainer = session.student.trainer
    folder = session.run.path / "export" / "check"
    export(session.student, session.run, folder)
    engine = embedded(session.student)
    engine._deal = alone()  # every rank answers all
    engine.update_weights(read_weights(folder), "test/1/0")
    prompts = [tuple(range(3 + i % 60, 3 + i % 60 + 2 + i % 7)) for i in range(256)]
    requests = [Request(i, f"x/{i}", p) for i, p in enumerate(prompts)]
    responses = answer(engine, requests, Sampling(12, temperature=0))
    width = max(map(len, prompts)) + 12
    disagree, clear = torch.zeros(2), 0
    for start in range(0, 256, 64):
        fields = [
            _Fields(p, r.response_ids)
            for p, r in zip(prompts[start : start + 64], responses[start : start + 64], strict=True)
        ]
        batch = packing.pack_rows(
            fields, [1.0] * 64, shape=(64, width), packed=False, ranks=session.ranks, payload=None
        )
        wanted = torch.tensor([t for f in fields for t in f.response_ids.tolist()])

        sums: dict[str, torch.Tensor] = {}

        def compare(
            hidden_TD: torch.Tensor,
            weight_vD: torch.Tensor,
            _: object,
            wanted: torch.Tensor = wanted,
            sums: dict[str, torch.Tensor] = sums,
        ) -> torch.Tensor:
            local = (hidden_TD @ weight_vD.T).detach()
            shards = [torch.empty_like(local) for _ in range(session.ranks.tp_size)]
            dist.all_gather(shards, local, group=session.ranks.tp_group)
            top = torch.cat(shards, -1)[:, : session.student.vocab_size].topk(2, -1)
            is_clear = top.values[:, 0] - top.values[:, 1] > 1e-4
            sums["wrong"] = (is_clear & (top.indices[:, 0] != wanted)).sum()
            sums["clear"] = is_clear.sum()
            return hidden_TD.sum() * 0

        trainer.forward_backward([batch], compare)
        sums = sums or dict.fromkeys(("wrong", "clear"), torch.zeros(()))
        reduced = trainer.reduce(lambda sums=sums: LocalSums(sums)).values
        disagree[0] += reduced["wrong"]
        clear += int(reduced["clear"])
    assert disagree[0] == 0 and clear > 1000, (disagree, clear)
    return f"argmax equal at {clear} positions"


class _Fields:
    def __init__(self, prompt: tuple[int, ...], response: tuple[int, ...]) -> None:
        import numpy as np

        self.prompt_ids, self.response_ids = np.array(prompt), np.array(response)
        self.loss_mask = np.ones(len(response), np.uint8)


if __name__ == "__main__":
    quiet_libraries()
    if sys.argv[2]:
        mutants.install(sys.argv[2])
    live, live_layers = LiveHeads(), LiveLayers()
    for matrix_row in json.loads(Path(sys.argv[1]).read_text()):
        try:
            run_row(matrix_row, live, live_layers)
        except Exception as error:
            raise AssertionError(f"row {matrix_row['name']}") from error
        if dist.get_rank() == 0:
            print(f"DONE {matrix_row['name']}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
