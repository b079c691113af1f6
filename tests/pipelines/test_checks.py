"""What the launcher refuses: layouts that a model is not trained or streamed on."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mtopd.config import StudentConfig
from mtopd.config_rollout import RolloutConfig
from mtopd.config_specialist import SpecialistConfig
from mtopd.hf_checkpoint import hf_config_from_dict, load_hf_config
from mtopd.megatron.options import sort_fields
from mtopd.pipelines.checks import (
    check_baselines,
    check_ends,
    check_stop_ids,
    check_student,
    check_teacher,
    check_world,
)
from mtopd.pipelines.layouts import check_mesh
from mtopd.pipelines.prepare import specialist
from mtopd.pipelines.stores import check_place
from mtopd.pipelines.student import Student, build_bridge
from mtopd.run_dir import RunDir
from mtopd.tokenizer import end_ids, load_tokenizer, pad_id, tokenizer_hash, vocab_size
from mtopd.types import MtopdError
from tests.small_models import save_model, tokenizer_folder, write_prompts


@pytest.mark.parametrize(
    ("kind", "parallel", "megatron", "message"),
    [
        (
            "qwen3_moe",
            {"tp": 2},
            {},
            "experts needs sequence parallelism: set student.megatron.sequence_parallel=true",
        ),
        ("deepseek_v3", {"tp": 2}, {}, "experts needs sequence parallelism"),
        (
            "deepseek_v3",
            {"tp": 2},
            {"sequence_parallel": "False"},
            "experts needs sequence parallelism",
        ),
        (
            "qwen3_moe",
            {"dp": 3, "ep": 3},
            {},
            "student.parallel.ep 3: .* has 8 experts; ep 1 works$",
        ),
        (
            "qwen3_moe",
            {"dp": 4, "ep": 3},
            {},
            "student.parallel.ep 3: .* has 8 experts; ep 1, 2 or 4 work$",
        ),
        (
            "qwen3",
            {"dp": 2, "ep": 2},
            {},
            "student.parallel.ep 2: .* has no experts; ep 1 works$",
        ),
        (
            "qwen3_moe",
            {"ep": 2},
            {},
            "ep 2: a pipeline stage has 1 ranks and .* 8 experts; ep 1 works$",
        ),
        ("qwen3", {"vpp": 2}, {}, "student.parallel.vpp 2 needs a pipeline"),
        (
            "qwen3",
            {"tp": 2, "etp": 2},
            {},
            "etp 2 splits experts, of which .* has none; leave it out",
        ),
        (
            "qwen3_moe",
            {"tp": 2, "etp": 1},
            {"sequence_parallel": True},
            "etp 1 with tp 2 and ep 1 is not supported",
        ),
        (
            "qwen3_moe",
            {},
            {"moe_aux_loss_coeff": 0.01},
            "moe_aux_loss_coeff=0.01 makes a step depend on the layout",
        ),
        ("qwen3_moe", {}, {"moe_router_bias_update_rate": 1e-3}, "set deterministic=false"),
        ("qwen3", {}, {"hidden_dropout": 0.1}, "hidden_dropout=0.1 makes .* deterministic=false"),
        ("llama", {}, {"attention_dropout": 0.1}, "attention_dropout=0.1 .* deterministic=false"),
        (
            "qwen3_moe",
            {},
            {"moe_router_load_balancing_type": "sinkhorn"},
            "=sinkhorn .* deterministic=false, .* none or",
        ),
        ("deepseek_v3", {"cp": 2}, {}, "cp 2 does not go with latent attention"),
        (
            "qwen3",
            {"tp": 4},
            {},
            "student.parallel.tp 4: .* has 2 key-value heads; tp 1 or 2 work$",
        ),
        (
            "llama",
            {"tp": 3},
            {},
            "has 2 key-value heads, 4 attention heads and 128 columns in an FFN; tp 1 or 2 work$",
        ),
        (
            "deepseek_v3",
            {"tp": 8},
            {"sequence_parallel": True},
            "has 4 attention heads and 4 columns|has 4 attention heads",
        ),
        (
            "qwen3",
            {"pp": 3},
            {},
            "student.parallel.pp 3: .* has 4 layers; pp 1, 2 or 4 work$",
        ),
        (
            "qwen3",
            {"pp": 2, "vpp": 4},
            {},
            "pp 2 with vpp 4: .* has 4 layers; pp x vpp may be 1, 2 or 4$",
        ),
    ],
)
def test_layouts_that_would_be_wrong_are_refused_before_any_process_starts(
    tmp_path: Path, kind: str, parallel: dict, megatron: dict, message: str
) -> None:
    save_model(tmp_path, seed=0, model_type=kind)
    with pytest.raises(MtopdError, match=message):
        check_student(
            StudentConfig(model=tmp_path, parallel=parallel, megatron=megatron), deterministic=True
        )
    if "deterministic" in message:
        check_student(
            StudentConfig(model=tmp_path, parallel=parallel, megatron=megatron), deterministic=False
        )


def test_what_a_loss_at_coefficient_0_balances_depends_on_no_layout(tmp_path: Path) -> None:
    save_model(tmp_path, seed=0, model_type="qwen3_moe")
    for kind in ("none", "seq_aux_loss"):
        megatron = {"moe_router_load_balancing_type": kind}
        check_student(StudentConfig(model=tmp_path, megatron=megatron), deterministic=True)


def test_a_specialist_may_balance_its_experts_by_a_loss(tmp_path: Path) -> None:
    """It has no deterministic key: nothing is promised of another layout."""
    save_model(tmp_path / "base", seed=0, model_type="qwen3_moe")
    values = {
        "run_dir": tmp_path / "run",
        "student": {"model": tmp_path / "base", "megatron": {"moe_aux_loss_coeff": 0.01}},
        "data": {
            "sources": [{"name": "words", "path": write_prompts(tmp_path / "prompts.jsonl")}],
            "context_length": 64,
            "max_response": 16,
        },
        "train": {
            "num_steps": 1,
            "global_batch_size": 2,
            "micro_batch_size": 2,
            "optimizer": {"lr": 1e-3},
        },
    }
    config = SpecialistConfig.model_validate(values)
    run = RunDir(config.run_dir)
    with run.lock():
        specialist(config, run, print)
    assert run.generation == 1
    values["store"] = {"name": "t", "path": tmp_path / "t", "slices": 3}
    with (
        run.lock(),
        pytest.raises(MtopdError, match=r"slices 3: .* has 2 key-value heads .* 1 or 2 work"),
    ):
        specialist(SpecialistConfig.model_validate(values), run, print)


@pytest.mark.parametrize(
    ("num_experts", "tp", "ep", "message"),
    [
        (8, 4, 1, "has 2 slices, which its parallel.tp 4 .*; tp 1 or 2 work, or add the teacher"),
        (8, 1, 3, "has 8 experts, which its parallel.ep 3 does not divide; ep 1, 2 or 4 work$"),
        (0, 1, 2, "has no experts, which its parallel.ep 2 does not divide; ep 1 works$"),
    ],
)
def test_a_mesh_that_does_not_divide_its_teacher_is_refused(
    num_experts: int, tp: int, ep: int, message: str
) -> None:
    store = SimpleNamespace(slices=2, num_experts=num_experts)
    check_mesh("t0", store, 2, 4 if num_experts else 1, world_size=4)  # type: ignore[arg-type]
    with pytest.raises(MtopdError, match=f"teacher 't0' {message}"):
        check_mesh("t0", store, tp, ep, world_size=4)  # type: ignore[arg-type]


def test_a_specialists_store_has_a_place_before_it_is_trained(tmp_path: Path) -> None:
    """At the end of the training it would be late."""
    (tmp_path / "other").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(MtopdError, match=r"other exists, and what .* is not trained yet"):
        check_place(tmp_path / "other")
    with pytest.raises(MtopdError, match=r"file/a/s cannot be written: .*file is no folder"):
        check_place(tmp_path / "file" / "a" / "s")
    check_place(tmp_path / "new" / "s")


def test_more_ranks_than_a_machine_starts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    check_world(StudentConfig(model="hf", parallel={"dp": 128}))
    with pytest.raises(
        MtopdError, match=r"10000 ranks, all on this machine \(2 cores\); it starts 128"
    ):
        check_world(StudentConfig(model="hf", parallel={"dp": 10_000}))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "10000")
    check_world(StudentConfig(model="hf", parallel={"dp": 10_000}))


def test_a_router_that_is_not_there_is_not_frozen(tmp_path: Path) -> None:
    save_model(tmp_path, seed=0, layers=2)
    with pytest.raises(
        MtopdError, match=r"student\.freeze_router: .* has no experts and no router"
    ):
        check_student(StudentConfig(model=tmp_path, freeze_router=True), deterministic=True)


def test_an_uneven_number_of_layers_is_answered_with_a_split_that_works(tmp_path: Path) -> None:
    save_model(tmp_path, seed=0, layers=5)
    with pytest.raises(
        MtopdError, match=r"pp 1 or 5 work, or an uneven split, e.g. (.*)$"
    ) as error:
        check_student(StudentConfig(model=tmp_path, parallel={"pp": 3}), deterministic=True)
    options = dict(
        o.removeprefix("student.megatron.").split("=")
        for o in str(error.value).split("e.g. ")[1].split()
    )
    megatron = {name: int(value) for name, value in options.items()}
    check_student(
        StudentConfig(model=tmp_path, parallel={"pp": 3}, megatron=megatron), deterministic=True
    )


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"attention_bias": True}, "attention_bias True"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type 'linear'",
        ),
    ],
)
def test_a_variant_of_the_student_is_refused_by_its_file_before_any_process_starts(
    tmp_path: Path, fields: dict, named: str
) -> None:
    save_model(tmp_path, seed=0, model_type="llama")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(MtopdError, match=f"{path}: .*{named}"):
        check_student(StudentConfig(model=tmp_path), deterministic=True)


@pytest.mark.parametrize(
    ("megatron", "message"),
    [
        ({"layernorm_epsilon": 0.01}, "layernorm_epsilon=0.01: config.json of .* it is 1e-06"),
        ({"rotary_interleaved": True}, "rotary_interleaved=True: .* it is False; leave it out"),
        ({"num_layers": 1}, "num_layers=1: .* it is 4"),
        (
            {"recompute_granularity": "full", "recompute_method": "often"},
            r"Megatron refuses the options under student.megatron \(recompute_granularity, "
            "recompute_method",
        ),
        ({"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}, "moe_act"),
    ],
)
def test_megatron_options_that_cannot_be_are_refused_before_any_process_starts(
    tmp_path: Path, megatron: dict, message: str
) -> None:
    save_model(tmp_path, seed=0)
    with pytest.raises(MtopdError, match=message):
        check_student(StudentConfig(model=tmp_path, megatron=megatron), deterministic=True)


def other_values(value: object) -> list[object]:
    """What else a setting of config.json could be; not all of it is a config."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [2 * value, value + 1, value - 1, 0, 1]
    if isinstance(value, float):
        return [2 * value + 1, value / 2, 0.5]
    return [2, 0.5, True, "none"]


