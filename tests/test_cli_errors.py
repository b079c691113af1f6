"""Bad input through the command line: one clear line, exit code 2, nothing half-written that a
later run trusts.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file, save_file

from mtopd.convert.teacher import add_teacher
from mtopd.hidden_cache import HiddenCacheWriter, sample_key
from mtopd.manifest import start_run
from mtopd.pipelines import cli, start
from mtopd.run_dir import RunDir
from mtopd.teacher_offload.store import open_store
from mtopd.trajectories import token_hash, write_shard
from mtopd.types import Trajectory
from tests.conftest import REPOSITORY
from tests.small_models import save_model, write_prompts

FINGERPRINTS = {"math": "a1" * 32, "code": "b2" * 32}

SPECIALIST_TRAIN = {
    "num_steps": 1,
    "global_batch_size": 4,
    "micro_batch_size": 4,
    "optimizer": {"lr": 1e-3},
}

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


def refused(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> str:
    """Run the command in this process; returns its one line of error.  Starting ranks is a failure
    of the test.
    """

    def launch(*_: object) -> None:
        raise AssertionError("the ranks were started in spite of bad input")

    monkeypatch.setattr(start, "launch", launch)
    monkeypatch.setattr(
        sys, "argv", ["mtopd", *(arguments or ("consolidate", str(root / "config.yaml")))]
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1, lines
    return lines[0]


def as_specialist(config: dict) -> None:
    del config["teachers"], config["rollout"]
    config["train"] = SPECIALIST_TRAIN


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


def foreign_stop_id(root: Path) -> None:
    edit_config(root, lambda c: c["rollout"].update(stop_ids=[100]))


def indivisible_world(root: Path) -> None:
    edit_config(root, lambda c: c["student"]["parallel"].update(tp=3))


def bad_megatron_field(root: Path) -> None:
    edit_config(root, lambda c: c["student"].update(megatron={"layernorm_epsilo": 1e-5}))


def escaping_manifest(root: Path) -> None:
    path = root / "stores" / "t0" / "teacher.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../../student/model.safetensors"] = manifest["files"][
        "final_norm.safetensors"
    ]
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
        (foreign_stop_id, ["rollout.stop_ids has 100", "0 to 99"]),
        (indivisible_world, ["student.parallel.tp 3", "tp 1 or 2 work"]),
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


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"path": "no.jsonl"}, "no.jsonl does not exist"),
        ({"path": "config.yaml"}, "config.yaml is none of .jsonl"),
        ({"path": "prompts.jsonl", "eval_path": "no.json"}, "no.json does not exist"),
        ({"reasoning_gym": "chain_sun"}, "no dataset 'chain_sun'"),
        ({"reasoning_gym": "chain_sum", "config": {"terms": 1}}, "refuses the options"),
        ({"reasoning_gym": "chain_sum", "answer_from": {"regex": "(?=x)"}}, "answer_from.regex"),
    ],
)
@pytest.mark.parametrize("verb", ["consolidate", "specialist"])
def test_what_is_wrong_with_a_source_at_a_glance_is_found_before_a_model_is_read(
    workplace: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    source: dict[str, object],
    said: str,
    verb: str,
) -> None:
    def change(config: dict) -> None:
        config["data"]["sources"][0] = {"name": "words", **source}

    edit_config(workplace, change)
    if verb == "specialist":
        edit_config(workplace, as_specialist)
    (workplace / "student" / "config.json").unlink()
    missing_teacher(workplace)
    monkeypatch.chdir(workplace)
    line = refused(workplace, capsys, monkeypatch, verb, "config.yaml")
    assert "source 'words': " in line and said in line


def test_a_model_folder_given_as_store_is_answered_with_the_line_that_makes_it_one(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = (workplace / "t0").rename(workplace / "hf model")
    edit_config(workplace, lambda c: c["teachers"][0].update(store=str(folder)))
    line = refused(workplace, capsys, monkeypatch)
    _, command, rest = line.split("`")
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    cli.main()
    assert rest.startswith(" makes the store teachers/t0")
    assert open_store("teachers/t0").name == "t0"


def in_shards(folder: Path) -> dict[str, str]:
    """The folder's tensors in two files; returns their index, which is written too."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {name: f"model-{i % 2 + 1:05d}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in sorted(set(index.values())):
        part = {name: tensor for name, tensor in tensors.items() if index[name] == file}
        save_file(part, folder / file, {"format": "pt"})
    write_index(folder, index)
    return index


