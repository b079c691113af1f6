"""Bad input through the command line: one clear line, exit code 2, nothing half-written that a later run trusts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from mtopd.convert.teacher import add_teacher
from mtopd.pipelines import cli, ranks
from mtopd.run_dir import RunDir
from tests.conftest import REPOSITORY
from tests.small_models import save_model, write_prompts

Edit = Callable[[dict, Path], None]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parts")
    save_model(root / "student", seed=1, layers=2)
    save_model(root / "t0", seed=2, layers=2)
    add_teacher("t0", root / "t0", root / "stores" / "t0", slices=2)
    write_prompts(root / "prompts.jsonl")
    return root


@pytest.fixture
def workplace(parts: Path, tmp_path: Path) -> Path:
    shutil.copytree(parts, tmp_path / "w")
    config = {
        "run_dir": str(tmp_path / "w" / "run"),
        "student": {"model": str(tmp_path / "w" / "student"), "parallel": {"tp": 2, "pp": 2}},
        "teachers": [{"name": "t0", "store": str(tmp_path / "w" / "stores" / "t0"), "route": {}}],
        "data": {
            "sources": [{"name": "words", "path": str(tmp_path / "w" / "prompts.jsonl")}],
            "context_length": 64,
            "max_response": 16,
        },
        "rollout": {"prompts_per_iteration": 8},
        "train": {"num_iterations": 1, "micro_batch_size": 4, "optimizer": {"lr": 1e-3}},
    }
    (tmp_path / "w" / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "w"


def edit_config(root: Path, change: Callable[[dict], None]) -> None:
    values = yaml.safe_load((root / "config.yaml").read_text())
    change(values)
    (root / "config.yaml").write_text(yaml.safe_dump(values))


def refused(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """Run the command in this process; returns its one line of error.  Starting ranks is a failure of the test."""

    def launch(*_: object) -> None:
        raise AssertionError("the ranks were started in spite of bad input")

    monkeypatch.setattr(ranks, "launch", launch)
    monkeypatch.setattr(sys, "argv", ["mtopd", *(arguments or ("consolidate", str(root / "config.yaml")))])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1, lines
    return lines[0]


def unknown_key(root: Path) -> None:
    edit_config(root, lambda c: c["train"].update(num_iteration=3))


def missing_teacher(root: Path) -> None:
    shutil.rmtree(root / "stores" / "t0")


def other_tokenizer(root: Path) -> None:
    for folder in ("student", "t0"):  # the student's changes: its 'b' becomes another token
        path = root / folder / "tokenizer.json"
        if folder == "student":
            text = json.loads(path.read_text())
            vocabulary = text["model"]["vocab"]
            if isinstance(vocabulary, dict):
                vocabulary["\x7f"] = vocabulary.pop("b")
            path.write_text(json.dumps(text))


def other_vocabulary(root: Path) -> None:
    path = root / "stores" / "t0" / "teacher.json"
    manifest = json.loads(path.read_text())
    manifest["vocab_size"] += 5
    path.write_text(json.dumps(manifest))


def truncated_store(root: Path) -> None:
    path = root / "stores" / "t0" / "layers" / "00001.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def truncated_student(root: Path) -> None:
    path = root / "student" / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def no_route(root: Path) -> None:
    edit_config(root, lambda c: c["teachers"][0].update(route={"domain": "chemistry"}))


def long_prompt(root: Path) -> None:
    edit_config(root, lambda c: c["data"].update(context_length=18))


def empty_dataset(root: Path) -> None:
    (root / "prompts.jsonl").write_text("")


def indivisible_world(root: Path) -> None:
    edit_config(root, lambda c: c["student"]["parallel"].update(tp=3))


def bad_megatron_field(root: Path) -> None:
    edit_config(root, lambda c: c["student"].update(megatron={"layernorm_epsilo": 1e-5}))


def escaping_manifest(root: Path) -> None:
    path = root / "stores" / "t0" / "teacher.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../../student/model.safetensors"] = manifest["files"]["final_norm.safetensors"]
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (unknown_key, ["train.num_iteration", "num_iterations"]),
        (missing_teacher, ["stores/t0", "teachers add"]),
        (other_tokenizer, ["'t0'", "tokenizer", "'b'"]),
        (other_vocabulary, ["'t0'", "vocab_size"]),
        (truncated_store, ["00001.safetensors", "truncated"]),
        (truncated_student, ["model.safetensors", "truncated"]),
        (no_route, ["chemistry", "route"]),
        (long_prompt, ["context_length", "18", "tokens"]),
        (empty_dataset, ["prompts.jsonl", "no rows"]),
        (indivisible_world, ["3", "divide"]),
        (bad_megatron_field, ["layernorm_epsilo", "layernorm_epsilon"]),
        (escaping_manifest, ["../../student/model.safetensors", "inside"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_to_trust(
    workplace: Path,
    spoil: Callable[[Path], None],
    said: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(workplace)
    line = refused(workplace, capsys, monkeypatch)
    for word in said:
        assert word in line, line
    run = workplace / "run"
    assert not (run / "prompts.arrow").exists() and not list(run.rglob("SEALED"))


def test_a_run_directory_of_another_config_is_refused(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "launch", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["mtopd", "consolidate", str(workplace / "config.yaml")])
    with pytest.raises(SystemExit):  # the report finds no train step: the ranks did nothing
        cli.main()
        raise SystemExit
    capsys.readouterr()
    config = str(workplace / "config.yaml")
    line = refused(workplace, capsys, monkeypatch, "consolidate", config, "train.optimizer.lr=5e-3")
    assert "train.optimizer.lr" in line and "0.001" in line and "0.005" in line


def test_another_teacher_under_the_same_path_is_refused_on_resume(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample is scored by the bytes it was routed to: the run remembers its teachers' fingerprints."""
    monkeypatch.setattr(ranks, "launch", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["mtopd", "consolidate", str(workplace / "config.yaml")])
    with pytest.raises(SystemExit):
        cli.main()
        raise SystemExit
    capsys.readouterr()
    save_model(workplace / "other", seed=99, layers=2)
    shutil.rmtree(workplace / "stores" / "t0")
    add_teacher("t0", workplace / "other", workplace / "stores" / "t0", slices=2)
    assert "teachers[0].fingerprint" in refused(workplace, capsys, monkeypatch)


def test_a_run_directory_in_use_is_refused(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunDir(workplace / "run").lock():
        line = refused(workplace, capsys, monkeypatch)
    assert "in use" in line and str(os.getpid()) in line


def test_no_write_permission_is_refused(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (workplace / "run").write_text("a file where the run directory should be")
    assert "cannot write" in refused(workplace, capsys, monkeypatch)
    if os.geteuid() == 0:  # root may write anywhere: a kernel file system says no to root as well
        edit_config(workplace, lambda c: c.update(run_dir="/proc/mtopd"))
    else:
        (workplace / "locked").mkdir(mode=0o500)
        edit_config(workplace, lambda c: c.update(run_dir=str(workplace / "locked" / "run")))
    assert "cannot write" in refused(workplace, capsys, monkeypatch)


def test_a_world_size_that_does_not_fit_is_refused_under_torchrun(workplace: Path) -> None:
    """Under an outer torchrun with three ranks, tp 2 x pp 2 cannot be laid out: rank 0 says so once."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "-m"]
    command += ["mtopd.pipelines.cli", "consolidate", str(workplace / "config.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPOSITORY)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1 and "world size 3 is not a multiple of tp 2 x pp 2 = 4" in lines[0], done.stderr
    assert "exitcode  : 2" in done.stderr
