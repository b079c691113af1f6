"""Baselines: HF checkpoints that answer the held-out prompts beside the student, and the average of
their weights.

    mtopd evaluate RUN_DIR --baselines

Runs before a consolidation's report, too.  One model is in memory at a time, on every rank.  A
result is kept in the user's folder of caches under what it follows from, by content: another start,
or another run with the same models and prompts, does not evaluate it again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from mtopd.content import ContentNotes, digest
from mtopd.families import model_facts
from mtopd.hf_checkpoint import load_hf_config
from mtopd.hf_weights import average_weights, read_weights
from mtopd.megatron.agreement import apart, decide, gather
from mtopd.metrics_lines import BaselineLine
from mtopd.progress import logs_json, say
from mtopd.rollout.engine import Engine, Request, Sampling
from mtopd.rollout.memory_log import MemoryLog
from mtopd.rollout.sglang import BASELINE
from mtopd.tokenizer import tokenizer_hash
from mtopd.tokenizer_files import said
from mtopd.types import MtopdError, Prompt
from mtopd.user_cache import note_path, read_entry, write_entry

from . import evaluate
from .engines import ENGINES
from .evaluate import Result
from .session import Session

AVERAGE = "weight average"
_numbers = itertools.count()  # servers tell weights apart by their versions
_KIND = "baselines"  # of entries in the folder of caches
_VERSION = 3  # raised when the same weights and prompts may give other answers than before


def run_at_end(session: Session) -> None:
    """Evaluate what is not known yet; a baseline that fails is named, the run goes on.  Collective."""
    if session.config.evaluation.baselines_at_end and session.prompts.num_held_out:
        for problem in run(session):
            say(problem)


def run(session: Session) -> list[str]:
    """Evaluate every baseline that is not known yet; returns a line for each that failed.
    Collective.
    """
    config = session.config.evaluation
    named = [(name, [folder]) for name, folder in config.baselines.items()]
    if config.weight_average:
        named.append((AVERAGE, [config.baselines[name] for name in config.weight_average]))
    last = session.iteration(session.config.train.num_iterations)
    tell = say if logs_json(session.config.log_json) else session.progress.note
    found: dict[str, Result] = {}
    problems: list[str] = []
    if not named:
        return problems
    with session.timed("baselines", last):
        for number, (name, folders) in enumerate(named, start=1):
            where = f"baseline {name} ({number} of {len(named)})"
            try:
                result, is_kept = look_up_or_answer(session, folders, where, tell)
            except MtopdError as error:
                problems.append(f"{where} was not evaluated: {error}")
                continue
            found[name] = result
            write(session, found)
            line = BaselineLine(accuracy=result.accuracy, stopped=result.stopped, kept=is_kept)
            session.metrics.write(line, last.number, part=name)
            again = ", known from before" if is_kept else ""
            tell(f"{where}: {evaluate.format_accuracy(result.accuracy)}{again}")
    return problems


def look_up_or_answer(
    session: Session, folders: Sequence[Path], where: str, tell: Callable[[str], None]
) -> tuple[Result, bool]:
    """The model's result, and whether it was known; where it was not, that is told.  Raises
    MtopdError on every rank.  Collective.
    """
    key, known = look_up(session, folders, tell)
    if known is not None:
        return known, True
    tell(f"{where} ...")
    result = answer(session, folders)
    keep(session, key, result)
    return result, False


def look_up(
    session: Session, folders: Sequence[Path], tell: Callable[[str], None]
) -> tuple[str, Result | None]:
    """The key of a model, and what is kept under it.  Rank 0 reads, and tells of large files; every
    rank gets its word or the MtopdError that it met.  Collective.
    """

    def look() -> tuple[str, Result | None]:
        key = key_of(session, folders, tell)
        return key, _read(session, key)

    return decide(session.ranks, look)


def key_of(session: Session, folders: Sequence[Path], tell: Callable[[str], None]) -> str:
    """sha256, hex, over everything that a result follows from."""
    config, student = session.config, session.student
    notes = ContentNotes(note_path("contents"))
    contents = [
        digest(notes.content_of(folder, _model_files(folder), say=tell)) for folder in folders
    ]
    _without_error(notes.save)
    made_of = {
        "version": _VERSION,
        "models": contents,
        "engine": config.rollout.engine,
        "dtype": config.student.dtype,
        "device": session.ranks.device.type,
        "tokenizer": tokenizer_hash(student.tokenizer),
        "ends": [student.end_ids, config.rollout.stop_ids, config.rollout.stop],
        "batch_size": config.rollout.batch_size,
        "max_response": config.data.max_response,
        "sampling": config.evaluation.model_dump(include={"temperature", "top_p"}),
        "prompts": [
            [name, [[p.prompt_id, p.prompt_ids, p.verify] for p in prompts]]
            for name, prompts in _held_out(session).items()
        ],
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def _held_out(session: Session) -> dict[str, list[Prompt]]:
    return session.prompts.held_out_by_domain(evaluate.teachers_of(session.config))


def _model_files(folder: Path) -> list[str]:
    """What answers depend on: config and weights."""
    patterns = ("config.json", "*.safetensors", "*.safetensors.index.json")
    return sorted({path.name for pattern in patterns for path in folder.glob(pattern)})


def answer(session: Session, folders: Sequence[Path]) -> Result:
    """Evaluate a model, the average of those in ``folders``.  Raises MtopdError, on every rank, when
    one of them cannot load it.  Collective.
    """
    session.engine.release()  # one model at a time
    engines: list[Engine] = []
    gather(session.ranks, lambda: engines.append(load(session, folders)))
    (engine,) = engines
    try:
        try_out(engine, session, folders)
        return evaluate.measure(engine, session.prompts, session.student, session.config)
    finally:
        engine.close()


def load(session: Session, folders: Sequence[Path]) -> Engine:
    """An engine of the model's own architecture."""
    student, hf_config = session.student, load_hf_config(folders[0])
    assert model_facts(hf_config).vocab_size >= student.vocab_size, folders[0]
    engine = ENGINES[session.config.rollout.engine](student, session.config, hf_config)
    try:
        engine.update_weights(
            average_weights(folders) if len(folders) > 1 else read_weights(folders[0]),
            f"{BASELINE}{next(_numbers)}",
        )
    except MtopdError as error:
        raise MtopdError(f"{_named(folders)}: {error}") from None
    return engine


