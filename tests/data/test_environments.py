"""The callables that a config names, before anything else of a run is written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mtopd.config import ConsolidateConfig
from mtopd.config_file import load_config
from mtopd.config_specialist import SpecialistConfig
from mtopd.data import check_sources
from mtopd.data.environments import load_environment
from mtopd.types import MtopdError
from tests import environments
from tests.conftest import REPOSITORY

SOURCE = {"name": "a", "path": "p.jsonl"}


def test_a_callable_is_found_by_module_and_name() -> None:
    found = load_environment("tests.environments:count_letters")
    assert found is environments.count_letters
    assert load_environment("builtins:dict.fromkeys") is not None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tests.no_such:step", "module 'tests.no_such' cannot be imported .*; install it"),
        ("tests.environments:step", "'tests.environments' has no 'step'"),
        ("tests.environments:NOT_CALLABLE", "is int; it must be a plain callable"),
        ("tests.environments:coroutine", "is a coroutine function; it must be"),
        ("tests.environments:two_arguments", "cannot be called with one argument, the Turn"),
    ],
)
def test_what_cannot_reply_is_refused(name: str, message: str) -> None:
    with pytest.raises(MtopdError, match=f"^environment '{name}'.*{message}"):
        load_environment(name)


def test_an_environment_that_is_not_installed_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n')
    path = config(tmp_path, "consolidate", python="tests.no_such:step")
    found = load_config(path, [f"data.sources.0.path={tmp_path / 'p.jsonl'}"], ConsolidateConfig)
    with pytest.raises(MtopdError, match=r"^source 'a': environment 'tests.no_such:step': module "):
        check_sources(found.data)


def config(folder: Path, kind: str, **environment: object) -> Path:
    values = {
        "run_dir": str(folder / "run"),
        "student": {"model": str(folder)},
        "data": {
            "sources": [{**SOURCE, "environment": environment}],
            "context_length": 64,
            "max_response": 8,
        },
    }
    optimizer = {"lr": 1.0}
    if kind == "consolidate":
        values |= {
            "teachers": [{"name": "t", "store": str(folder), "route": {}}],
            "rollout": {"prompts_per_iteration": 2},
            "train": {"num_iterations": 1, "micro_batch_size": 1, "optimizer": optimizer},
        }
    else:
        sizes = {"global_batch_size": 1, "micro_batch_size": 1}
        values["train"] = {"num_steps": 1, **sizes, "optimizer": optimizer}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder / "config.yaml"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("python", "tests/environments.py", "data.sources.0.environment.python is"),
        ("python", "tests.environments", "data.sources.0.environment.python is"),
        ("max_turns", 1, "max_turns is 1"),
        ("timeout_s", 0, "timeout_s is 0"),
        ("threads", 0, "threads is 0"),
        ("tries", 3, "unknown key 'data.sources.0.environment.tries'"),
    ],
)
def test_settings_that_make_no_turns_are_refused(
    tmp_path: Path, key: str, value: object, message: str
) -> None:
    path = config(tmp_path, "consolidate", **{"python": "tests.environments:slow", key: value})
    with pytest.raises(MtopdError, match=message):
        load_config(path, [], ConsolidateConfig)


def test_a_specialist_has_no_environment(tmp_path: Path) -> None:
    path = config(tmp_path, "specialist", python="tests.environments:slow")
    with pytest.raises(MtopdError, match=r"data.sources.0.environment has no effect here: a spec"):
        load_config(path, [], SpecialistConfig)


def test_importing_the_contract_imports_no_torch() -> None:
    code = "import sys; from mtopd.data import Turn; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, timeout=120)
