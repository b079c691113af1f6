"""What one rank holds while a run lasts, and the phases' shared services: resume, checkpoints,
weights, timing.
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mtopd.config import ConsolidateConfig, OptimizerConfig, StudentConfig, load_config
from mtopd.convert.bridge import Bridge
from mtopd.dtypes import torch_dtype
from mtopd.families import drop_further_heads, model_facts
from mtopd.files import read_json, remove_tree, write_json
from mtopd.hf_checkpoint import (
    HFTensors,
    hf_config_from_dict,
    load_hf_config,
    write_hf_checkpoint,
)
from mtopd.hidden_cache import sample_key
from mtopd.manifest import check_accepted
from mtopd.megatron import checkpoint, parallel
from mtopd.megatron.layers import TeacherLayers
from mtopd.megatron.model import build_chunks, padded_vocab_size
from mtopd.megatron.options import config_overrides, megatron_refuses, sort_fields
from mtopd.megatron.train_step import OptimizerSettings, Trainer
from mtopd.metrics import MetricsWriter
from mtopd.metrics_lines import MemoryLine, PhaseLine
from mtopd.progress import Progress
from mtopd.rollout.embedded import EmbeddedEngine
from mtopd.run_dir import RunDir, is_sealed
from mtopd.teacher_offload.head_slot import HeadSlot
from mtopd.teacher_offload.layer_stream import TeacherStream
from mtopd.teacher_offload.store import TeacherStore, open_store
from mtopd.tokenizer import load_tokenizer, tokenizer_hash, vocab_size
from mtopd.trajectories import TokenStore, verify_shards
from mtopd.types import SampleMetadata

from .prompts import Prompts


class Student:
    """The trained model on this rank, its trainer, and the way of its weights to the rollout engine
    and to HF.
    """

    def __init__(
        self, config: StudentConfig, optimizer: OptimizerConfig, num_steps: int, seed: int
    ) -> None:
        self.ranks = parallel.initialize(config.parallel, seed=seed)
        self.folder, self.mtp = config.model, config.mtp
        self.hf_config = load_hf_config(config.model)
        self.facts = model_facts(self.hf_config)
        self.dtype = torch_dtype(config.dtype)
        self.tokenizer = load_tokenizer(config.model)
        self.vocab_size = vocab_size(self.tokenizer)
        padded = padded_vocab_size(self.facts.vocab_size, self.ranks.tp_size)
        fields = sort_fields(config.megatron)
        with megatron_refuses():
            self.bridge = Bridge(
                self.hf_config,
                dtype=self.dtype,
                padded_vocab_size=padded,
                overrides=config_overrides(
                    self.ranks.device, fields.transformer, interleaved=self.ranks.vpp_size > 1
                ),
            )
        chunks = build_chunks(
            self.bridge.transformer_config,
            self.facts,
            self.ranks,
            padded_vocab=padded,
            freeze_router=config.freeze_router,
        )
        self.bridge.load(chunks, config.model)
        self.trainer = Trainer(
            chunks, self.ranks, optimizer_settings(optimizer, num_steps), self.dtype, fields
        )
        self.engine = self.new_engine()
        self.update_weights()

    def new_engine(self) -> EmbeddedEngine:
        return EmbeddedEngine(
            self.hf_config,
            dtype=self.dtype,
            vocab_size=self.vocab_size,
            eos_id=self.tokenizer.eos_token_id,
            pad_id=self.tokenizer.pad_token_id,
            device=self.ranks.device,
        )

    def update_weights(self) -> None:
        """Give the rollout engine of every rank the trainer's weights.  Collective."""
        self.engine.update_weights(self.weights())

    def weights(self) -> dict[str, torch.Tensor]:
        """All weights as HF tensors, on every rank.  Collective."""
        self.trainer.finish_param_sync()
        return self.bridge.export(self.trainer.chunks)

    def export(self, run: RunDir, folder: Path) -> None:
        """Write a normal HF checkpoint, whole or not at all, and seal it.  Collective."""
        tensors = self.weights()
        if self.ranks.rank == 0 and not is_sealed(folder):
            stored = HFTensors(self.folder)
            further = [
                name for name in stored if self.mtp == "freeze" and self.facts.is_further_head(name)
            ]
            tensors |= {name: stored[name] for name in further}
            if not further:
                drop_further_heads(self.hf_config)
            write_hf_checkpoint(
                folder, tensors, self.hf_config, self.tokenizer, dtype=self.dtype, seal=run.seal
            )
        dist.barrier()


def optimizer_settings(config: OptimizerConfig, num_steps: int) -> OptimizerSettings:
    return OptimizerSettings(
        lr=config.lr,
        min_lr=config.min_lr,
        warmup_steps=config.warmup_steps,
        decay_steps=num_steps,
        decay_style=config.decay,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        clip_grad=config.clip_grad,
    )