def write_index(folder: Path, index: dict[str, str]) -> None:
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def tensor_in_two_shards(folder: Path) -> None:
    first, second = sorted(set(in_shards(folder).values()))
    both = {**load_file(folder / first), **load_file(folder / second)}
    save_file(both, folder / second, {"format": "pt"})


def missing_shard(folder: Path) -> None:
    (folder / sorted(set(in_shards(folder).values()))[1]).unlink()


def index_out_of_the_folder(folder: Path) -> None:
    index = in_shards(folder)
    write_index(folder, index | {"model.norm.weight": "../model-00001-of-00002.safetensors"})


def adapter_beside(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize("role", ["student", "teacher", "baseline"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (tensor_in_two_shards, "one of them is of another checkpoint"),
        (missing_shard, "has no model-00002-of-00002.safetensors, which"),
        (index_out_of_the_folder, "needed is the name of a safetensors file in the same folder"),
        (adapter_beside, "holds an adapter (adapter_config.json)"),
        (only_a_pickle, "found pytorch_model.bin, which is not read"),
    ],
)
def test_a_model_that_is_not_whole_is_refused_by_the_command_that_takes_it(
    workplace: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], object],
    said: str,
    role: str,
) -> None:
    folder = workplace / ("student" if role == "student" else "t0")
    damage(folder)
    arguments = ["consolidate", str(workplace / "config.yaml"), "--check"]
    if role == "teacher":
        to = workplace / "new"
        arguments = ["teachers", "add", "t", "--from", str(folder), "--to", str(to)]
    if role == "baseline":
        edit_config(workplace, lambda c: c.update(evaluation={"baselines": {"base": str(folder)}}))
    line = refused(workplace, capsys, monkeypatch, *arguments)
    assert said in line and str(folder) in line
    assert ("evaluation.baselines.base: " in line) == (role == "baseline")
    assert not (workplace / "run" / "manifest.json").exists()
    assert not (workplace / "new" / "t").exists()


