"""The prompts of a run: drawn, routed and tokenized once by the launcher, mapped by every rank.

``run/prompts.arrow`` holds one row per prompt in a fixed order: sources in config order, train rows
then held-out rows.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from mtopd.config_data import DataConfig
from mtopd.data import (
    Overlong,
    PromptSource,
    Routes,
    SupervisedExample,
    load_source,
    refuse_overlong,
    tokenize_answers,
    tokenize_prompts,
    verify,
)
from mtopd.data.tally import PromptTally
from mtopd.files import open_atomic
from mtopd.run_dir import RunDir
from mtopd.types import MtopdError, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SCHEMA = pa.schema(
    [
        ("source", pa.int32()),
        ("held_out", pa.bool_()),
        ("prompt_id", pa.string()),
        ("route", pa.string()),
        ("teacher_index", pa.int32()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("answer_ids", pa.list_(pa.int32())),  # supervised training only: ends with EOS
        ("verify", pa.string()),  # held-out rows only
        ("conversation", pa.string()),  # of sources with an environment
    ]
)
_ROWS_AT_ONCE = 4096  # prompts that are held as Python objects while the table is written


@dataclass(frozen=True)
class PromptTable:
    """Prompts of one source, read from the mapped table when asked for."""

    rows: pa.Table

    def __len__(self) -> int:
        return int(self.rows.num_rows)

    def __getitem__(self, index: int) -> Prompt:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = {
            name: self.rows[name][index].as_py()
            for name in _SCHEMA.names[2:]
            if name != "answer_ids"
        }
        return Prompt(
            row["prompt_id"],
            json.loads(row["route"]),
            tuple(row["prompt_ids"]),
            row["teacher_index"],
            json.loads(row["verify"]),
            json.loads(row["conversation"]),
        )

    def example(self, index: int) -> SupervisedExample:
        ids, answer = self.rows["prompt_ids"][index].as_py(), self.rows["answer_ids"][index].as_py()
        return SupervisedExample(tuple(ids), tuple(answer))


@dataclass(frozen=True)
class Prompts:
    """One table per source for training and, where the source has them, held-out prompts."""

    names: list[str]
    train: list[PromptTable]
    evaluation: list[list[Prompt]]

    @staticmethod
    def load(run: RunDir, config: DataConfig) -> Prompts:
        table = _map_table(run.prompts)
        part = 2 * table["source"].to_numpy() + table["held_out"].to_numpy()  # ascends
        ends = np.searchsorted(part, np.arange(2 * len(config.sources) + 1)).tolist()
        # Slices are views of the mapped file: a rank does not hold the prompts.
        parts = [PromptTable(table.slice(a, b - a)) for a, b in itertools.pairwise(ends)]
        held_out = [[table[i] for i in range(len(table))] for table in parts[1::2]]
        return Prompts([source.name for source in config.sources], parts[::2], held_out)

    @property
    def num_held_out(self) -> int:
        return sum(map(len, self.evaluation))

    def held_out_by_domain(self, teachers: Sequence[str]) -> dict[str, list[Prompt]]:
        """Held-out prompts by the name that their accuracy has: the source's, or source/teacher
        where its prompts go to several of ``teachers``.
        """
        found: dict[str, list[Prompt]] = {}
        for source, prompts in zip(self.names, self.evaluation, strict=True):
            asked = sorted({p.teacher_index for p in prompts})
            for index in asked:
                name = domain_name(source, teachers[index]) if len(asked) > 1 else source
                found[name] = [p for p in prompts if p.teacher_index == index]
        return found

    @staticmethod
    def score(prompt: Prompt, response_text: str) -> float:
        return verify(prompt, response_text)


class PromptIndex:
    """The prompts of a run by their ids."""

    def __init__(self, run: RunDir) -> None:
        table = _map_table(run.prompts)
        self._table = PromptTable(table)
        self._held_out = table["held_out"]
        self._row_of = {name: row for row, name in enumerate(table["prompt_id"].to_pylist())}

    def training_prompt(self, prompt_id: str) -> Prompt | None:
        row = self._row_of.get(prompt_id)
        return None if row is None or self._held_out[row].as_py() else self._table[row]

    def held_out_tokens(self) -> set[tuple[int, ...]]:
        """What the held-out prompts ask, whatever they are called."""
        return {*map(tuple, self._table.rows.filter(self._held_out)["prompt_ids"].to_pylist())}

    def is_held_out(self, prompt_id: str) -> bool:
        row = self._row_of.get(prompt_id)
        return row is not None and bool(self._held_out[row].as_py())


def _map_table(path: Path) -> pa.Table:
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise MtopdError(
            f"{path} is damaged ({error}); remove it and start the run again"
        ) from None
    if table.schema != _SCHEMA:
        raise MtopdError(
            f"{path} was written by another version; remove it and start the run again"
        )
    return table


def domain_name(source: str, teacher: str) -> str:
    """Of a source's prompts that go to this of its teachers; neither name has a slash."""
    return f"{source}/{teacher}"


