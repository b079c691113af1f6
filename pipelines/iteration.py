"""One iteration of a consolidation: its number, seeds and files, and what its phases share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

from mtopd.config import ConsolidateConfig
from mtopd.hidden_cache import sample_key
from mtopd.megatron import parallel
from mtopd.megatron.agreement import STALE_WAITS_S, digest_of, see_alike
from mtopd.run_dir import RunDir, is_sealed, read_seal
from mtopd.teacher_offload.teachers import Teachers
from mtopd.trajectories import (
    TokenStore,
    check_seals,
    sealed_shards,
    shard_is_sealed,
    verify_shards,
)
from mtopd.types import SampleMetadata


class Iteration:
    """What every phase works on.  Number n begins with the student after n iterations."""

    def __init__(
        self,
        number: int,
        run: RunDir,
        config: ConsolidateConfig,
        teachers: Teachers,
        ranks: parallel.Ranks,
    ) -> None:
        self.number = number
        self.trajectories = run.trajectories(number)
        self.token_logs = run.token_logs(number)
        self.hidden_cache = run.hidden_cache(number)
        self.evaluation = run.evaluation(number)
        self._run = run
        self._config = config
        self._teachers = teachers
        self._ranks = ranks
        self._cache_keys: dict[int, bytes] = {}

    @property
    def next(self) -> Iteration:
        """The one that begins with what this one leaves; after the last it has a number, no files."""
        return Iteration(self.number + 1, self._run, self._config, self._teachers, self._ranks)

    @property
    def is_last(self) -> bool:
        return self.number + 1 == self._config.train.num_iterations

    @property
    def oldest_trained(self) -> int:
        """Tokens of students before this one are not trained (``rollout.max_staleness``)."""
        return self.number - self._config.rollout.max_staleness

    @property
    def seed(self) -> int:
        """Seed of the shuffle of samples into train steps."""
        return self._seed(self.number)

    def step_number(self, number: int) -> int:
        """The number in the run of this iteration's train step ``number``."""
        return self.number * self._config.train.train_steps_per_iteration + number

    def step_seed(self, train_step: int) -> int:
        """Seed of the tokens that a train step measures its statistics on."""
        return self._seed(train_step)

    def _seed(self, number: int) -> int:
        return self._config.seed * 1_000_003 + number

    @cached_property
    def tokens(self) -> TokenStore:
        """The trajectories, opened once for all phases.  Collective when first asked for: all ranks
        have to list the same shards, and one rank of every node compares them with their seals.
        """
        return self._open(lambda: sealed_shards(self.trajectories))

    def tokens_of(self, shards: Sequence[str]) -> TokenStore:
        """These shards alone, which rank 0 has seen sealed, while others are still to come.
        Collective.
        """
        folder = self.trajectories
        return self._open(lambda: [name for name in shards if shard_is_sealed(folder, name)])

    def _open(self, find: Callable[[], list[str]]) -> TokenStore:
        """The shards that ``find`` names, once it names the same on every rank."""
        folder, ranks = self.trajectories, self._ranks
        shards = see_alike(
            ranks,
            find,
            lambda names: (digest_of(names), f"lists {len(names)} sealed shards in {folder}"),
            waits_s=STALE_WAITS_S,
        )

        def opened() -> TokenStore:
            if ranks.local_rank == 0:
                # A folder that is not sealed yet has shards to come.
                listed = read_seal(folder).get("shards") if is_sealed(folder) else None
                if listed is not None:
                    check_seals(folder, listed)
                verify_shards(folder, shards)
            return TokenStore(folder, shards)

        return see_alike(
            ranks,
            opened,
            lambda store: (digest_of(store.seals), f"reads {len(store.seals)} shards in {folder}"),
        )

    @property
    def samples(self) -> list[SampleMetadata]:
        """What planning knows of the trajectories, in the order of the shards."""
        return [*self.tokens.samples.values()]

    def cache_key(self, sample: SampleMetadata) -> bytes:
        """What names the sample's rows in the hidden cache, hashed once for all phases."""
        key = self._cache_keys.get(sample.sample_id)
        if key is None:
            index = sample.teacher_index
            fingerprint = self._teachers.stores[index].fingerprint
            key = sample_key(
                fingerprint,
                sample.token_hash,
                self._teachers.hidden_dtype(index),
                sample.teacher_prompt_hash,
            )
            self._cache_keys[sample.sample_id] = key
        return key
