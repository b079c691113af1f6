"""What a start goes on from, said and refused without ranks: another number of iterations, another
run's checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mtopd.config import StudentConfig, TrainConfig
from mtopd.config_specialist import SpecialistConfig, SupervisedConfig
from mtopd.files import read_json, write_json
from mtopd.manifest import MANIFEST_SCHEMA
from mtopd.pipelines.continuation import (
    architecture,
    changed_end,
    describe,
    find_origin,
    former_end,
    set_aside_final,
)
from mtopd.run_dir import RunDir, is_sealed
from mtopd.types import MtopdError
from tests.small_models import save_model

KNOWN = {"architecture": {"model_type": "qwen3", "hidden_size": 64}, "tokenizer_hash": "h"}
FORM = {"student.megatron.use_distributed_optimizer": False, "student.parallel.ep > 1": False}


def make_run(path: Path, checkpoints: tuple[int, ...] = (), **train: Any) -> RunDir:
    """A run directory as a start leaves it, with empty checkpoints of 2 train steps an iteration."""
    run = RunDir(path)
    path.mkdir(parents=True)
    config = {"train": train, "student": {"dtype": "float32", "freeze_router": False}}
    write_json(run.manifest, {"schema": MANIFEST_SCHEMA, "config": config, **KNOWN})
    for number in checkpoints:
        run.checkpoint(number).mkdir(parents=True)
        run.seal(run.checkpoint(number), {"train_steps": 2 * number, "optimizer": FORM})
    return run


def consolidation(num_iterations: int, **optimizer: Any) -> TrainConfig:
    return TrainConfig(
        num_iterations=num_iterations,
        train_steps_per_iteration=2,
        micro_batch_size=1,
        optimizer={"lr": 1e-3, "warmup_steps": 2, **optimizer},
    )


# -- another number of iterations ------------------------------------------------------------------
def test_more_iterations_are_said_with_what_they_do_to_the_learning_rate(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", (3, 5), num_iterations=5)
    assert changed_end(run, consolidation(5)) is None
    assert changed_end(RunDir(tmp_path / "none"), consolidation(5)) is None
    said = changed_end(run, consolidation(9))
    # Step 10 is the eleventh: after 2 of warm-up, 9 of 16 steps down; of 8 there were no more.
    assert said == (
        "train.num_iterations was 5, is now 9: the learning rate at step 10 was 0, is now "
        "0.0004375; its linear decay ends after 18 train steps, not 10"
    )
    said = changed_end(run, consolidation(9, decay="constant"))
    assert said is not None and said.endswith("the learning rate goes on as it was")


@pytest.mark.parametrize(("wanted", "refused"), [(4, True), (5, True), (6, False), (7, False)])
def test_fewer_iterations_than_were_begun_are_refused(
    tmp_path: Path, wanted: int, refused: bool
) -> None:
    """Its numbers stand in the metrics already, though its last checkpoint is older."""
    run = make_run(tmp_path / "run", (4,), num_iterations=9)
    bad = {"kind": "bad_step", "iteration": 5, "step": 11, "refused": "x", "bad_steps": 1}
    memory = {"kind": "memory", "iteration": 9, "peak_host_bytes": 1}
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in (bad, memory)))
    if refused:
        with pytest.raises(MtopdError, match=rf"num_iterations is {wanted}, .* 6 already; give at"):
            changed_end(run, consolidation(wanted))
    else:
        assert "is now" in (changed_end(run, consolidation(wanted)) or "")


def specialist(tmp_path: Path, num_steps: int) -> SpecialistConfig:
    return SpecialistConfig(
        run_dir=tmp_path / "run",
        student={"model": tmp_path},
        data={
            "sources": [{"name": "a", "path": tmp_path / "a"}],
            "context_length": 8,
            "max_response": 4,
        },
        train=SupervisedConfig(
            num_steps=num_steps, global_batch_size=1, micro_batch_size=1, optimizer={"lr": 1e-3}
        ),
        store={"name": "a", "path": tmp_path / "store"},
    )


def test_the_export_of_a_specialist_that_goes_on_is_put_beside(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_steps=60)
    final = run.path / "export" / "final"
    final.mkdir(parents=True)
    run.seal(final, {"train_steps": {"planned": 60, "done": 42}})  # train.stop ended it
    run.evaluation(0).parent.mkdir()
    write_json(run.evaluation(0).with_name("final.json"), {"a": 0.5})
    (tmp_path / "store").mkdir()
    assert former_end(run, specialist(tmp_path, 60)) is None
    with pytest.raises(MtopdError, match=r"store .* before it goes on; give store\.path"):
        former_end(run, specialist(tmp_path, 100))
    (tmp_path / "store").rmdir()
    assert former_end(run, specialist(tmp_path, 100)) == 42 and is_sealed(final)
    said = set_aside_final(run, 42)
    assert "after 42 train steps" in said
    assert not final.exists() and is_sealed(run.export(42))
    assert read_json(run.evaluation(42)) == {"a": 0.5}
    assert former_end(run, specialist(tmp_path, 100)) is None
    (tmp_path / "store").mkdir()  # somebody makes one of the former export
    with pytest.raises(MtopdError, match="before it goes on"):
        former_end(run, specialist(tmp_path, 100))


# -- the checkpoint of another run -----------------------------------------------------------------
@pytest.fixture
def student(tmp_path: Path) -> StudentConfig:
    return StudentConfig(model=tmp_path / "student")


def begun(run: RunDir, origin: Any) -> None:
    """The manifest that the first start writes."""
    run.path.mkdir(exist_ok=True)
    write_json(run.manifest, {"schema": 1, **KNOWN, **({"from": origin} if origin else {})})


def test_a_run_notes_what_it_begins_with_and_needs_no_word_again(
    tmp_path: Path, student: StudentConfig
) -> None:
    source = make_run(tmp_path / "a@b", (2, 4))
    run = RunDir(tmp_path / "run")
    assert find_origin(run, None, student, KNOWN) is None
    newest = find_origin(run, str(source.path), student, KNOWN)
    older = find_origin(run, f"{source.path}@2", student, KNOWN)
    assert newest is not None and older is not None
    assert describe(older) == f"starting from {source.path} at iteration 2"
    assert (newest["iteration"], older["iteration"]) == (4, 2)
    begun(run, older)
    # A name without a number is what the first start found: the other run may have gone on.
    for given in (None, f"{source.path}@2", str(source.path)):
        assert find_origin(run, given, student, KNOWN) == older
    for other in (f"{source.path}@4", f"{tmp_path / 'c'}@2"):
        with pytest.raises(MtopdError, match=r"began with .*@2, not with"):
            find_origin(run, other, student, KNOWN)


def test_the_other_run_may_go_once_there_is_a_checkpoint(
    tmp_path: Path, student: StudentConfig
) -> None:
    source, run = make_run(tmp_path / "source", (2, 4)), RunDir(tmp_path / "run")
    origin = find_origin(run, f"{source.path}@2", student, KNOWN)
    begun(run, origin)
    seal = source.checkpoint(2) / "SEALED"
    whole = read_json(seal)
    write_json(seal, {**whole, "train_steps": 5})
    with pytest.raises(MtopdError, match="was written again since the first start"):
        find_origin(run, None, student, KNOWN)
    seal.unlink()
    with pytest.raises(
        MtopdError, match="no checkpoint of iteration 2; iterations with a checkpoint: 4"
    ):
        find_origin(run, None, student, KNOWN)
    run.checkpoint(0).mkdir(parents=True)
    run.seal(run.checkpoint(0))
    assert find_origin(run, None, student, KNOWN) == origin


def test_a_run_begun_without_another_does_not_take_one(
    tmp_path: Path, student: StudentConfig
) -> None:
    source, run = make_run(tmp_path / "source", (2,)), RunDir(tmp_path / "run")
    begun(run, None)
    assert find_origin(run, None, student, KNOWN) is None
    with pytest.raises(MtopdError, match="begun without --from"):
        find_origin(run, str(source.path), student, KNOWN)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("source@3", "no checkpoint of iteration 3; iterations with a checkpoint: 2, 4"),
        ("empty", "no finished checkpoint"),
        ("nothing", "not a run directory"),
        ("source@x", "not a run directory"),
        ("run", "this run itself"),
        ("s3://bucket/run", "a URL is not read here"),
    ],
)
def test_what_cannot_be_begun_with_is_one_line(
    tmp_path: Path, student: StudentConfig, given: str, said: str
) -> None:
    make_run(tmp_path / "source", (2, 4))
    make_run(tmp_path / "empty")
    where = given if "://" in given else str(tmp_path / given)
    with pytest.raises(MtopdError, match=said):
        find_origin(RunDir(tmp_path / "run"), where, student, KNOWN)


@pytest.mark.parametrize(
    ("known", "changed", "said"),
    [
        ({"hidden_size": 32}, {}, r"another architecture .* hidden_size is 64 there and 32 here"),
        ({}, {"dtype": "bfloat16"}, r"student\.dtype is 'float32' there and 'bfloat16' here"),
        ({}, {"freeze_router": True}, r"student\.freeze_router is False there and True here"),
        (
            {},
            {"megatron": {"use_distributed_optimizer": True}},
            r"use_distributed_optimizer=False and cannot be loaded with .*=True",
        ),
        ({}, {"parallel": {"ep": 2}}, r"student\.parallel\.ep > 1=False and cannot"),
        ("h2", {}, "another tokenizer"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, known: Any, changed: dict, said: str
) -> None:
    make_run(tmp_path / "source", (2,))
    ours = dict(KNOWN)
    if isinstance(known, str):
        ours["tokenizer_hash"] = known
    else:
        ours["architecture"] = {**KNOWN["architecture"], **known, "newer_setting": 1}  # type: ignore[dict-item]
    student = StudentConfig(model=tmp_path / "student", **changed)
    with pytest.raises(MtopdError, match=said):
        find_origin(RunDir(tmp_path / "run"), str(tmp_path / "source"), student, ours)


def test_an_architecture_is_what_computes_and_no_names(tmp_path: Path) -> None:
    found = []
    for name, sizes in (("a", {}), ("b", {}), ("c", {"layers": 2})):
        save_model(tmp_path / name, seed=1, **{"layers": 1, **sizes}, vocab=111)
        path = tmp_path / name / "config.json"
        config = json.loads(path.read_text())
        config |= {"transformers_version": name, "eos_token_id": len(found), "dtype": "bfloat16"}
        path.write_text(json.dumps(config))
        found.append(architecture(tmp_path / name))
    assert found[0] == found[1] != found[2]
    assert found[0] == json.loads(json.dumps(found[0]))
    assert {"model_type", "hidden_size", "tie_word_embeddings"} <= found[0].keys()
    assert found[0]["num_hidden_layers"] == 1 and found[2]["num_hidden_layers"] == 2