def variants_of(values: dict[str, object]) -> Iterator[dict[str, object]]:
    """``values`` of a config.json with one setting changed, each setting in turn."""
    for key, value in values.items():
        if isinstance(value, dict):
            for inner in variants_of(value):
                yield {**values, key: inner}
        elif key != "model_type":
            for other in other_values(value):
                yield {**values, key: other}


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "deepseek_v3"])
def test_every_megatron_field_that_follows_from_config_json_is_refused_unless_equal(
    tmp_path: Path, kind: str
) -> None:
    """Which fields those are is found by changing every setting of config.json and looking at what
    moves in Megatron's config: no list says it.
    """
    save_model(tmp_path, seed=0, model_type=kind, layers=2)
    student = StudentConfig(model=tmp_path)

    def megatron_config(values: dict[str, Any]) -> dict[str, object]:
        hf_config = hf_config_from_dict(values)
        bridge = build_bridge(
            student, hf_config, sort_fields({}), torch.device("cpu"), layout=student.parallel
        )
        return dict(vars(bridge.transformer_config))

    values = load_hf_config(tmp_path).to_dict()
    truth, others = megatron_config(values), dict[str, object]()
    for variant in variants_of(values):
        with contextlib.suppress(Exception):  # it is no config, or none that is supported
            for name, value in megatron_config(variant).items():
                if not callable(value) and value != truth[name]:
                    others.setdefault(name, value)
    common = {"hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"}
    assert common | {"kv_channels"} <= others.keys(), "the search finds what it must"
    for name, value in others.items():
        check_student(
            StudentConfig(model=tmp_path, megatron={name: truth[name]}), deterministic=True
        )
        given = StudentConfig(model=tmp_path, megatron={name: value})
        with pytest.raises(MtopdError, match=f"student.megatron.{name}=.*{tmp_path} decides it"):
            check_student(given, deterministic=True)


