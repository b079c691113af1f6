"""What a row of another harness must be so that a run can train on it, and the trajectory it becomes."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mtopd.trajectories.format import FINISH_REASONS
from mtopd.trajectories.rows import Problem, Row
from mtopd.types import MtopdError, Prompt, Trajectory

_INT64, _FIRST = 1 << 63, 3  # rows named of each kind of problem


@dataclass(frozen=True)
class KnownTeacher:
    """What a row's teacher decides."""

    name: str
    route: Mapping[str, str]
    vocab_size: int


@dataclass(frozen=True)
class RowChecks:
    """The run that rows are imported into.

    ``prompt(id)``: a training prompt of the run; None where it has none of that id.
    ``held_out(id)``: whether it is a held-out one.  ``is_over(response_ids)``: whether its last
    token ends a response.  ``teacher_of(route)``: index of the teacher; raises MtopdError.
    """

    iteration: int
    vocab_size: int  # of the student's tokenizer
    context_length: int
    teachers: Sequence[KnownTeacher]
    teacher_of: Callable[[Mapping[str, str]], int]
    prompt: Callable[[str], Prompt | None]
    held_out: Callable[[str], bool]
    is_over: Callable[[Sequence[int]], bool]

    def trajectory(self, row: Row) -> Trajectory | list[Problem]:
        """The trajectory that a row is, or all that is wrong with it."""
        problems = [*self._token_problems(row), *self._sampling_problems(row)]
        try:
            teacher, route = self._teacher(row)
        except _Refused as refused:
            return [*problems, refused.problem]
        if row.teacher_prompt_ids is not None:
            known = self.teachers[teacher]
            owner = f"teacher {known.name!r}"
            problems += _id_problems(
                "teacher_prompt_ids", row.teacher_prompt_ids, known.vocab_size, owner
            )
        if problems:
            return problems
        context = row.teacher_prompt_ids
        return Trajectory(
            sample_id=row.sample_id,
            prompt_id=row.prompt_id,
            route=route,
            teacher_index=teacher,
            prompt_ids=tuple(row.prompt_ids),
            response_ids=tuple(row.response_ids),
            loss_mask=tuple(row.loss_mask),
            rollout_log_probs=tuple(row.rollout_log_probs),
            student_version=row.student_version,
            finish_reason=row.finish_reason,
            reward=row.reward,
            teacher_prompt_ids=None if context is None else tuple(context),
        )

    def _token_problems(self, row: Row) -> Iterable[Problem]:
        for name in ("prompt_ids", "response_ids"):
            yield from _id_problems(name, getattr(row, name), self.vocab_size, "the student")
        length = len(row.prompt_ids) + len(row.response_ids)
        if length > self.context_length:
            yield (
                "response_ids",
                f"makes {length} tokens with prompt_ids; data.context_length is "
                f"{self.context_length}",
            )
        for name in ("loss_mask", "rollout_log_probs"):
            if (found := len(getattr(row, name))) != len(row.response_ids):
                yield name, f"has {found} entries for {len(row.response_ids)} response_ids"
        if others := {*row.loss_mask} - {0, 1}:
            yield "loss_mask", f"holds {min(others)}; only 0 and 1 are allowed"
        elif row.response_ids and 1 not in row.loss_mask:
            yield "loss_mask", "has no 1: nothing of the row is trained; leave it out"
        log_probs = np.asarray(row.rollout_log_probs, np.float64)
        if len(wrong := np.flatnonzero(~(np.isfinite(log_probs) & (log_probs <= 0)))):
            yield (
                "rollout_log_probs",
                f"holds {log_probs[wrong[0]]} at [{wrong[0]}]; a sampled token's log-prob is "
                "finite and at most 0",
            )

    def _sampling_problems(self, row: Row) -> Iterable[Problem]:
        if not 0 <= row.sample_id < _INT64:
            yield "sample_id", f"is {row.sample_id}; needed is 0 or more, of 63 bits"
        if row.student_version != self.iteration:
            yield (
                "student_version",
                f"is {row.student_version}; iteration {self.iteration} trains on what student "
                f"{self.iteration} sampled",
            )
        if row.finish_reason not in FINISH_REASONS:
            allowed = ", ".join(map(repr, FINISH_REASONS))
            yield "finish_reason", f"is {row.finish_reason!r}; needed is one of {allowed}"
        elif row.finish_reason == "stop" and row.response_ids and not self._ends(row.response_ids):
            yield (
                "finish_reason",
                f"is 'stop', but the last of response_ids, {row.response_ids[-1]}, ends no "
                "response: the end token belongs to it and is trained",
            )
        if row.reward is not None and not math.isfinite(row.reward):
            yield "reward", f"is {row.reward}; needed is a finite number, or null"

    def _ends(self, response_ids: Sequence[int]) -> bool:
        in_vocabulary = min(response_ids) >= 0 and max(response_ids) < self.vocab_size
        return not in_vocabulary or self.is_over(response_ids)  # said of the ids already

    def _teacher(self, row: Row) -> tuple[int, Mapping[str, str]]:
        """Index of the row's teacher and the fields that chose it: what the row says, else its prompt
        if that is one of the run's.
        """
        prompt = self.prompt(row.prompt_id)
        if prompt is not None and tuple(row.prompt_ids) != prompt.prompt_ids:
            raise _Refused(
                "prompt_ids",
                f"are not the {len(prompt.prompt_ids)} tokens of the run's prompt "
                f"{row.prompt_id!r}; correct them, or give the row another prompt_id",
            )
        if prompt is None and self.held_out(row.prompt_id):
            raise _Refused("prompt_id", f"{row.prompt_id!r} is held out; training spoils it")
        route: Mapping[str, str] | None = row.route
        if route is None and prompt is not None:
            route = prompt.route
        found: int | None = None
        if route is not None:
            try:
                found = self.teacher_of(route)
            except MtopdError as error:
                raise _Refused("route", f"is no teacher's: {error}") from None
        if row.teacher is None:
            if found is None or route is None:
                raise _Refused(
                    "teacher",
                    f"is missing, so is route, and the run has no training prompt "
                    f"{row.prompt_id!r}: one of them must say whose the row is",
                )
            return found, route
        names = [teacher.name for teacher in self.teachers]
        if row.teacher not in names:
            known = ", ".join(map(repr, names))
            raise _Refused("teacher", f"is {row.teacher!r}; the run has {known}")
        index = names.index(row.teacher)
        if found is not None and found != index:
            raise _Refused(
                "teacher",
                f"is {row.teacher!r}, but {dict(route or {})} is {names[found]!r}'s route",
            )
        return index, self.teachers[index].route if route is None else route