def build_teacher_layers(
    store: TeacherStore, mesh: parallel.TeacherMesh, device: torch.device
) -> TeacherLayers:
    """The layer modules of a teacher on its mesh; they hold no weight until a stream binds some."""
    hf_config = hf_config_from_dict(store.manifest["architecture"])
    bridge = Bridge(
        hf_config,
        dtype=torch_dtype(store.dtype),
        padded_vocab_size=hf_config.vocab_size,
        overrides=config_overrides(device),
        tp=mesh.tp_size,
        ep=mesh.ep_size,
    )
    return TeacherLayers(
        bridge.transformer_config, mesh.collection, bridge.facts.rope_theta, device
    )


class Job:
    """One rank of a consolidation."""

    def __init__(self, run_dir: Path, generation: int) -> None:
        self.run = RunDir(run_dir, generation)
        self.config: ConsolidateConfig = load_config(self.run.config, [], ConsolidateConfig)
        train = self.config.train
        torch.use_deterministic_algorithms(self.config.deterministic)
        self.student = Student(
            self.config.student,
            train.optimizer,
            train.num_iterations * train.train_steps_per_iteration,
            self.config.seed,
        )
        self.ranks, self.trainer, self.engine = (
            self.student.ranks,
            self.student.trainer,
            self.student.engine,
        )
        self.vocab_size = self.student.vocab_size
        self.prompts = Prompts.load(self.run, self.config.data)
        self.stores = [
            open_store(teacher.store, expected=started["fingerprint"])
            for teacher, started in zip(
                self.config.teachers, read_json(self.run.manifest)["teachers"], strict=True
            )
        ]
        self.teacher_meshes = self._build_teacher_meshes()
        first, as_json = self.ranks.rank == 0, self.config.log_json
        self.metrics = MetricsWriter(self.run.metrics, enabled=first, echo=as_json)
        self.progress = Progress(enabled=first and not as_json)
        self.checkpoints = checkpoint.CheckpointWriter(self.trainer, self.run, self._retain)
        self.noise_floor = self._known_noise_floors()  # nats, of a probed teacher's cached states
        self.bad_steps = 0  # train steps left out so far because of NaN or inf
        self.probed: set[int] = set()  # teachers that this start has proved to be the right ones
        self._layers: dict[int, TeacherLayers] = {}
        self._tokens: tuple[int, TokenStore] | None = None

    # -- teachers ----------------------------------------------------------------------------------
    def _build_teacher_meshes(self) -> list[parallel.TeacherMesh]:
        """Each teacher's mesh over all ranks; teachers of one shape share it.  Collective."""
        shapes = [
            (self.config.teacher_tp(i), t.parallel.ep) for i, t in enumerate(self.config.teachers)
        ]
        built = {shape: parallel.build_teacher_mesh(*shape) for shape in dict.fromkeys(shapes)}
        return [built[shape] for shape in shapes]

    @cached_property
    def teacher_stream(self) -> TeacherStream:
        """All teachers, as this rank reads and receives them; shares kept in host memory live as
        long as the run.
        """
        offload = self.config.teacher_offload
        return TeacherStream(
            self.stores,
            self.teacher_meshes,
            self.ranks.device,
            host_budget=offload.host_budget,
            reader_threads=offload.reader_threads,
        )

    @cached_property
    def heads(self) -> HeadSlot | None:
        """The head slot of this rank's vocabulary shard; None off the last stage."""
        if not self.ranks.is_last_stage:
            return None
        rows = self.trainer.output_weight().shape[0]
        return HeadSlot(
            self.stores,
            first_row=self.ranks.tp_rank * rows,
            num_rows=rows,
            device=self.ranks.device,
        )

    def teacher_layers(self, index: int) -> TeacherLayers:
        """The (empty) layer modules of a teacher on the teachers' mesh."""
        if index not in self._layers:
            self._layers[index] = build_teacher_layers(
                self.stores[index], self.teacher_meshes[index], self.ranks.device
            )
        return self._layers[index]

    def cache_dtype(self, store: TeacherStore) -> str:
        """hidden_dtype of this teacher's cached states."""
        wanted = self.config.hidden_cache.dtype
        return store.dtype if wanted == "auto" else wanted

    def _noise_floor_path(self, index: int) -> Path:
        store = self.stores[index]
        return (
            self.run.path / "noise_floors" / f"{store.fingerprint}.{self.cache_dtype(store)}.json"
        )

    def _known_noise_floors(self) -> dict[int, float]:
        """What earlier starts measured: one that finds its cache sealed probes no teacher."""
        paths = {index: self._noise_floor_path(index) for index in range(len(self.stores))}
        return {
            index: float(read_json(path)["nats"]) for index, path in paths.items() if path.exists()
        }

    def keep_noise_floor(self, index: int, nats: float) -> None:
        self.noise_floor[index] = nats
        if self.ranks.rank == 0:
            path = self._noise_floor_path(index)
            path.parent.mkdir(exist_ok=True)
            write_json(path, {"nats": nats})

    def tokens(self, iteration: int) -> TokenStore:
        """The iteration's trajectories, opened once for all phases that read them; the first call
        compares the files with their seals, on one rank of every node, and is collective.
        """
        if self._tokens is None or self._tokens[0] != iteration:
            folder = self.run.trajectories(iteration)
            parallel.check_once_per_node(self.ranks, lambda: verify_shards(folder))
            self._tokens = iteration, TokenStore(folder)
        return self._tokens[1]

    def cache_key(self, iteration: int, sample: SampleMetadata) -> bytes:
        """What names the sample's rows in the iteration's hidden cache."""
        store = self.stores[sample.teacher_index]
        return sample_key(store.fingerprint, sample.token_hash, self.cache_dtype(store))

    # -- the loop's services -----------------------------------------------------------------------
    def iteration_seed(self, iteration: int) -> int:
        return self.config.seed * 1_000_003 + iteration

    def resume(self) -> int:
        """Restore the newest sealed checkpoint; returns the iteration to go on with.  Collective."""
        newest = [checkpoint.newest(self.run)]
        dist.broadcast_object_list(newest, src=0)
        if newest[0] is None:
            return 0
        return self.restore(newest[0])

    def restore(self, iteration: int) -> int:
        state = checkpoint.load(self.trainer, self.run, iteration)
        folder = self.run.checkpoint(iteration)
        check_accepted(self.run, folder, state["taught_by"], self.taught_by)
        self.bad_steps = int(state["bad_steps"])
        self.student.update_weights()
        return iteration

    def is_last(self, iteration: int) -> bool:
        return iteration + 1 == self.config.train.num_iterations

    def save(self, iteration: int) -> None:
        """Begin a checkpoint of the state after ``iteration`` when it is due.  Collective."""
        due = (iteration + 1) % self.config.checkpoint.every == 0 or self.is_last(iteration)
        if due:
            with self.timed("checkpoint", iteration):
                self.checkpoints.save(iteration + 1, self.state())

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the trainer's own."""
        return {"bad_steps": self.bad_steps, "taught_by": self.taught_by}

    @cached_property
    def taught_by(self) -> dict[str, Any]:
        """Who teaches what, in which tokens, as JSON has it."""
        config = self.config
        teachers = [
            {
                "name": store.name,
                "fingerprint": store.fingerprint,
                "weight": weight,
                "route": dict(teacher.route),
            }
            for store, weight, teacher in zip(
                self.stores, config.teacher_weights, config.teachers, strict=True
            )
        ]
        return {"teachers": teachers, "tokenizer_hash": tokenizer_hash(self.student.tokenizer)}

    def _retain(self, published: int) -> None:
        """What a published checkpoint replaces goes: older ones, and iterations whose weights it
        holds.
        """
        checkpoint.prune(self.run, keep=self.config.checkpoint.keep)
        for done in range(published - 1):  # the newest iteration stays to be looked at
            remove_tree(self.run.iteration(done))

    @contextlib.contextmanager
    def timed(self, phase: str, iteration: int) -> Iterator[None]:
        """Write a ``phase`` line with the wall seconds of the block, and show the phase.
        Collective.

        A checkpoint that was written meanwhile is published first: a kill in this phase goes on
        from it.
        """
        self.checkpoints.advance()
        self.progress.phase(phase, iteration, self.config.train.num_iterations)
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        # Time that a killed start spent was spent, too: every start has its own line.
        self.metrics.write(
            PhaseLine(phase, seconds), iteration, part=f"start {self.run.generation}"
        )

    def finish(self) -> None:
        """Export the student, note the peak memory, end the process group.  Collective."""
        self.checkpoints.wait()
        self.student.export(self.run, self.run.export(self.config.train.num_iterations))
        self.close()

    def close(self) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peaks = torch.tensor([peak], dtype=torch.float64, device=self.ranks.device)
        dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
        self.metrics.write(MemoryLine(int(peaks[0])), self.config.train.num_iterations)
        self.checkpoints.close()
        for name in ("teacher_stream", "heads"):
            if (opened := self.__dict__.get(name)) is not None:
                opened.close()
        self.metrics.close()
        self.progress.close()
        dist.barrier()
        dist.destroy_process_group()


def write_evaluation(run: RunDir, name: str, accuracy: dict[str, Any]) -> None:
    path = run.path / "evaluations" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    write_json(path, accuracy)