def test_megatron_options_that_go_together_pass_on_every_layout(tmp_path: Path) -> None:
    save_model(tmp_path, seed=0)
    megatron = {
        "layernorm_epsilon": "1e-6",  # what the checkpoint has
        "sequence_parallel": True,
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
        "use_distributed_optimizer": True,
        "adam_eps": 1e-6,
    }
    for parallel in ({"tp": 2}, {"tp": 2, "pp": 2, "vpp": 2}, {"tp": 2, "cp": 2, "dp": 2}):
        student = StudentConfig(model=tmp_path, parallel=parallel, megatron=megatron)
        check_student(student, deterministic=True)


def store_with(folder: Path, **noted: object) -> SimpleNamespace:
    """What ``check_teacher`` asks of a store whose tokenizer lies in ``folder``."""
    tokenizer = load_tokenizer(folder)
    manifest = {
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "eos_token": tokenizer.eos_token,
        **noted,
    }
    return SimpleNamespace(
        manifest={key: value for key, value in manifest.items() if value is not ...},
        vocab_size=vocab_size(tokenizer),
        location="s3://bucket/t",
        tokenizer_folder=lambda: nullcontext(folder),
    )


@pytest.mark.parametrize(
    "noted", [{}, {"tokenizer_hash": "over eos too, as once", "eos_token": ...}]
)
def test_tokenizers_agree_where_the_loss_can_meet_them(tmp_path: Path, noted: dict) -> None:
    """A base student and an instruct teacher: one table, other end tokens."""
    student = load_tokenizer(tokenizer_folder(tmp_path / "student"))
    other = tokenizer_folder(tmp_path / "teacher")
    said: list[str] = []

    def check(store: SimpleNamespace) -> None:
        check_teacher("t", store, student, tmp_path / "student", said.append)  # type: ignore[arg-type]

    check(store_with(other, **noted))
    assert not said
    path = other / "tokenizer_config.json"
    values = {**json.loads(path.read_text()), "eos_token": "<sep>", "pad_token": "<eos>"}
    path.write_text(json.dumps(values))
    check(store_with(other, **noted))
    (line,) = said
    assert "teacher 't' ends answers with '<sep>', the student with '<eos>' (eos_token)" in line
    assert "answers may run to their limit" in line
    generation = tmp_path / "student" / "generation_config.json"
    generation.write_text('{"eos_token_id": [1, 2]}')
    check(store_with(other, **noted))
    assert said[1].endswith("responses end at either")

    theirs = load_tokenizer(other)
    theirs.add_tokens([f"<{i}>" for i in range(5)])
    theirs.save_pretrained(other)
    check(store_with(other, **noted))
    assert said[2] == (
        "teacher 't' has tokens that the student lacks ('<0>', '<1>', '<2>' and 2 more): the loss "
        "leaves them out"
    )
    grown = tokenizer_folder(tmp_path / "grown")
    theirs.save_pretrained(grown)
    with pytest.raises(MtopdError, match="token id 100 is no token in one and '<0>' in the other"):
        check_teacher("t", store_with(tmp_path / "student"), load_tokenizer(grown), grown)  # type: ignore[arg-type]

    path = other / "tokenizer.json"
    path.write_text(path.read_text().replace('"A": 36', '"B": 36').replace('"B": 37', '"A": 37'))
    with pytest.raises(MtopdError, match=r"another tokenizer .* token id 36 is 'B' in one and 'A'"):
        check(store_with(other, **noted))
    path.write_text("{}")
    broken = store_with(tmp_path / "student", tokenizer_hash="of another")
    broken.tokenizer_folder = lambda: nullcontext(other)
    with pytest.raises(MtopdError, match=r"^s3://bucket/t/tokenizer: no readable tokenizer"):
        check(broken)


