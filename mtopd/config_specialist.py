"""The config of supervised training of one model, which may end as a teacher store."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from mtopd.config import OptimizerConfig, StudentConfig
from mtopd.config_data import DataConfig
from mtopd.config_rollout import SamplingConfig
from mtopd.config_values import Count, Items, LocalPath, Model, Name, Seed, Slices, Turns


class StopConfig(Model):
    """Stop when accuracy on the held-out prompts of *every* source lies within ``accuracy``
    +- ``tolerance``.

    A source's share of the mini-batch follows how far it is below ``accuracy``; one that is above
    gets ``min_share`` of it, so that sources which learn at different speeds arrive together.
    """

    accuracy: Annotated[float, Field(gt=0, le=1)]
    """The target."""
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """How far from it still counts."""
    every: Count = 10
    """Train steps between two looks."""
    first: Count = 50
    """Train steps before the first look."""
    min_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of a mini-batch that a source above the target keeps."""


class TeacherStoreConfig(Model):
    name: Name
    """The teacher's name."""
    path: LocalPath
    """Folder of the store."""
    slices: Slices = 1
    """Largest tensor-parallel size that can load it without a copy; auto: as many as the model has,
    up to 8.
    """


class SupervisedConfig(Model):
    num_steps: Turns
    """A later start of the run may have more."""
    global_batch_size: Items
    """Samples of a train step."""
    micro_batch_size: Items
    """Samples of one forward pass of a rank."""
    optimizer: OptimizerConfig
    """AdamW and its schedule."""
    stop: StopConfig | None = None
    """End early, by accuracy."""


class SupervisedCheckpointConfig(Model):
    every: Count = 100
    """Train steps between checkpoints."""
    keep: Count = 2
    """Newest checkpoints that are kept."""


class SpecialistConfig(Model):
    run_dir: LocalPath
    """Folder of everything the run writes; a start in it goes on."""
    seed: Seed = 0
    """Of mini-batches and of what is drawn."""
    log_json: bool = False
    """Metrics lines on standard output instead of a progress display."""
    student: StudentConfig
    """The model that is trained."""
    data: DataConfig
    """Examples: prompts with answers."""
    train: SupervisedConfig
    """Train steps."""
    evaluation: SamplingConfig = SamplingConfig()
    """How held-out prompts are answered."""
    checkpoint: SupervisedCheckpointConfig = SupervisedCheckpointConfig()
    """Checkpoints."""
    store: TeacherStoreConfig | None = None
    """Write the result as a teacher, too."""

    @model_validator(mode="after")
    def _answers_are_one_turn(self) -> SpecialistConfig:
        for i, source in enumerate(self.data.sources):
            if source.environment is not None:
                raise ValueError(
                    f"data.sources.{i}.environment has no effect here: a specialist learns the answers "
                    "in its rows; leave it out"
                )
        return self

    @model_validator(mode="after")
    def _store_stands_beside(self) -> SpecialistConfig:
        run, store = self.run_dir, self.store
        if store is not None and (store.path.is_relative_to(run) or run.is_relative_to(store.path)):
            raise ValueError(
                f"store.path {store.path} and run_dir {run}: a store is no part of a run, nor a run "
                "of a store; give it a folder of its own"
            )
        return self

    @model_validator(mode="after")
    def _stop_can_come(self) -> SpecialistConfig:
        stop = self.train.stop
        if stop is None:
            return self
        for i, source in enumerate(self.data.sources):
            if not source.has_held_out:
                raise ValueError(
                    f"train.stop looks at held-out prompts of every source, but data.sources.{i} "
                    f"({source.name!r}) has none; give it an eval_path, or leave train.stop out"
                )
        due = -(-stop.first // stop.every) * stop.every
        if due > self.train.num_steps:
            raise ValueError(
                f"train.stop (first {stop.first}, every {stop.every}) is first looked at after step "
                f"{due}, but train.num_steps is {self.train.num_steps}; lower first or every, or "
                "leave train.stop out"
            )
        return self
