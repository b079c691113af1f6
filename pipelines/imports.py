"""The body of ``mtopd trajectories import``: rows of another harness become an iteration's sealed
trajectories.

Shards are written beside the iteration's trajectories and take their name in one rename when every
row of every file was found sound: until then no phase sees any of them.  A killed import goes on
behind its last sealed shard.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from mtopd import trajectories
from mtopd.config import ConsolidateConfig
from mtopd.config_file import load_config
from mtopd.content import ContentNotes, FileContent
from mtopd.data import route
from mtopd.files import publish_tree, read_json, remove_tree, sweep, write_json
from mtopd.manifest import read_manifest
from mtopd.progress import say
from mtopd.prompt_table import PromptIndex
from mtopd.rollout.ending import Ending
from mtopd.run_dir import RunDir, is_sealed, read_seal
from mtopd.teacher_offload.store import open_store
from mtopd.tokenizer import load_tokenizer, tokenizer_hash, vocab_size
from mtopd.trajectories.row_checks import KnownTeacher, Problems, RowChecks, SampleIds
from mtopd.trajectories.rows import Problem, Row, place, read_rows, row_file_ending
from mtopd.types import MtopdError, Trajectory, num_input_tokens

from .carry_over import check_import

IMPORT = "trajectories.import"  # beside trajectories: shards of an import that has not ended
# A shard is full with so many tokens or samples: what an import holds in memory.
SHARD_TOKENS, SHARD_SAMPLES = 1 << 19, 4096
_NOTE = "import.json"  # of what the shards of an unfinished import are made


def import_rows(
    run_dir: Path, files: Sequence[Path], iteration: int | None, console: Console
) -> None:
    """Make the rows of ``files`` the sealed trajectories of an iteration; default: the one that the
    newest checkpoint begins.  Raises MtopdError that names every kind of bad row.
    """
    run = RunDir(run_dir)
    for path in (run.config, run.manifest, run.prompts):
        if not path.is_file():
            raise MtopdError(
                f"{run_dir} is not a prepared run directory (no {path.name}); make it with `mtopd "
                "consolidate CONFIG --check`, then import into its run_dir"
            )
    config = load_config(run.config, [], ConsolidateConfig)
    number = max(run.sealed_checkpoints(), default=0) if iteration is None else iteration
    if number > (last := config.train.num_iterations - 1):
        raise MtopdError(f"the run has iterations 0..{last}, {number} was asked for")
    check_import(config)
    for path in files:
        row_file_ending(path)
    if len({path.resolve() for path in files}) < len(files):
        raise MtopdError("one file is given twice: its samples would be trained on twice")
    with run.lock():
        contents = [c for path in files for c in ContentNotes().content_of(path).values()]
        sources = [{"size": c.size, "sha256": c.sha256} for c in contents]
        if _is_imported(run.trajectories(number), sources):
            say(f"iteration {number} holds the samples of these files already")
            return
        run.take_generation()
        work = _Import(run, config, number, sources)
        work.read(files, contents, console)
        work.publish()
    say(
        f"iteration {number} has {work.num_rows:,} samples; go on with `mtopd teacher-pass {run_dir} "
        f"--iteration {number}` and `mtopd train {run_dir} --iteration {number}`, or with the run"
    )


def _is_imported(target: Path, sources: Sequence[dict[str, Any]]) -> bool:
    """Whether the iteration's trajectories are these files' already.  Raises MtopdError where they are
    others.
    """
    if is_sealed(target):
        if read_seal(target).get("imported") == sources:
            return True
        raise MtopdError(
            f"{target} is sealed, and sealed trajectories are never overwritten; import into "
            "another iteration, or remove that folder"
        )
    if target.exists() and any(target.iterdir()):
        raise MtopdError(
            f"{target} holds trajectories of a rollout that has begun; let it end, or remove the "
            "folder"
        )
    return False


class _Import:
    """One import under the run's lock: what it has read, and the shard that it fills."""

    def __init__(
        self, run: RunDir, config: ConsolidateConfig, number: int, sources: Sequence[dict[str, Any]]
    ) -> None:
        self._run = run
        self._target = run.trajectories(number)
        self._staging = self._target.with_name(IMPORT)
        self._sources = sources
        prompts = PromptIndex(run)
        self._checks = build_checks(run, config, number, prompts)
        self._held_out = prompts.held_out_tokens()
        self._num_held_out = 0  # rows that answer one of those
        self._problems, self._ids = Problems(), SampleIds()
        self._shard: list[Trajectory] = []
        self._tokens = 0  # of that shard
        self.num_rows = 0
        self._begin({"sources": sources, "run": _identity(run, config)})

    def _begin(self, made_of: dict[str, Any]) -> None:
        """Keep the sealed shards of a killed import of the same files into the same run."""
        note = self._staging / _NOTE
        if self._staging.exists() and not (note.is_file() and read_json(note) == made_of):
            remove_tree(self._staging)
        self._staging.mkdir(parents=True, exist_ok=True)
        sweep(self._staging)
        write_json(note, made_of)
        names = trajectories.sealed_shards(self._staging)
        whole = [trajectories.shard_is_sealed(self._staging, name) for name in names]
        self._kept = names[: [*whole, False].index(False)]
        self._num_shards = len(self._kept)

    def _kept_ids(self) -> Iterator[int]:
        for name in self._kept:
            metadata = trajectories.read_shard_metadata(self._staging, name)
            yield from metadata["sample_id"].to_pylist()

    def read(
        self, files: Sequence[Path], contents: Sequence[FileContent], console: Console
    ) -> None:
        """Check every row, write full shards.  Raises MtopdError that names what is wrong."""
        kept_ids = [*self._kept_ids()]
        columns = (TextColumn("rows"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task("rows", total=sum(content.size for content in contents))
            before = 0
            for path, content in zip(files, contents, strict=True):
                self._ids.begin_file()

                def at(position: int, before: int = before) -> None:
                    progress.update(bar, completed=before + position)

                skip = max(0, len(kept_ids) - self.num_rows)
                for line, found in read_rows(path, skip=skip, at=at):
                    if found is None:
                        self._ids.add(kept_ids[self.num_rows], line)
                    else:
                        self._take(path, line, found)
                    self.num_rows += 1
                before += content.size
                _check_unchanged(path, content)
        for sample_id, again, first in self._ids.twice():
            where, other = (place(files[file], line) for file, line in (again, first))
            self._problems.add(where, [("sample_id", f"is {sample_id}, as in {other}")])
        if self._problems.num_rows or not self.num_rows:
            remove_tree(self._staging)
        self._problems.check(self.num_rows)
        if not self.num_rows:
            raise MtopdError(f"{', '.join(map(str, files))}: no rows; at least one is needed")

    def _take(self, path: Path, line: int, found: Row | list[Problem]) -> None:
        checked = self._checks.trajectory(found) if isinstance(found, Row) else found
        if isinstance(found, Row) and 0 <= found.sample_id < 1 << 63:
            self._ids.add(found.sample_id, line)
        if isinstance(checked, list):
            self._problems.add(place(path, line), checked)
        elif not self._problems.num_rows:  # else nothing will be published: rows are only looked at
            self._shard.append(checked)
            self._tokens += num_input_tokens(len(checked.prompt_ids), len(checked.response_ids))
            self._tokens += len(checked.teacher_prompt_ids or ())
            self._num_held_out += checked.prompt_ids in self._held_out
            if self._tokens >= SHARD_TOKENS or len(self._shard) >= SHARD_SAMPLES:
                self._write()

    def _write(self) -> None:
        name = f"import-{self._num_shards:05d}"
        trajectories.write_shard(self._staging, name, self._shard, self._run.generation)
        self._num_shards += 1
        self._shard, self._tokens = [], 0

    def publish(self) -> None:
        """Seal the shards and give them the iteration's name."""
        if self._num_held_out:
            say(
                f"{self._num_held_out} samples answer held-out prompts: the accuracy on them will say "
                "little of new ones"
            )
        if self._shard:
            self._write()
        (self._staging / _NOTE).unlink()
        seals = trajectories.seal_hashes(self._staging)
        self._run.seal(self._staging, {"imported": self._sources, "shards": seals})
        publish_tree(self._staging, self._target)


def _check_unchanged(path: Path, content: FileContent) -> None:
    found = path.stat()
    if (found.st_size, found.st_mtime_ns) != (content.size, content.mtime_ns):
        raise MtopdError(f"{path} changed while it was read; import it when it is complete")


def build_checks(
    run: RunDir, config: ConsolidateConfig, number: int, prompts: PromptIndex
) -> RowChecks:
    """What a row must be to be trained on in this iteration of the run."""
    manifest = read_manifest(run)
    tokenizer = load_tokenizer(config.student.model)
    if tokenizer_hash(tokenizer) != manifest["tokenizer_hash"]:
        raise MtopdError(
            f"{config.student.model} has another tokenizer than the run began with; put it back"
        )
    stores = [
        open_store(teacher.store, name=teacher.name, expected=known["fingerprint"])
        for teacher, known in zip(config.teachers, manifest["teachers"], strict=True)
    ]
    routes = {teacher.name: teacher.route for teacher in config.teachers}
    ends = [*manifest["end_ids"], *config.rollout.stop_ids]
    return RowChecks(
        iteration=number,
        vocab_size=vocab_size(tokenizer),
        context_length=config.data.context_length,
        teachers=[
            KnownTeacher(store.name, teacher.route, store.vocab_size)
            for store, teacher in zip(stores, config.teachers, strict=True)
        ],
        teacher_of=lambda fields: route(fields, routes),
        prompt=prompts.training_prompt,
        held_out=prompts.is_held_out,
        is_over=Ending(tokenizer, ends, config.rollout.stop).is_over,
    )


def _identity(run: RunDir, config: ConsolidateConfig) -> str:
    """Changes with all of the run that decides whether a row is sound, and what becomes of it."""
    manifest, settings = read_manifest(run), config.model_dump(mode="json")
    parts = [settings["data"], settings["teachers"], settings["rollout"]]
    parts += [manifest[key] for key in ("inputs", "teachers", "tokenizer_hash", "end_ids")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