@pytest.mark.parametrize(
    ("eos", "config", "generation", "ends", "pad"),
    [
        ("<eos>", 1, 1, (1,), "<pad>"),
        ("<eos>", [2, 1], None, (1, 2), "<pad>"),  # as Qwen and Llama-3 write it
        ("<eos>", None, [1, 0, 2], (1, 0, 2), None),
        (None, None, 2, (2,), None),
    ],
)
def test_every_end_token_that_the_students_files_name_ends_a_response(
    tmp_path: Path, eos: str | None, config: object, generation: object, ends: tuple, pad: str
) -> None:
    tokenizer_folder(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    values = {**json.loads(path.read_text()), "eos_token": eos, "pad_token": pad}
    path.write_text(json.dumps(values))
    for name, value in (("config", config), ("generation_config", generation)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"eos_token_id": value}))
    tokenizer = load_tokenizer(tmp_path)
    assert end_ids(tokenizer, tmp_path) == ends
    student = SimpleNamespace(tokenizer=tokenizer, end_ids=ends, vocab_size=100)
    rollout = RolloutConfig(prompts_per_iteration=1, stop_ids=[7])
    assert Student.ending(student, rollout).end_ids == {*ends, 7}  # type: ignore[arg-type]
    assert Student.ending(student, None).end_ids == {*ends}  # type: ignore[arg-type]
    assert pad_id(tokenizer, ends) == (0 if pad else ends[0])
    said: list[str] = []
    check_ends(tmp_path, tokenizer, said.append)
    assert len(said) == (ends != (tokenizer.eos_token_id,)) + (pad is None)
    assert all(len(ends) == 1 or "or '<sep>'" in line for line in said if "answers end at" in line)