def try_out(engine: Engine, session: Session, folders: Sequence[Path]) -> None:
    """One token, while a failure still is this baseline's alone: later it would end the run.
    Collective.
    """
    prompt = next(p for prompts in session.prompts.evaluation for p in prompts)
    requests = [Request(0, prompt.prompt_id, prompt.prompt_ids)]
    with apart(session.ranks) as name:
        try:
            list(engine.generate(requests, MemoryLog(name), Sampling(max_response=1)))
        except MtopdError as error:
            raise MtopdError(f"{_named(folders)}: {error}") from None
        except Exception as error:  # of transformers' code for a config that nobody has run
            raise MtopdError(f"{_named(folders)}: it cannot answer: {said(error)}") from error


def _named(folders: Sequence[Path]) -> str:
    return " + ".join(map(str, folders))


def keep(session: Session, key: str, result: Result) -> None:
    if session.ranks.rank == 0:
        _without_error(lambda: write_entry(_KIND, key, vars(result)))


def _read(session: Session, key: str) -> Result | None:
    kept = read_entry(_KIND, key)
    if kept is None:
        return None
    names = _held_out(session).keys()
    try:
        result = Result(**kept)
        tables = (result.accuracy, result.stopped, result.counts)
        is_whole = all(
            table.keys() == names and all(isinstance(v, int | float) for v in table.values())
            for table in tables
        )
    except (TypeError, AttributeError):
        return None
    return result if is_whole else None


def write(session: Session, found: dict[str, Result]) -> None:
    """``evaluations/baselines.json`` of the run, for its report."""
    if session.ranks.rank == 0:
        accuracies = {name: result.accuracy for name, result in found.items()}
        average = accuracies.pop(AVERAGE, None)
        evaluate.write(session.run, "baselines", {"models": accuracies, "weight_average": average})


def _without_error(write: Callable[[], None]) -> None:
    """What is kept only saves time: a folder that cannot be written is said, no more."""
    try:
        write()
    except OSError as error:
        say(f"results of baselines are not kept: {error}; set XDG_CACHE_HOME to a folder of yours")
