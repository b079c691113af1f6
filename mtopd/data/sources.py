"""Sources of prompts, and the rows of a reasoning-gym dataset; files are in ``prompt_file``.

A source is a list of rows in a fixed order; ``<source name>/<row>`` names a prompt for the whole
run.  Nothing here samples, shuffles or remembers a position (``planning.select_prompts`` does);
nothing is cached on disk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mtopd.data.answers import AnswerFrom, check_pattern, find_answer
from mtopd.data.verifiers import CORRECT_SCORE, entry_of, open_dataset, score
from mtopd.tokenizer import Message, Tools
from mtopd.types import MtopdError

EVAL_SEED = 10_000_019
EXAMPLE_SEED = 20_000_003
_DRAWS_PER_PROMPT = 16  # bounds the search for unique prompts


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One prompt: its messages and tools as they stand in the file.  ``verify`` is empty when
    nothing can score a response.
    """

    messages: tuple[Message, ...]
    answer: str | None
    route: Mapping[str, str]
    verify: Mapping[str, Any]
    tools: Tools | None = None
    where: str = field(default="", compare=False)  # file and line, where it comes from one

    @property
    def question(self) -> str:
        """The text of the last message."""
        content = self.messages[-1].get("content") or ""
        return content if isinstance(content, str) else "".join(part["text"] for part in content)


@dataclass(frozen=True, slots=True)
class PromptSource:
    """Rows of one origin.  ``domain`` is the route field of that name where a row brings none of
    its own.
    """

    name: str
    domain: str
    rows: Sequence[PromptRow]


@dataclass(frozen=True, slots=True)
class Asking:
    """How a source puts its prompts, and where it looks for their answers.

    A system message and worked examples (question, answer) stand in front of every prompt as chat
    turns.  ``answer_from`` and ``normalize`` are rules of ``answers``.
    """

    system: str | None = None
    examples: tuple[tuple[str, str], ...] = ()
    answer_from: AnswerFrom | None = None
    normalize: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.answer_from, Mapping) and "regex" in self.answer_from:
            check_pattern(self.answer_from["regex"])

    def applied(self, row: PromptRow, where: str) -> PromptRow:
        """The row with all of this; ``where`` names it in errors."""
        own = row.messages[:1] if row.messages[0]["role"] == "system" else ()
        if own and self.system is not None:
            raise MtopdError(
                f"{where}: the prompt has a system message of its own, beside the source's; leave "
                "out `system`, or that message"
            )
        system = ({"role": "system", "content": self.system},) if self.system is not None else own
        turns = [
            {"role": role, "content": text}
            for example in self.examples
            for role, text in zip(("user", "assistant"), example, strict=True)
        ]
        rules = {"answer_from": self.answer_from, "normalize": list(self.normalize)}
        used = {key: rule for key, rule in rules.items() if rule and row.verify}
        return dataclasses.replace(
            row,
            messages=(*system, *turns, *row.messages[len(own) :]),
            verify={**row.verify, **used},
        )


AS_IT_STANDS = Asking()


def load_reasoning_gym(
    name: str,
    dataset: str,
    options: Mapping[str, Any],
    *,
    size: int,
    seed: int,
    eval_size: int = 256,
    eval_seed: int = EVAL_SEED,
    num_examples: int = 0,
    domain: str | None = None,
    asking: Asking = AS_IT_STANDS,
) -> tuple[PromptSource, PromptSource]:
    """The train pool ``name`` and the held-out set ``name-eval`` of a reasoning-gym dataset.

    The eval set is the first ``eval_size`` unique prompts drawn at ``eval_seed``.  ``num_examples``
    worked examples are drawn at a seed of their own, none of them an eval prompt.  The train pool
    is ``size`` draws at ``seed``, duplicates included, less every draw whose text is an eval prompt
    or an example.
    """
    domain = name if domain is None else domain
    draws = partial(_unique, name, domain, dataset, options)
    held_out = draws("eval_size", eval_size, eval_seed, {})
    examples = draws("num_examples", num_examples, EXAMPLE_SEED, held_out)
    train = [
        row
        for row in _draw(domain, dataset, options, size, seed)
        if row.question not in held_out and row.question not in examples
    ]
    if not train:
        raise MtopdError(
            f"source '{name}': none of {size} prompts of {dataset} is left after removing "
            f"{eval_size} eval prompts and {num_examples} examples; "
            f"raise the size, or widen the dataset's options {dict(options)}"
        )
    shown = tuple((row.question, row.answer or "") for row in examples.values())
    asking = dataclasses.replace(asking, examples=asking.examples + shown)
    sources = []
    for title, rows in ((name, train), (f"{name}-eval", list(held_out.values()))):
        asked = [asking.applied(row, f"{title}/{number}") for number, row in enumerate(rows)]
        sources.append(PromptSource(title, domain, asked))
    _check_reachable(sources[1])
    return sources[0], sources[1]


def _unique(
    name: str,
    domain: str,
    dataset: str,
    options: Mapping[str, Any],
    what: str,
    count: int,
    seed: int,
    taken: Mapping[str, PromptRow],
) -> dict[str, PromptRow]:
    """The first ``count`` different prompts at ``seed`` that are not ``taken``, by their text."""
    found: dict[str, PromptRow] = {}
    num_draws = count * _DRAWS_PER_PROMPT
    for row in _draw(domain, dataset, options, num_draws, seed) if count else ():
        if len(found) == count:
            break
        if row.question not in taken:
            found.setdefault(row.question, row)
    if len(found) < count:
        others = " beside the held-out ones" if taken else ""
        raise MtopdError(
            f"source '{name}': {num_draws} draws of {dataset} hold only {len(found)} unique "
            f"prompts{others}, {what} is {count}; lower it, or widen the dataset's options "
            f"{dict(options)}"
        )
    return found


def _check_reachable(source: PromptSource) -> None:
    """A right answer must still be right after ``answer_from`` took its part of it."""
    for number, row in enumerate(source.rows):
        rule = row.verify.get("answer_from")
        if rule is None or row.answer is None:
            continue
        if (part := find_answer(row.answer, rule)) == row.answer.strip():
            continue
        if score(row.verify, row.answer) < CORRECT_SCORE:
            raise MtopdError(
                f"prompt {source.name}/{number}: answer_from {rule} takes {part!r} out of the "
                f"right answer {row.answer!r}, which is wrong then; use another rule"
            )


def _draw(
    domain: str, dataset: str, options: Mapping[str, Any], size: int, seed: int
) -> Iterator[PromptRow]:
    # The entry itself is not kept: a verifier draws it again from these few values, in any process.
    recipe = {
        "verifier": "reasoning_gym",
        "dataset": dataset,
        "options": dict(options),
        "size": size,
        "seed": seed,
    }
    entries = open_dataset(recipe)
    for index in range(size):
        entry = entry_of(entries, index, dataset)
        messages = ({"role": "user", "content": entry["question"]},)
        answer = None if entry["answer"] is None else str(entry["answer"])
        yield PromptRow(messages, answer, {"domain": domain}, {**recipe, "index": index})


def with_fields(source: PromptSource, fields: Mapping[str, str]) -> PromptSource:
    """The source with ``fields`` added to every row's route; a row's own field of that name stands."""
    rows = [dataclasses.replace(row, route={**fields, **row.route}) for row in source.rows]
    return dataclasses.replace(source, rows=rows)