def test_a_student_that_cannot_end_is_refused(tmp_path: Path) -> None:
    tokenizer_folder(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": None}))
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(MtopdError, match="names no EOS token: an answer could not end"):
        end_ids(tokenizer, tmp_path)
    for wrong in ("<eos>", [1.5], True, {"a": 1}):
        (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(MtopdError, match=r"config.json: eos_token_id is .*must be a token id"):
            end_ids(tokenizer, tmp_path)


@pytest.mark.parametrize("value", [4_000, -1, [1, 100]])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_an_end_token_outside_the_vocabulary_is_refused_by_its_file(
    tmp_path: Path, name: str, value: object
) -> None:
    """The model might even have a row for it: such an id is a mistake, and answers would run on."""
    save_model(tmp_path, seed=0, vocab=128)  # rows for more ids than the tokenizer's 100
    path = tmp_path / name
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | {"eos_token_id": value}))
    wrong = value[-1] if isinstance(value, list) else value
    with pytest.raises(MtopdError, match=f"^{path}: eos_token_id {wrong} is outside the vocab"):
        check_student(StudentConfig(model=tmp_path), deterministic=True)


def test_a_token_that_the_student_lacks_cannot_end_a_response(tmp_path: Path) -> None:
    """Found before ranks start, as all that needs none."""
    tokenizer = load_tokenizer(tokenizer_folder(tmp_path))
    last = vocab_size(tokenizer) - 1
    for ids, refused in (([], False), ([0, last], False), ([0, last + 1], True)):
        config = SimpleNamespace(rollout=SimpleNamespace(stop_ids=ids))
        said = f"stop_ids has {last + 1}, the student's tokenizer has the ids 0 to {last};"
        with pytest.raises(MtopdError, match=said) if refused else nullcontext():
            check_stop_ids(config, tokenizer)  # type: ignore[arg-type]


def test_a_baseline_answers_in_the_students_tokens(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    save_model(folder, seed=0)
    tokenizer_folder(folder)
    tokenizer, said = load_tokenizer(folder), []
    baseline = SimpleNamespace(
        evaluation=SimpleNamespace(baselines={"base": folder}),
        student=SimpleNamespace(model=tmp_path / "student"),
    )
    check_baselines(baseline, tokenizer, said.append)
    assert not said
    table = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = table["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (folder / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(
        MtopdError, match=r"baselines\.base: .* another tokenizer .* 'B' in one and 'A'"
    ):
        check_baselines(baseline, tokenizer)
    (folder / "tokenizer.json").unlink()
    check_baselines(baseline, tokenizer, said.append)
    assert "no tokenizer in" in said[0]
    tokenizer.add_tokens(["<one more>"])
    with pytest.raises(
        MtopdError, match=r"baselines\.base: .* has 100 rows for the 101 ids of the student's"
    ):
        check_baselines(baseline, tokenizer)