def held_out_teachers(run: RunDir) -> dict[int, list[int]] | None:
    """By source, the indices of the teachers that its held-out prompts go to, in order; None where
    no table can be read.
    """
    try:
        table = _map_table(run.prompts)
    except MtopdError:
        return None
    chosen = table.filter(table["held_out"]).select(["source", "teacher_index"])
    found: dict[int, set[int]] = {}
    for source, teacher in zip(*(column.to_pylist() for column in chosen.columns), strict=True):
        found.setdefault(source, set()).add(teacher)
    return {source: sorted(teachers) for source, teachers in found.items()}


def write_prompt_table(
    run: RunDir,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    routes: Routes,
    *,
    supervised: bool,
    progress: Callable[[str], None],
    per_iteration: int = 0,
) -> None:
    """Draw, route and tokenize every prompt, and write the run's table.  Raises MtopdError for what
    cannot be used.

    ``per_iteration``: prompts that an iteration takes of each source; said where it has fewer.
    """
    if run.prompts.exists():
        return
    overlong: list[Overlong] = []
    tally = PromptTally(routes)
    with open_atomic(run.prompts) as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        for number, source in enumerate(config.sources):
            progress(f"preparing prompts of {source.name}")
            train, held_out = load_source(source, progress)
            num_train = 0
            for rows, is_held_out in ((train, False), (held_out, True)):
                if rows is None:
                    continue
                num_overlong = len(overlong)
                for first in range(0, len(rows.rows), _ROWS_AT_ONCE):
                    chosen = range(first, min(first + _ROWS_AT_ONCE, len(rows.rows)))
                    learn = supervised and not is_held_out
                    answers = tokenize_answers(rows, tokenizer, rows=chosen) if learn else None
                    prompts = tokenize_prompts(
                        rows,
                        tokenizer,
                        routes,
                        context_length=config.context_length,
                        max_response=config.max_response,
                        answers=answers,
                        overlong=overlong,
                        rows=chosen,
                        environment=None if source.environment is None else source.name,
                    )
                    tally.add(prompts, is_held_out)
                    num_train += 0 if is_held_out else len(prompts)
                    writer.write_batch(_batch(number, prompts, answers, is_held_out))
                if config.overlong == "drop":
                    _say_dropped(rows, len(overlong) - num_overlong, progress)
            if 0 < num_train < per_iteration:
                progress(
                    f"{source.name}: an iteration takes {per_iteration} prompts of it "
                    f"(rollout.prompts_per_iteration), it has {num_train}: each comes "
                    f"{per_iteration / num_train:.3g} times on average, answered anew each time"
                )
        if config.overlong == "error":
            refuse_overlong(overlong, config.context_length)
        tally.check_every_teacher_is_asked()
        tally.say_seen(progress)


def _batch(
    source: int,
    prompts: Sequence[Prompt],
    answers: Mapping[str, Sequence[int]] | None,
    is_held_out: bool,
) -> pa.RecordBatch:
    columns = {
        "source": [source] * len(prompts),
        "held_out": [is_held_out] * len(prompts),
        "prompt_id": [p.prompt_id for p in prompts],
        "route": [json.dumps(dict(p.route), sort_keys=True) for p in prompts],
        "teacher_index": [p.teacher_index for p in prompts],
        "prompt_ids": [p.prompt_ids for p in prompts],
        "answer_ids": [answers[p.prompt_id] if answers else () for p in prompts],
        "verify": [
            json.dumps(dict(p.verify), sort_keys=True) if is_held_out else "{}" for p in prompts
        ],
        "conversation": [json.dumps(dict(p.conversation), default=str) for p in prompts],
    }
    return pa.record_batch(columns, schema=_SCHEMA)


def _say_dropped(source: PromptSource, num_dropped: int, progress: Callable[[str], None]) -> None:
    if num_dropped == len(source.rows):
        raise MtopdError(
            f"all {num_dropped} prompts of {source.name} leave no room for the response, and "
            "data.overlong=drop leaves them out: raise data.context_length, or remove the source"
        )
    if num_dropped:
        progress(
            f"{source.name}: {num_dropped} of {len(source.rows)} prompts leave no room for the "
            "response and are left out"
        )