def test_check_does_what_a_start_does_before_its_ranks(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And again, and with what it cannot use, in one process; the ranks never start."""
    run, arguments = workplace / "run", ["consolidate", str(workplace / "config.yaml"), "--check"]
    for start_number in (1, 2):
        monkeypatch.setattr(sys, "argv", ["mtopd", *arguments])
        cli.main()
        found = " ".join(capsys.readouterr().err.split())
        assert "all is well" in found and "would start 4 ranks (tp 2 x pp 2)" in found
        assert json.loads((run / "generation.json").read_text())["generation"] == start_number
        written = "config.yaml, manifest.json, generation.json and prompts.arrow"
        assert f"written there: {written}, which the start will use" in found
        assert {*os.listdir(run)} == {"lock", *written.replace(" and ", ", ").split(", ")}
        assert (run / "prompts.arrow").is_file() and not (run / "report.json").exists()
    line = refused(workplace, capsys, monkeypatch, *arguments, "train.optimizer.lr=-1")
    assert "train.optimizer.lr" in line
    final = run / "export" / "000001"
    final.mkdir(parents=True)
    (final / "SEALED").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["mtopd", *arguments])
    cli.main()
    found = capsys.readouterr().err
    assert "is finished" in found and "all is well" not in found


def test_a_run_keeps_its_settings_once_ranks_have_started(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check, change, check is free; a phase asks for what there is before its ranks start."""
    run, arguments = workplace / "run", ["consolidate", str(workplace / "config.yaml"), "--check"]
    for lr in (0.5, 0.25):
        override = f"train.optimizer.lr={lr}"
        monkeypatch.setattr(sys, "argv", ["mtopd", *arguments, override])
        cli.main()
        assert "all is well" in capsys.readouterr().err
        kept = yaml.safe_load((run / "config.yaml").read_text())
        manifest = json.loads((run / "manifest.json").read_text())
        assert kept["train"]["optimizer"]["lr"] == lr
        assert manifest["config"]["train"]["optimizer"]["lr"] == lr
    for phase, said in (
        (["train", str(run), "--iteration", "7"], "iterations with a checkpoint: 0"),
        (["teacher-pass", str(run), "--iteration", "1"], "has iterations 0..0, 1 was asked for"),
        (["evaluate", str(run), "--baselines"], "no held-out prompts"),
    ):
        monkeypatch.setattr(start, "launch", lambda *_: pytest.fail("ranks have started"))
        assert said in refused(workplace, capsys, monkeypatch, *phase)
    monkeypatch.setattr(start, "launch", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["mtopd", "train", str(run)])
    cli.main()
    capsys.readouterr()
    assert "belongs to another run" in refused(workplace, capsys, monkeypatch, *arguments)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("prompts.jsonl", lambda text: text[text.index(b"\n") + 1 :], "source words"),
        ("student/model.safetensors", lambda text: text[:-1] + b"\x01", "student model"),
        ("student/config.json", lambda text: text + b"\n", "student config.json"),
        ("student/chat_template.jinja", lambda text: text + b"\n", "--accept-changed"),
    ],
)
def test_a_changed_input_is_noticed_by_the_next_start(
    workplace: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    change: Callable[[bytes], bytes],
    said: str,
) -> None:
    """And put back, or moved with its name in the config, it is the same."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(workplace / "cache"))
    arguments = ["consolidate", str(workplace / "config.yaml"), "--check"]
    monkeypatch.setattr(sys, "argv", ["mtopd", *arguments])
    cli.main()
    run = RunDir(workplace / "run")
    run.generation = run.current_generation()
    run.note_ranks()  # before, another start could take other inputs
    path = workplace / file
    before = path.read_bytes()
    path.write_bytes(change(before))
    line = refused(workplace, capsys, monkeypatch, *arguments)
    assert str(path) in line and said in line
    path.write_bytes(before)
    edit_config(workplace, lambda c: c["student"].update(model=str(workplace / "moved")))
    (workplace / "student").rename(workplace / "moved")
    monkeypatch.setattr(sys, "argv", ["mtopd", *arguments])
    cli.main()


def test_check_of_a_specialist_does_what_its_start_does_before_its_ranks(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_config(workplace, as_specialist)
    run, arguments = workplace / "run", ["specialist", str(workplace / "config.yaml"), "--check"]
    monkeypatch.setattr(start, "launch", lambda *_: pytest.fail("ranks have started"))
    monkeypatch.setattr(sys, "argv", ["mtopd", *arguments])
    cli.main()
    said = " ".join(capsys.readouterr().err.split())
    assert "all is well" in said and "would start 4 ranks (tp 2 x pp 2)" in said
    assert "each rank will hold about" in said
    inputs = json.loads((run / "manifest.json").read_text())["inputs"]
    kinds = ("student model.safetensors", "tokenizer tokenizer.json", "path of source words")
    assert {*kinds} <= inputs.keys() and (run / "prompts.arrow").is_file()
    edit_config(workplace, lambda c: c["train"].update(global_batch_size=3))
    line = refused(workplace, capsys, monkeypatch, *arguments)
    assert "train.global_batch_size 3 is not a multiple of" in line


def test_the_doctor_answers_from_the_command_line(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = command(capsys, monkeypatch, "doctor")
    for what in ("megatron-core", "transformers", "CUDA devices", "C++ compiler", "memory", "disk"):
        assert what in out
    out = command(capsys, monkeypatch, "doctor", workplace / "student", "--dtype", "bfloat16")
    assert "tp, and slices of a teacher store: 1 or 2" in out and "total" in out
    line = refused(workplace, capsys, monkeypatch, "doctor", str(workplace / "nowhere"))
    assert "there is no folder" in line and "nowhere" in line


def test_log_json_is_for_one_start_and_no_setting_of_the_run(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTOPD_LOG_JSON", "")
    config, inherited = workplace / "run" / "config.yaml", list[str]()
    monkeypatch.setattr(start, "launch", lambda *_: inherited.append(os.environ["MTOPD_LOG_JSON"]))
    for arguments in (
        ["consolidate", str(workplace / "config.yaml"), "--check", "--log-json"],
        ["train", str(workplace / "run"), "--log-json"],
    ):
        monkeypatch.setattr(sys, "argv", ["mtopd", *arguments])
        cli.main()
        assert yaml.safe_load(config.read_text())["log_json"] is False
    assert inherited == ["1"], "the ranks of the second print lines all the same"


def written_by_schema_1(run: Path) -> None:
    """A run's first files as an older version left them: each setting of a source was written down
    with its default, whether it did something or not.
    """
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["inputs"]
    (run / "manifest.json").write_text(json.dumps({**manifest, "schema": 1}))
    config = yaml.safe_load((run / "config.yaml").read_text())
    (source,) = config["data"]["sources"]
    idle = {
        "config": {},
        "train_size": 20_000,
        "eval_size": 256,
        "seed": 1,
        "eval_seed": 10_000_019,
    }
    known = ("name", "path", "eval_path", "reasoning_gym", "fields")
    config["data"]["sources"] = [{key: source[key] for key in known} | idle]
    if "teachers" in config:
        config["evaluation"] = {"every": 5, "baselines": {}, "weight_average": []}
    else:  # its first look would be too late, at held-out prompts that are not there
        config["train"]["stop"] = {"accuracy": 0.5, "tolerance": 0.1, "every": 10, "first": 50}
        config["store"] = {"name": "s", "path": str(run / "store"), "slices": 1}
    (run / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.parametrize("verb", ["consolidate", "specialist"])
def test_a_run_of_an_older_version_is_read_and_not_gone_on_with(
    workplace: Path,
    verb: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if verb == "specialist":
        edit_config(workplace, as_specialist)
    run, arguments = workplace / "run", [verb, str(workplace / "config.yaml"), "--check"]
    monkeypatch.setattr(sys, "argv", ["mtopd", *arguments])
    cli.main()
    assert "all is well" in capsys.readouterr().err
    written_by_schema_1(run)
    phases = [["train", str(run)], ["evaluate", str(run)]] if verb == "consolidate" else []
    for refused_ones in (arguments, *phases):
        line = refused(workplace, capsys, monkeypatch, *refused_ones)
        assert "schema 1" in line and "writes 2" in line
    assert "unfinished, 0 of 1" in command(capsys, monkeypatch, "report", run)
    if verb == "consolidate":
        (run / "iterations" / "000000" / "hidden_cache").mkdir(parents=True)
        command(capsys, monkeypatch, "cache", "ls", run)
        command(capsys, monkeypatch, "cache", "verify", run)
        command(capsys, monkeypatch, "trajectories", "ls", run)
    written = (run / "config.yaml").read_text().replace("sources:", "sauces:")
    (run / "config.yaml").write_text(written)
    assert "did you mean 'sources'" in refused(workplace, capsys, monkeypatch, "report", str(run))
    for text, said in (("", "must hold a table of settings"), ("3", "must hold a table")):
        (run / "config.yaml").write_text(text)
        assert said in refused(workplace, capsys, monkeypatch, "report", str(run))


def test_a_key_that_came_to_be_since_a_run_began_stands_at_its_default(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, arguments = RunDir(workplace / "run"), ["consolidate", str(workplace / "config.yaml")]
    monkeypatch.setattr(sys, "argv", ["mtopd", *arguments, "--check"])
    cli.main()
    run.generation = run.current_generation()
    run.note_ranks()
    manifest = json.loads(run.manifest.read_text())
    del manifest["config"]["train"]["sequence_filter"], manifest["config"]["rollout"]["stop_ids"]
    run.manifest.write_text(json.dumps(manifest))
    line = refused(workplace, capsys, monkeypatch, *arguments, "train.sequence_filter=2")
    assert "train.sequence_filter is None there and 2" in line
    monkeypatch.setattr(sys, "argv", ["mtopd", *arguments, "--check"])
    cli.main()
    assert "all is well" in capsys.readouterr().err


def test_a_run_directory_of_another_config_is_refused(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "launch", lambda *_: None)
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
    """A sample is scored by the bytes it was routed to: the run remembers its teachers'
    fingerprints.
    """
    monkeypatch.setattr(start, "launch", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["mtopd", "consolidate", str(workplace / "config.yaml")])
    with pytest.raises(SystemExit):
        cli.main()
        raise SystemExit
    capsys.readouterr()
    save_model(workplace / "other", seed=99, layers=2)
    shutil.rmtree(workplace / "stores" / "t0")
    add_teacher("t0", workplace / "other", workplace / "stores" / "t0", slices=2)
    run = workplace / "run"
    sealed, finished = (
        run / "checkpoints" / "000001" / "SEALED",
        run / "evaluations" / "000001.json",
    )
    kept = [sealed, finished, run / "iterations" / "000000" / "trajectories" / "SEALED"]
    unfinished = [
        run / "iterations" / "000001" / "trajectories" / "SEALED",
        run / "evaluations" / "000002.json",
    ]
    for path in (*kept, *unfinished):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"schema": 1, "generation": 1, "optimizer": {}}))
    line = refused(workplace, capsys, monkeypatch)
    assert "teachers[0].fingerprint" in line and "--accept-changed" in line
    assert all(path.exists() for path in (*kept, *unfinished)), "a refusal changes nothing"
    before = json.loads((run / "manifest.json").read_text())["teachers"][0]["fingerprint"]

    monkeypatch.setattr(start, "launch", lambda *_: None)
    monkeypatch.setattr(
        sys, "argv", ["mtopd", "consolidate", str(workplace / "config.yaml"), "--accept-changed"]
    )
    with pytest.raises(SystemExit):
        cli.main()
        raise SystemExit
    assert "accepted: teachers[0].fingerprint" in capsys.readouterr().err.replace("\n", " ")
    assert all(path.exists() for path in kept) and not any(path.exists() for path in unfinished)
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["teachers"][0]["fingerprint"] != before
    assert [change["start"] for change in manifest["accepted_changes"]] == [2]


def test_variables_of_a_scheduler_change_nothing(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """RANK and WORLD_SIZE of a Kubernetes job or a Slurm prologue: this command starts its ranks."""
    left = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "job-0"}
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    started: list[int] = []
    monkeypatch.setattr(start, "launch", lambda world_size, *_: started.append(world_size))
    config = str(workplace / "config.yaml")
    monkeypatch.setattr(sys, "argv", ["mtopd", "consolidate", config, "--check"])
    cli.main()
    assert "would start 4 ranks" in capsys.readouterr().err and not started
    monkeypatch.setattr(sys, "argv", ["mtopd", "consolidate", config])
    cli.main()
    assert started == [4]
    capsys.readouterr()
    assert "no folder" in refused(workplace, capsys, monkeypatch, "teachers", "ls", "/nothing")


def test_a_shell_that_inherited_torchruns_variables_gets_an_answer(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "gone")  # and nothing to reach it by
    assert "no folder" in refused(workplace, capsys, monkeypatch, "teachers", "ls", "/nothing")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "gone")
    line = refused(workplace, capsys, monkeypatch)
    assert "cannot be reached" in line and "unset TORCHELASTIC_RUN_ID" in line


def test_what_the_system_refuses_is_one_line(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files", "/some/file")

    monkeypatch.setattr(cli, "load_config", refuse)
    line = refused(workplace, capsys, monkeypatch)
    assert "/some/file: Too many open files; raise the limit" in line


def test_a_closed_standard_output_ends_the_command_quietly(workplace: Path) -> None:
    command = [sys.executable, "-m", "mtopd.pipelines.cli", "teachers", "ls"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*command, str(workplace / "stores")],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        cwd=REPOSITORY,
    )
    os.close(writer)
    assert done.returncode not in (0, 2) and done.stderr == ""


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
    assert "it is a file" in refused(workplace, capsys, monkeypatch)
    edit_config(workplace, lambda c: c.update(run_dir=str(workplace)))
    assert "not empty (it holds config.yaml" in refused(workplace, capsys, monkeypatch)
    if os.geteuid() == 0:  # root may write anywhere: a kernel file system says no to root as well
        edit_config(workplace, lambda c: c.update(run_dir="/proc/mtopd"))
    else:
        (workplace / "locked").mkdir(mode=0o500)
        edit_config(workplace, lambda c: c.update(run_dir=str(workplace / "locked" / "run")))
    assert "cannot write" in refused(workplace, capsys, monkeypatch)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("gradient_accumulation_fusion", True, "ColumnParallelLinear was called with gradient_acc"),
        ("decoupled_lr", "high", "TypeError: "),
    ],
)
def test_what_megatron_refuses_as_it_builds_layers_or_optimizer_is_one_line(
    workplace: Path, option: str, value: object, said: str
) -> None:
    """No config that is built before the ranks start shows it."""
    edit_config(
        workplace,
        lambda c: c["student"].update(parallel={"tp": 1}, megatron={option: value}),
    )
    command = [sys.executable, "-m", "mtopd.pipelines.cli", "consolidate"]
    done = subprocess.run(
        [*command, str(workplace / "config.yaml")],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=REPOSITORY,
    )
    assert done.returncode == 2, done.stderr
    assert "starting 1 rank" in done.stderr and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error:" in line]
    assert f"Megatron refuses the options under student.megatron ({option}): " in line
    assert said in line and "unforeseen" not in line
    assert "megatron/core" in (workplace / "run" / "failure.0.txt").read_text()


def test_a_world_size_that_does_not_fit_is_refused_under_torchrun(workplace: Path) -> None:
    """Under an outer torchrun with three ranks, tp 2 x pp 2 cannot be laid out: rank 0 says so
    once.
    """
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=3",
        "-m",
    ]
    command += ["mtopd.pipelines.cli", "consolidate", str(workplace / "config.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPOSITORY)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1 and "world size 3 is not a multiple of tp 2 x pp 2 = 4" in lines[0], (
        done.stderr
    )
    assert "exitcode  : 2" in done.stderr


# -- mtopd cache ls | verify | gc ------------------------------------------------------------------


@pytest.fixture
def cached_run(tmp_path: Path) -> RunDir:
    """Two iterations of two teachers with 20 samples of 30 rows each."""
    run = RunDir(tmp_path / "run")
    teachers = [
        {"index": i, "name": n, "fingerprint": f} for i, (n, f) in enumerate(FINGERPRINTS.items())
    ]
    with run.lock():
        start_run(run, {}, {"teachers": teachers}, "{}")
    for iteration in range(2):
        with open_writer(run, iteration) as writer:
            for fingerprint in FINGERPRINTS.values():
                put(writer, iteration, fingerprint, range(20))
    return run


def open_writer(run: RunDir, iteration: int) -> HiddenCacheWriter:
    return HiddenCacheWriter(
        run.hidden_cache(iteration), writer="w", generation=1, hidden_dtype="float32"
    )


def put(writer: HiddenCacheWriter, iteration: int, fingerprint: str, sample_ids: range) -> None:
    for sample_id in sample_ids:
        key = sample_key(fingerprint, token_hash([1], [sample_id], [1]), "float32")
        sample_id += 1000 * list(FINGERPRINTS.values()).index(fingerprint)
        writer.put(
            fingerprint, 8, key, sample_id, iteration, np.full((30, 8), sample_id, np.float32)
        )


def command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> str:
    """Run a command that succeeds; what it prints."""
    monkeypatch.setattr(sys, "argv", ["mtopd", *map(str, arguments)])
    cli.main()
    return capsys.readouterr().out


def shards(run: RunDir, iteration: int, teacher: str) -> list[Path]:
    return sorted(run.hidden_cache(iteration).glob(f"t/{FINGERPRINTS[teacher][:16]}/seg/*/c/0/0"))


def index_file(run: RunDir, iteration: int, teacher: str) -> Path:
    (path,) = run.hidden_cache(iteration).glob(f"t/{FINGERPRINTS[teacher][:16]}/index/*.arrow")
    return path


def test_cache_ls_names_what_each_teacher_has(
    cached_run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    index_file(cached_run, 1, "code").write_bytes(b"")
    out = command(capsys, monkeypatch, "cache", "ls", cached_run.path)
    rows = [line.split() for line in out.splitlines()]
    size = f"{shards(cached_run, 0, 'math')[0].stat().st_size:,}"
    for iteration, teacher in (("0", "math"), ("0", "code"), ("1", "math")):
        assert [iteration, teacher, "20", "600", size, "1", "0"] in rows, out
    assert ["1", "code", "0", "0", "0", "0", "1"] in rows, out
    assert str(index_file(cached_run, 1, "code")) in out


def test_cache_verify_names_every_damaged_sample(
    cached_run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = command(capsys, monkeypatch, "cache", "verify", cached_run.path)
    assert "80 samples are whole, 76,800 bytes" in out
    (shard,) = shards(cached_run, 1, "code")
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    index_file(cached_run, 0, "math").write_bytes(b"")
    monkeypatch.setattr(sys, "argv", ["mtopd", "cache", "verify", str(cached_run.path)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    *named, last = filter(None, capsys.readouterr().err.splitlines())
    assert stop.value.code == 2 and "21 samples or index files" in last
    for sample_id in range(1000, 1020):  # one zarr chunk holds them all
        (line,) = [line for line in named if f"sample {sample_id}:" in line]
        assert shard.parents[2].name in line and "crc32c" in line
    assert (
        sum(str(index_file(cached_run, 0, "math")) in line for line in named) == 1
        and len(named) == 21
    )


def test_cache_verify_names_samples_whose_index_file_is_gone(
    cached_run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache without an index file is sound in itself; what it has to hold is in the sealed
    trajectories.
    """
    folder = cached_run.trajectories(0)
    folder.mkdir(parents=True)
    ids = [start + i for start in (0, 1000) for i in range(20)]
    given = [
        Trajectory(
            i, f"words/{i}", {}, i // 1000, (1,), (i % 1000,), (1,), (-1.0,), 0, "length", None
        )
        for i in ids
    ]
    write_shard(folder, "given", given, cached_run.generation)
    for sealed in (folder, cached_run.hidden_cache(0)):
        cached_run.seal(sealed)
    assert "80 samples are whole" in command(
        capsys, monkeypatch, "cache", "verify", cached_run.path
    )
    index_file(cached_run, 0, "code").unlink()
    monkeypatch.setattr(sys, "argv", ["mtopd", "cache", "verify", str(cached_run.path)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    found = capsys.readouterr().err
    assert all(
        f"iteration 0: sample {i} is in no index file" in found for i in range(1000, 1020)
    ), found
    assert found.count("in no index file") == 20


def test_cache_gc_removes_what_a_killed_writer_left(
    cached_run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(capsys, monkeypatch, "cache", "gc", cached_run.path) == "0 bytes freed\n"
    kept = {path: path.read_bytes() for path in cached_run.path.rglob("*") if path.is_file()}
    child = os.fork()
    if not child:
        try:
            writer = open_writer(cached_run, 1)
            put(writer, 1, FINGERPRINTS["math"], range(100, 200))
        finally:
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    orphan = cached_run.hidden_cache(1) / "t" / FINGERPRINTS["math"][:16] / "seg" / "w-9-0123abcd"
    (orphan / "c" / "0").mkdir(parents=True)
    (orphan / "c" / "0" / ".0.partial").write_bytes(b"x" * 5000)  # nothing in it can be saved
    out = command(capsys, monkeypatch, "cache", "gc", cached_run.path)
    assert f"iteration 1: segment {orphan.name} removed" in out and "bytes freed" in out
    assert not orphan.exists() and not list(cached_run.path.rglob("*.partial"))
    assert {path: path.read_bytes() for path in kept} == kept
    assert command(capsys, monkeypatch, "cache", "gc", cached_run.path) == "0 bytes freed\n"
    assert "samples are whole" in command(capsys, monkeypatch, "cache", "verify", cached_run.path)


def test_cache_gc_is_refused_while_the_run_is_going(
    cached_run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_writer(cached_run, 1) as writer, cached_run.lock():
        put(writer, 1, FINGERPRINTS["math"], range(100, 200))
        line = refused(cached_run.path, capsys, monkeypatch, "cache", "gc", str(cached_run.path))
        assert "in use" in line and str(os.getpid()) in line
    assert "180 samples are whole" in command(
        capsys, monkeypatch, "cache", "verify", cached_run.path
    )


@pytest.mark.parametrize("verb", ["ls", "verify", "gc"])
def test_a_folder_that_is_not_ours_is_refused_and_left_alone(
    cached_run: RunDir,
    verb: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "home").mkdir()
    for folder in ("home", "nothing"):
        line = refused(tmp_path, capsys, monkeypatch, "cache", verb, str(tmp_path / folder))
        assert folder in line and "not a run directory" in line
    assert not list((tmp_path / "home").iterdir()) and not (tmp_path / "nothing").exists()
    precious = cached_run.hidden_cache(2) / "precious"
    precious.parent.mkdir(parents=True)
    precious.write_text("data")
    assert "no hidden cache" in refused(
        tmp_path, capsys, monkeypatch, "cache", verb, str(cached_run.path)
    )
    assert precious.read_text() == "data"
