"""Trajectories of another harness through the command line: taken whole or not at all, listed, verified."""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from mtopd.config import ConsolidateConfig
from mtopd.config_file import load_config
from mtopd.convert.teacher import add_teacher
from mtopd.pipelines import cli, imports, prepare
from mtopd.prompt_table import PromptIndex
from mtopd.run_dir import RunDir, is_sealed, read_seal
from mtopd.tokenizer import load_tokenizer
from mtopd.trajectories import TokenStore, write_shard
from tests.small_models import save_model, write_prompts
from tests.trajectories.row_files import row, write_rows
from tests.trajectories.shards import flip, trajectory


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory as `mtopd consolidate CONFIG --check` leaves it."""
    root = tmp_path_factory.mktemp("imports")
    save_model(root / "student", seed=1, layers=1)
    for i in range(2):
        save_model(root / f"m{i}", seed=2 + i, layers=1)
        add_teacher(f"t{i}", root / f"m{i}", root / "stores" / f"t{i}", slices=1)
    prompts = write_prompts(root / "prompts.jsonl")
    values = {
        "run_dir": str(root / "run"),
        "student": {"model": str(root / "student")},
        "teachers": [
            {"name": f"t{i}", "store": str(root / "stores" / f"t{i}"), "route": {"domain": "ab"[i]}}
            for i in range(2)
        ],
        "data": {
            "sources": [{"name": "words", "path": str(prompts), "eval_path": str(prompts)}],
            "context_length": 64,
            "max_response": 16,
        },
        "rollout": {"prompts_per_iteration": 8},
        "train": {"num_iterations": 2, "micro_batch_size": 4, "optimizer": {"lr": 1e-3}},
    }
    (root / "config.yaml").write_text(yaml.safe_dump(values))
    config = load_config(root / "config.yaml", [], ConsolidateConfig)
    run = RunDir(config.run_dir)
    with run.lock():
        prepare.consolidate(config, run, lambda text: None)
    return run.path


@pytest.fixture
def run(prepared: Path, tmp_path: Path) -> RunDir:
    shutil.copytree(prepared, tmp_path / "run")
    return RunDir(tmp_path / "run")


@pytest.fixture
def rows(prepared: Path) -> list[dict]:
    end = load_tokenizer(prepared.parent / "student").eos_token_id
    rng = random.Random(0)

    def some(length: int) -> list[int]:
        return [rng.randrange(2, 20) for _ in range(length)]

    made = []
    for k in range(20):
        length = 2 + k % 5
        made.append(
            row(
                k,
                prompt_ids=some(3 + k % 4),
                response_ids=[*some(length - 1), end],
                loss_mask=[0] + [1] * (length - 1),
                rollout_log_probs=[-rng.randrange(64) / 8 for _ in range(length)],
                teacher=f"t{k % 2}",
                reward=k / 4 if k % 3 else None,
                teacher_prompt_ids=some(9) if k % 4 == 1 else None,
            )
        )
    return made


Mtopd = Callable[..., tuple[int, str, str]]


@pytest.fixture
def mtopd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Mtopd:
    """The command line in this process: exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mtopd", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        found = capsys.readouterr()
        return code, found.out, " ".join(found.err.split())

    return call


def check_refused(run: RunDir, found: tuple[int, str, str], message: str) -> None:
    code, _, error = found
    assert code == 2 and error.count("error:") == 1 and re.search(message, error), error
    assert not is_sealed(run.trajectories(0))
    assert not run.trajectories(0).with_name(imports.IMPORT).exists()


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_rows_become_sealed_trajectories(
    run: RunDir, rows: list[dict], tmp_path: Path, mtopd: Mtopd, ending: str
) -> None:
    files = [
        write_rows(tmp_path / f"{n}.{ending}", part)
        for n, part in enumerate((rows[:12], rows[12:]))
    ]
    code, _, said = mtopd("trajectories", "import", run.path, *files, "--iteration", 0)
    assert code == 0 and "iteration 0 has 20 samples; go on with `mtopd teacher-pass" in said
    folder = run.trajectories(0)
    assert is_sealed(folder) and read_seal(folder)["shards"].keys() == {"import-00000"}
    store = TokenStore(folder)
    assert [*store.samples] == list(range(20))
    for values in rows:
        found = store.get(values["sample_id"])
        expected = {**values, "teacher_index": int(values["teacher"][1])}
        expected["route"] = {"domain": "ab"[expected["teacher_index"]]}
        del expected["format"], expected["teacher"]
        for name, value in expected.items():
            value = tuple(value) if isinstance(value, list) else value
            assert getattr(found, name) == value, name
    assert store.get(0).teacher_prompt_ids is None and store.get(1).teacher_prompt_ids is not None

    code, listed, _ = mtopd("trajectories", "ls", run.path)
    words = listed.splitlines()[1].split()
    tokens = sum(len(values["response_ids"]) for values in rows)
    assert code == 0
    assert words[:8] == ["0", "import-00000", "20", str(tokens), "0", "20", "0", "0"]
    assert "not sealed" not in listed and max(map(len, listed.splitlines())) <= 80
    code, said, _ = mtopd("trajectories", "verify", run.path)
    assert code == 0 and said.startswith("20 samples are sound")

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    code, _, said = mtopd("trajectories", "import", run.path, *files)
    assert code == 0 and "holds the samples of these files already" in said
    code, _, said = mtopd("trajectories", "import", run.path, files[0])
    assert code == 2 and "is sealed, and sealed trajectories are never overwritten" in said
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_everything_wrong_is_named_at_once_and_nothing_is_kept(
    run: RunDir, rows: list[dict], tmp_path: Path, mtopd: Mtopd
) -> None:
    rows[3]["loss_mask"].append(1)
    rows[5]["response_ids"][0] = 10_000
    rows[7]["prompt_ids"] = [5] * 70
    rows[9]["sample_id"] = 2
    rows[11]["why"] = "because"
    for k in range(12, 20):
        rows[k]["rollout_log_probs"][0] = 0.5
    path = write_rows(tmp_path / "rows.jsonl", rows)
    found = mtopd("trajectories", "import", run.path, path, "--iteration", 0)
    check_refused(run, found, "13 of 20 rows cannot be imported, nothing was: ")
    error = found[2]
    for line, text in (
        (4, "has 3 entries|has 4 entries|has 5 entries|has 6 entries|has 7 entries"),
        (6, r"holds 10000 at \[0\]"),
        (8, "makes 7. tokens with prompt_ids; data.context_length is 64"),
        (10, f"is 2, as in {path}, line 3"),
        (12, "is no column of mtopd-trajectory-1"),
        (13, r"holds 0.5 at \[0\]"),
    ):
        assert re.search(rf"{path}, line {line}: {text}", error), (line, error)
    assert error.count("holds 0.5") == 3 and "and 5 rows more" in error


