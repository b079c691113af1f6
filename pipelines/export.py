"""The student as an HF folder, written by all ranks: none holds more of it than a bucket.

The weight files are dealt to the ranks; buckets of different files take turns, so that one rank
writes while the next bucket is on its way to another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path

from mtopd.families import without_further_heads
from mtopd.files import explain
from mtopd.hf_checkpoint import HFTensors
from mtopd.hf_export import begin_export, finish_export, unfinished
from mtopd.hf_weights import Bucket, TensorSpec, cut
from mtopd.hf_writer import SHARD_BYTES, Shard, ShardFile, plan_shards
from mtopd.megatron.agreement import decide, gather
from mtopd.progress import say
from mtopd.run_dir import RunDir, is_sealed
from mtopd.types import MtopdError

from .student import Student


def export(
    student: Student,
    run: RunDir,
    folder: Path,
    contents: Mapping[str, object] | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a normal HF checkpoint, whole or not at all, and seal it; ``contents`` go into the seal.
    What is sealed already stays.  Raises MtopdError on every rank.  Collective.
    """
    if decide(student.ranks, partial(is_sealed, folder)):
        return
    further = decide(student.ranks, partial(further_heads, student))

    def begin() -> None:
        changes = dict[str, object]()
        if not further:
            changes |= without_further_heads(student.hf_config)
        if not student.facts.has_tied_embeddings:  # whatever the source's config says
            changes["tie_word_embeddings"] = False
        left_out = begin_export(folder, student.config.model, changes, dtype=student.dtype)
        if left_out:
            say(f"not copied from {student.config.model} into {folder}: {', '.join(left_out)}")

    decide(student.ranks, begin)
    shards = plan_shards([*student.stream.tensors.values(), *further], shard_bytes)
    write_shards(student, unfinished(folder), shards)
    seal = partial(run.seal, contents=contents)
    decide(student.ranks, lambda: finish_export(folder, shards, seal))


def further_heads(student: Student) -> list[TensorSpec]:
    """Heads that predict further tokens: they go from the source's files into the export's."""
    if student.config.mtp != "freeze":
        return []
    source = HFTensors(student.config.model)
    names = [name for name in source if student.facts.is_further_head(name)]
    return [TensorSpec(name, source.shape(name), source.dtype(name)) for name in names]


def write_shards(student: Student, folder: Path, shards: list[Shard]) -> None:
    """Every rank writes its weight files.  A rank that cannot goes on to take part in gathering: the
    others would wait for it; then all raise what it met.  Collective.
    """
    ranks, stream = student.ranks, student.stream
    student.trainer.finish_param_sync()
    writers = [number % ranks.world_size for number in range(len(shards))]
    mine = {n: shard for n, shard in enumerate(shards) if writers[n] == ranks.rank}
    files: dict[int, ShardFile] = {}
    problem: Exception | None = None

    def attempt(write: Callable[[], None]) -> None:
        nonlocal problem
        if problem is None:
            try:
                write()
            except OSError as error:
                problem = MtopdError(explain(error))
            except MtopdError as error:
                problem = error

    def begin() -> None:
        for number, shard in mine.items():
            files[number] = ShardFile(folder / shard.name, shard.tensors)
            carried = [t.name for t in shard.tensors if t.name not in stream.tensors]
            source = HFTensors(student.config.model) if carried else {}
            for name in carried:
                files[number].write(name, source[name])

    def write(number: int, bucket: Bucket) -> None:
        for name, tensor in bucket.items():
            files[number].write(name, tensor)

    def close() -> None:
        for file in files.values():
            file.close()

    attempt(begin)
    for number, names in in_turns(shards, stream.tensors, student.config.bucket_bytes):
        attempt(partial(write, number, stream.gather(names, to=writers[number])))
    attempt(close)

    def outcome() -> None:
        if problem is not None:
            raise problem

    gather(ranks, outcome)


def in_turns(
    shards: list[Shard], streamed: Mapping[str, TensorSpec], bucket_bytes: int
) -> Iterator[tuple[int, list[str]]]:
    """(shard, names) of every bucket: the first ones of all files, then the second ones, ..."""
    plans = [
        [
            (number, [tensor.name for tensor in bucket])
            for bucket in cut(
                (t for t in shard.tensors if t.name in streamed),
                bucket_bytes,
                lambda tensor: tensor.nbytes,
            )
        ]
        for number, shard in enumerate(shards)
    ]
    return (turn for turn in chain.from_iterable(zip_longest(*plans)) if turn is not None)
