"""Results of baselines are known by content, across runs; one that fails loses nothing of the
others.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mtopd import user_cache
from mtopd.config import ConsolidateConfig
from mtopd.config_file import validate
from mtopd.metrics import MetricsWriter, read_metrics
from mtopd.metrics_lines import BaselineLine
from mtopd.pipelines import baselines
from mtopd.pipelines.evaluate import Result, explain_zeros
from mtopd.prompt_table import Prompts
from mtopd.run_dir import RunDir
from mtopd.types import MtopdError, Prompt

PROMPT = Prompt("words/0", {}, (5, 6), 0, {"verifier": "exact_match", "answer": "x"})


def result(value: float) -> Result:
    return Result({"words": value}, {"words": 1.0}, {"words": 1})


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of the folders that are evaluated, in order; each model's accuracy is what it holds."""
    folders: list[str] = []

    def answer(session: Any, chosen: Sequence[Path]) -> Result:
        folders.append("+".join(folder.name for folder in chosen))
        texts = [(folder / "model.safetensors").read_text() for folder in chosen]
        if "broken" in texts:
            raise MtopdError(f"{chosen[0]} has no tensor 'x'")
        if "killed" in texts:
            raise KeyboardInterrupt
        return result(sum(map(float, texts)) / len(texts))

    monkeypatch.setattr(baselines, "answer", answer)
    monkeypatch.setattr(baselines, "decide", lambda ranks, look: look())
    monkeypatch.setattr(baselines, "tokenizer_hash", lambda tokenizer: tokenizer)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folders


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for name, held in (("base", "0.25"), ("rot", "0.75")):
        write_model(tmp_path / name, held)
    return tmp_path


