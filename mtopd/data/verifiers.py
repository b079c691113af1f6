"""Score a response: comparison with the answer, or the verifier of a reasoning-gym dataset.

What a verifier needs travels in ``Prompt.verify`` as plain data, so a response can be scored in
another process.

The text of a response is never run as code.  Some verifiers of reasoning-gym do that: ``eval`` in
them is replaced by ``ast.literal_eval``, and datasets whose verifier hands the response to sympy's
parser are refused.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import functools
import io
import json
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from mtopd.data.answers import find_answer, same_answer
from mtopd.types import MtopdError, Prompt

CORRECT_SCORE = 0.999  # a response is correct from this score on


def verify(prompt: Prompt, response_text: str) -> float:
    """The verifier's score of a response, 0 to 1; it is correct from ``CORRECT_SCORE`` on.

    Raises MtopdError for a prompt whose ``verify`` is empty.
    """
    recipe = prompt.verify
    if not recipe:
        raise MtopdError(
            f"prompt {prompt.prompt_id} has no verifier; give its source an `answer` column"
        )
    return score(recipe, response_text)


def score(recipe: Mapping[str, Any], response_text: str) -> float:
    """The score of a response by a row's recipe, 0 to 1."""
    answer_from = recipe.get("answer_from")
    if recipe["verifier"] == "exact_match":
        return float(
            same_answer(
                response_text,
                recipe["answer"],
                answer_from=answer_from,
                normalize=recipe.get("normalize", ()),
            )
        )
    dataset = open_dataset(recipe)
    said = response_text if answer_from is None else find_answer(response_text, answer_from)
    with quiet():
        entry = dataset[recipe["index"]]
        try:
            return float(dataset.score_answer(answer=said, entry=entry))
        # the text is arbitrary and some verifiers raise on what they cannot read: a wrong answer
        except Exception:
            return 0.0


def compared(prompt: Prompt, response_text: str) -> tuple[str, str | None]:
    """The part of a response that counts, and the answer it is compared with; None where a dataset
    names none.
    """
    recipe = prompt.verify
    found = find_answer(response_text, recipe.get("answer_from"))
    if recipe["verifier"] == "exact_match":
        return found, str(recipe["answer"])
    answer = entry_of(open_dataset(recipe), recipe["index"], recipe["dataset"])["answer"]
    return found, None if answer is None else str(answer)


def entry_of(dataset: Any, index: int, name: str) -> Mapping[str, Any]:
    """One entry; a dataset whose options leave it nothing to draw raises what it likes."""
    try:
        with quiet():
            entry: Mapping[str, Any] = dataset[index]
    except Exception as error:
        raise MtopdError(
            f"reasoning-gym dataset '{name}' cannot draw its entry {index} "
            f"({type(error).__name__}: {error}); change the options in config"
        ) from error
    return entry


def open_dataset(recipe: Mapping[str, Any]) -> Any:
    """The reasoning-gym dataset of a recipe; every process draws the same entries from it."""
    try:
        options = json.dumps(recipe["options"], sort_keys=True)
    except (TypeError, ValueError) as error:
        raise MtopdError(
            f"config of reasoning-gym dataset '{recipe['dataset']}': {error}; use text, numbers, "
            "booleans, lists and tables"
        ) from None
    return _create_dataset(recipe["dataset"], options, recipe["size"], recipe["seed"])


@functools.cache
def _create_dataset(name: str, options: str, size: int, seed: int) -> Any:
    with quiet():
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

        if name not in DATASETS:
            near = difflib.get_close_matches(name, DATASETS, n=3)
            raise MtopdError(
                f"reasoning-gym has no dataset '{name}'; "
                + (f"near: {', '.join(near)}" if near else "")
            )
        try:
            dataset = reasoning_gym.create_dataset(
                name, size=size, seed=seed, **json.loads(options)
            )
        # a dataset's own checks raise what they like, mostly AssertionError and TypeError
        except Exception as error:
            raise MtopdError(
                f"reasoning-gym refuses the options {options} of dataset '{name}': {error}"
            ) from error
        _disarm_verifier(name, dataset)
        entry = entry_of(dataset, 0, name)
        if entry != dataset[0] or (entry["answer"] is not None and not _is_correct(dataset, entry)):
            raise MtopdError(
                f"reasoning-gym dataset '{name}' with options {options} does not draw the same "
                "entry twice, or does "
                "not accept its own answer; a run cannot be scored with it: use another dataset"
            )
    return dataset


def _is_correct(dataset: Any, entry: Mapping[str, Any]) -> bool:
    return bool(dataset.score_answer(answer=str(entry["answer"]), entry=entry) >= CORRECT_SCORE)


def _disarm_verifier(name: str, dataset: Any) -> None:
    """Keep ``score_answer`` from running a response as code: responses come from a model, or from
    the network.
    """
    score = type(dataset).score_answer
    if "parse_expr" in score.__code__.co_names:
        raise MtopdError(
            f"the verifier of reasoning-gym dataset '{name}' gives the response to sympy's parser, "
            "which runs it as "
            "code; use another dataset, or write the prompts to JSONL with an `answer` for exact "
            "match"
        )
    if "eval" in score.__code__.co_names:
        score.__globals__["eval"] = ast.literal_eval


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Datasets print and warn as they like."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