def _id_problems(name: str, ids: Sequence[int], vocab_size: int, owner: str) -> Iterable[Problem]:
    if not ids:
        yield name, "is empty; at least one token is needed"
    elif not (min(ids) >= 0 and max(ids) < vocab_size):
        index = next(i for i, token in enumerate(ids) if not 0 <= token < vocab_size)
        yield name, f"holds {ids[index]} at [{index}]; {owner} has the ids 0..{vocab_size - 1}"


class _Refused(Exception):
    def __init__(self, column: str, text: str) -> None:
        self.problem: Problem = (column, text)


@dataclass
class Problems:
    """What is wrong with the rows of an import: counts of all, the first rows of each column."""

    num_rows: int = 0
    _kinds: dict[str, list[str]] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)

    def add(self, where: str, problems: Sequence[Problem]) -> None:
        self.num_rows += 1
        for column, text in problems:
            self._counts[column] = self._counts.get(column, 0) + 1
            named = self._kinds.setdefault(column, [])
            if len(named) < _FIRST:
                named.append(f"{where}: {text}")

    def check(self, total: int) -> None:
        """Raise MtopdError that names them all, if there are any."""
        if not self.num_rows:
            return
        kinds = []
        for column, named in self._kinds.items():
            count = self._counts[column]
            more = f"; and {count - len(named)} rows more" if count > len(named) else ""
            kinds.append(f"[{column}] {'; '.join(named)}{more}")
        raise MtopdError(
            f"{self.num_rows} of {total} rows cannot be imported, nothing was: {' '.join(kinds)}"
        )


class SampleIds:
    """The ids of all rows, to find one that stands twice: 16 bytes a row."""

    def __init__(self) -> None:
        self._ids, self._rows = array("q"), array("q")
        self._files: list[int] = []  # rows before each file

    def begin_file(self) -> None:
        self._files.append(len(self._ids))

    def add(self, sample_id: int, number: int) -> None:
        """``number``: of the line or row in its file."""
        self._ids.append(sample_id)
        self._rows.append(number)

    def twice(self) -> Iterable[tuple[int, tuple[int, int], tuple[int, int]]]:
        """(id, where it stands again, where it stood first) with places as (file, row), in the order
        of the rows.
        """
        ids = np.array(self._ids, np.int64)
        order = np.argsort(ids, kind="stable")
        again = np.flatnonzero(ids[order][1:] == ids[order][:-1]) + 1
        first_of = np.searchsorted(ids[order], ids[order][again])
        for row, first in sorted(zip(order[again].tolist(), order[first_of].tolist(), strict=True)):
            yield int(ids[row]), self._place(row), self._place(first)

    def _place(self, row: int) -> tuple[int, int]:
        file = int(np.searchsorted(self._files, row, side="right")) - 1
        return file, self._rows[row]