def test_one_sample_in_two_files_and_one_file_twice_are_refused(
    run: RunDir, rows: list[dict], tmp_path: Path, mtopd: Mtopd
) -> None:
    first = write_rows(tmp_path / "a.jsonl", rows)
    second = write_rows(tmp_path / "b.jsonl.gz", rows[4:6])
    found = mtopd("trajectories", "import", run.path, first, second)
    check_refused(run, found, rf"{second}, line 1: is 4, as in {first}, line 5")
    check_refused(run, mtopd("trajectories", "import", run.path, first, first), "given twice")


def test_where_nothing_can_be_imported(
    run: RunDir, rows: list[dict], tmp_path: Path, mtopd: Mtopd
) -> None:
    path = write_rows(tmp_path / "a.jsonl", rows)
    found = mtopd("trajectories", "import", tmp_path, path)
    check_refused(run, found, r"not a prepared run directory \(no config.yaml\)")
    found = mtopd("trajectories", "import", run.path, path, "--iteration", 2)
    check_refused(run, found, r"the run has iterations 0\.\.1, 2 was asked for")
    found = mtopd("trajectories", "import", run.path, path, "--iteration", 1)
    check_refused(run, found, r"\[student_version\] .* is 0; iteration 1 trains on")
    (tmp_path / "none.jsonl").write_text("\n")
    check_refused(
        run, mtopd("trajectories", "import", run.path, tmp_path / "none.jsonl"), "no rows"
    )
    write_shard(run.trajectories(0), "batch-00000", [trajectory(1)], generation=1)
    found = mtopd("trajectories", "import", run.path, path)
    check_refused(run, found, "holds trajectories of a rollout that has begun")


def test_held_out_prompts_are_refused_by_id_and_said_by_tokens(
    run: RunDir, rows: list[dict], tmp_path: Path, mtopd: Mtopd
) -> None:
    asked = PromptIndex(run).training_prompt("words/3")
    assert asked is not None and asked.teacher_index == 1
    del rows[3]["teacher"]  # the run's prompt says whose it is
    rows[3] |= {"prompt_id": "words/3", "prompt_ids": list(asked.prompt_ids)}
    path = write_rows(tmp_path / "a.jsonl", rows)
    rows[3]["prompt_id"] = "words-eval/3"
    other = write_rows(tmp_path / "b.jsonl", rows)
    found = mtopd("trajectories", "import", run.path, other)
    check_refused(run, found, rf"\[prompt_id\] {other}, line 4: 'words-eval/3' is held out")
    code, _, said = mtopd("trajectories", "import", run.path, path)
    assert code == 0 and "1 samples answer held-out prompts" in said
    found_there = TokenStore(run.trajectories(0)).get(3)
    assert (found_there.route, found_there.teacher_index) == (asked.route, 1)