def write_model(folder: Path, held: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text(held)


def session(root: Path, run: str = "run", prompt: Prompt = PROMPT, **evaluation: Any) -> Any:
    """What baselines take of a session, without ranks."""
    values = {
        "run_dir": str(root / run),
        "log_json": True,
        "student": {"model": "hf"},
        "teachers": [{"name": "t", "store": "t", "route": {}}],
        "data": {
            "sources": [{"name": "words", "path": "w.jsonl", "eval_path": "e.jsonl"}],
            "context_length": 48,
            "max_response": evaluation.pop("max_response", 20),
        },
        "rollout": {"prompts_per_iteration": 4},
        "train": {"num_iterations": 3, "micro_batch_size": 4, "optimizer": {"lr": 1e-3}},
        "evaluation": {
            "baselines": {name: str(root / name) for name in ("base", "rot")},
            "weight_average": ["base", "rot"],
            **evaluation,
        },
    }
    config = validate(values, ConsolidateConfig, "test")
    config.run_dir.mkdir(exist_ok=True)

    @contextlib.contextmanager
    def timed(phase: str, iteration: Any) -> Iterator[None]:
        yield

    return SimpleNamespace(
        config=config,
        run=RunDir(config.run_dir),
        ranks=SimpleNamespace(rank=0, device=torch.device("cpu")),
        student=SimpleNamespace(tokenizer="a tokenizer", end_ids=[1]),
        prompts=Prompts(["words"], [], [[prompt]]),
        metrics=MetricsWriter(config.run_dir / "metrics.jsonl", enabled=True),
        iteration=lambda number: SimpleNamespace(number=number),
        timed=timed,
    )


def in_report(root: Path, run: str = "run") -> Any:
    return json.loads((root / run / "evaluations" / "baselines.json").read_text())


ALL = {
    "models": {"base": {"words": 0.25}, "rot": {"words": 0.75}},
    "weight_average": {"words": 0.5},
}


def test_each_is_evaluated_once_and_known_to_other_runs(
    models: Path, asked: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert baselines.run(session(models)) == []
    assert asked == ["base", "rot", "base+rot"] and in_report(models) == ALL
    printed = capfd.readouterr().err
    assert (
        "baseline rot (2 of 3) ..." in printed and "baseline rot (2 of 3): words 0.750" in printed
    )

    # Copied elsewhere it is the same model; another run with the same prompts is another place.
    shutil.copytree(models / "base", models / "moved")
    moved = {"base": str(models / "moved"), "rot": str(models / "rot")}
    again = session(models, "other", baselines=moved)
    assert baselines.run(again) == [] and len(asked) == 3
    assert in_report(models, "other") == ALL
    lines = read_metrics(again.run.metrics)
    kept = [line.kept for _, _, line in lines if isinstance(line, BaselineLine)]
    assert kept == [True] * 3


@pytest.mark.parametrize(
    "changed",
    [
        {"max_response": 21},
        {"temperature": 0.5},
        {"temperature": 0.5, "top_p": 0.9},
        {"prompt": Prompt("words/0", {}, (5, 7), 0, PROMPT.verify)},
        {"prompt": Prompt("words/0", {}, (5, 6), 0, {**PROMPT.verify, "answer": "y"})},
    ],
    ids=str,
)
def test_what_a_result_follows_from_makes_it_another(
    models: Path, asked: list[str], changed: dict[str, Any]
) -> None:
    baselines.run(session(models, temperature=0.5 if "top_p" in changed else 0))
    baselines.run(session(models, **changed))
    assert asked == 2 * ["base", "rot", "base+rot"]


def test_other_weights_are_another_model(models: Path, asked: list[str]) -> None:
    baselines.run(session(models))
    write_model(models / "rot", "0.95")
    baselines.run(session(models))
    assert asked[3:] == ["rot", "base+rot"]
    assert in_report(models)["models"] == {"base": {"words": 0.25}, "rot": {"words": 0.95}}


def test_one_that_fails_is_named_and_the_others_stand(models: Path, asked: list[str]) -> None:
    write_model(models / "base", "broken")
    problems = baselines.run(session(models))
    assert [problem.partition(":")[0] for problem in problems] == [
        "baseline base (1 of 3) was not evaluated",
        "baseline weight average (3 of 3) was not evaluated",
    ]
    assert "has no tensor 'x'" in problems[0] and "\n" not in "".join(problems)
    assert in_report(models) == {"models": {"rot": {"words": 0.75}}, "weight_average": None}


def test_one_that_loads_and_cannot_answer_is_named_before_the_others_wait(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What transformers raises of a config that nobody has run is its own affair."""

    class Silent:
        def generate(self, *_: Any) -> Any:
            raise TypeError("'NoneType' object cannot be\ninterpreted as an integer")

    monkeypatch.setattr(baselines, "apart", lambda ranks: contextlib.nullcontext("apart"))
    asking = session(models)
    with pytest.raises(MtopdError, match="rot: it cannot answer: TypeError: 'NoneType' object can"):
        baselines.try_out(Silent(), asking, [models / "rot"])  # type: ignore[arg-type]


def test_a_killed_start_keeps_what_is_done(models: Path, asked: list[str]) -> None:
    write_model(models / "rot", "killed")
    with pytest.raises(KeyboardInterrupt):
        baselines.run(session(models))
    assert in_report(models)["models"] == {"base": {"words": 0.25}}
    write_model(models / "rot", "0.75")
    baselines.run(session(models))
    assert asked == ["base", "rot", "rot", "base+rot"] and in_report(models) == ALL


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[1]",
        lambda text: json.dumps({**json.loads(text), "accuracy": {"other": 1.0}}),
        lambda text: json.dumps({**json.loads(text), "stopped": None}),
        lambda text: json.dumps({**json.loads(text), "further": 1}),
        lambda text: text.replace("0.25", '"0.25"'),
    ],
)
def test_a_damaged_entry_is_none(
    models: Path, asked: list[str], damage: Callable[[str], str]
) -> None:
    baselines.run(session(models, weight_average=[]))
    for entry in (models / "cache" / "mtopd" / "baselines").iterdir():
        if "0.25" in entry.read_text():
            entry.write_text(damage(entry.read_text()))
    baselines.run(session(models, weight_average=[]))
    assert asked == ["base", "rot", "base"]


def test_a_folder_that_cannot_be_written_costs_time_only(
    models: Path,
    asked: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (models / "a file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(models / "a file"))
    assert baselines.run(session(models)) == []
    assert in_report(models) == ALL and "are not kept" in capfd.readouterr().err
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError))
    assert user_cache.user_cache() is None
    assert baselines.run(session(models)) == [] and len(asked) == 6


def test_baselines_at_end_may_be_left_out(models: Path, asked: list[str]) -> None:
    baselines.run_at_end(session(models, baselines_at_end=False))
    assert asked == []
    baselines.run_at_end(session(models))
    assert asked == ["base", "rot", "base+rot"]


def test_zeros_are_explained_by_source() -> None:
    found = Result(
        {"words": 0.0, "sums": 0.25}, {"words": 0.5, "sums": 0.0}, {"words": 352, "sums": 4}
    )
    (line,) = explain_zeros(found)
    assert line.startswith("words: 0 of 352 answers are right, 176 of them ended")
    assert "docs/data.md" in line