def test_a_killed_import_goes_on_behind_its_sealed_shards(
    run: RunDir,
    rows: list[dict],
    tmp_path: Path,
    mtopd: Mtopd,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(imports, "SHARD_SAMPLES", 3)
    files = [
        write_rows(tmp_path / "a.jsonl", rows[:10]),
        write_rows(tmp_path / "b.parquet", rows[10:]),
    ]
    whole = RunDir(tmp_path / "whole")
    shutil.copytree(run.path, whole.path)
    assert mtopd("trajectories", "import", whole.path, *files)[0] == 0

    written: list[str] = []
    write = imports.trajectories.write_shard

    def killed(folder: Path, name: str, *rest: object) -> None:
        if len(written) == 4:
            (folder / f"{name}.meta.parquet").write_bytes(b"half")
            raise KeyboardInterrupt
        write(folder, name, *rest)
        written.append(name)

    monkeypatch.setattr(imports.trajectories, "write_shard", killed)
    assert mtopd("trajectories", "import", run.path, *files)[0] == 130
    staging = run.trajectories(0).with_name(imports.IMPORT)
    assert staging.exists() and not run.trajectories(0).exists(), "no phase may see a part of it"
    assert "an import is not complete" in mtopd("trajectories", "ls", run.path)[1]

    written[:] = ["again"]
    assert mtopd("trajectories", "import", run.path, *files)[0] == 0
    assert written == ["again", "import-00004", "import-00005", "import-00006"]
    assert not staging.exists()
    for path in sorted(whole.trajectories(0).glob("*.arrow")):
        assert (run.trajectories(0) / path.name).read_bytes() == path.read_bytes()
    assert len(TokenStore(run.trajectories(0)).metadata) == 20


def test_a_killed_import_of_other_files_is_not_gone_on_with(
    run: RunDir, rows: list[dict], tmp_path: Path, mtopd: Mtopd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imports, "SHARD_SAMPLES", 3)
    path = write_rows(tmp_path / "a.jsonl", rows)
    with monkeypatch.context() as patched:
        patched.setattr(
            imports._Import, "publish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        assert mtopd("trajectories", "import", run.path, path)[0] == 130
    rows[0]["reward"] = 9.0
    write_rows(path, rows)
    assert mtopd("trajectories", "import", run.path, path)[0] == 0
    assert TokenStore(run.trajectories(0)).get(0).reward == 9.0


def test_a_damaged_byte_is_found_and_named(
    run: RunDir, rows: list[dict], tmp_path: Path, mtopd: Mtopd
) -> None:
    path = write_rows(tmp_path / "a.jsonl", rows)
    assert mtopd("trajectories", "import", run.path, path)[0] == 0
    rng = random.Random(1)
    for file in sorted(run.trajectories(0).glob("import-*")):
        whole = file.read_bytes()
        for position in rng.sample(range(len(whole)), 6):
            flip(file, position)
            code, _, error = mtopd("trajectories", "verify", run.path)
            assert code == 2 and "import-00000" in error, (file.name, position, error)
            file.write_bytes(whole)
    (run.trajectories(0) / "import-00000.sealed.json").unlink()
    code, _, error = mtopd("trajectories", "verify", run.path)
    assert code == 2 and "shard import-00000 that is not" in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_index": 2}, "teacher_index is 2; the run has 2 teachers"),
        ({"rollout_log_probs": (-1.0, 0.5, -1.0)}, "is above 0"),
        ({"prompt_ids": (5, 10_000)}, "prompt_ids holds 5 to 10000"),
        ({"teacher_prompt_ids": (-1,)}, "teacher_prompt_ids holds -1"),
        ({"student_version": 1}, "version_spans has students 1 to 1, iteration 0 has"),
    ],
)
def test_a_sample_that_breaks_the_format_is_named(
    run: RunDir, mtopd: Mtopd, changes: dict, message: str
) -> None:
    """Whole files, honest seals: written by a harness that puts its shards there itself."""
    sound = {
        "prompt_ids": (5, 6),
        "response_len": 3,
        "loss_mask": (1, 1, 1),
        "response_ids": (5, 6, 7),
        "student_version": 0,
        "teacher_index": 0,
    }
    shard = [trajectory(0, **sound), trajectory(1, **{**sound, **changes}), trajectory(2, **sound)]
    write_shard(run.trajectories(0), "theirs", shard, generation=1)
    code, _, error = mtopd("trajectories", "verify", run.path)
    assert code == 2 and re.search(rf"sample 1 \(rot/1\) of .*: .*{message}", error), error


def test_memory_does_not_grow_with_the_file(
    run: RunDir, rows: list[dict], tmp_path: Path, mtopd: Mtopd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten times the rows: what is held beside a shard is 16 bytes a row."""
    monkeypatch.setattr(imports, "SHARD_SAMPLES", 40)
    peaks = []
    for count in (100, 1000):
        many = [{**rows[k % 20], "sample_id": k} for k in range(count)]
        path = write_rows(tmp_path / f"{count}.jsonl", many)
        del many
        if not peaks:  # what is imported lazily is not counted
            mtopd("trajectories", "import", run.path, path)
            shutil.rmtree(run.trajectories(0))
        tracemalloc.start()
        assert mtopd("trajectories", "import", run.path, path)[0] == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        shutil.rmtree(run.trajectories(0))
    assert peaks[1] - peaks[0] < 900 * 64 + 0.1 * peaks[0], peaks
    print(json.dumps(peaks))
