"""What the start and `mtopd doctor MODEL` say of memory and layouts."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from rich.console import Console

from mtopd.config import ConsolidateConfig
from mtopd.config_specialist import SpecialistConfig
from mtopd.families import model_facts
from mtopd.hf_checkpoint import load_hf_config
from mtopd.pipelines import memory
from mtopd.planning import Layout, rank_capacity
from mtopd.types import MtopdError
from tests.small_models import save_model, write_prompts

GIB = 1 << 30


def printed(model: Path, **options: object) -> str:
    text = io.StringIO()
    console = Console(file=text, width=200, soft_wrap=True)
    memory.print_layouts(model, console, **{"dtype": "float32", "tokens": 64, **options})  # type: ignore[arg-type]
    return text.getvalue()


def test_every_layout_that_works_is_listed_with_what_a_rank_holds(tmp_path: Path) -> None:
    save_model(tmp_path, seed=0, model_type="qwen3_moe")
    said = printed(tmp_path)
    assert "4 layers, 2 key-value heads, 4 attention heads, 8 experts" in said
    assert "tp, and slices of a teacher store: 1 or 2\n" in said
    assert "pp x vpp: 1, 2 or 4\n" in said and "ep: 1, 2, 4 or 8\n" in said
    rows = {tuple(line.split()[1:4]) for line in said.splitlines() if line[:1].isdigit()}
    assert any("tp2" in row and "pp2" in row for row in rows) and "pp8" not in said
    assert "needs student.megatron.sequence_parallel=true" in said


@pytest.mark.parametrize("narrowest", [{}, {"vocab_size": 16 << 20}])  # MiB, GiB
def test_the_table_of_layouts_is_plain_numbers_below_their_names(
    tmp_path: Path, narrowest: dict[str, int]
) -> None:
    save_model(tmp_path, seed=0, model_type="qwen3_moe")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | narrowest))
    said = printed(tmp_path)
    unit = "GiB" if narrowest else "MiB"
    assert f"{unit} that one rank will hold (float32, 64 tokens of a micro-batch):\n" in said
    lines = [f"{line} " for line in said.splitlines()]
    first = next(i for i, line in enumerate(lines) if line.startswith("ranks"))
    heads = lines[first].split()
    assert heads == [
        *("ranks", "layout", "weights", "grads", "optim.", "engine", "activ.", "teacher", "copy"),
        *("total", "fits"),
    ]
    ends = [lines[first].index(f" {head} ") + 1 + len(head) for head in heads[2:]]
    libraries = 600 / (1024 if narrowest else 1)
    rows = [line for line in lines[first:] if line[:1].isdigit()]
    assert rows and max(map(len, rows)) <= 80 + 1
    for row in rows:
        assert all(row[end - 1] != " " and row[end] == " " for end in ends), row
        *parts, total, fits = row.split()[-len(ends) :]
        assert all(re.fullmatch(r"\d+\.\d", number) for number in (*parts, total))
        assert sum(map(float, parts)) + libraries == pytest.approx(float(total), abs=0.5)
        assert fits in ("yes", "no")


def test_a_folder_that_cannot_be_a_student_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(MtopdError, match=r"has no config\.json"):
        printed(tmp_path)
    save_model(tmp_path, seed=0, model_type="llama", attention_bias=True)
    with pytest.raises(MtopdError, match="attention_bias True is not supported"):
        printed(tmp_path)
    with pytest.raises(MtopdError, match="--dtype fp8: a student's is float32 or bfloat16"):
        printed(tmp_path, dtype="fp8")


def test_a_machine_with_less_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path, seed=0)
    sizes = model_facts(load_hf_config(tmp_path)).sizes
    capacity = rank_capacity(
        sizes, Layout(dp=2), dtype_bytes=4, micro_batch_tokens=10, kept_teachers=3 * GIB
    )

    def machine(host: int, device: int) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=host))
        monkeypatch.setattr(memory, "_device_bytes", lambda ranks: device)

    machine(8 * GIB, 0)
    assert memory.too_little(capacity, 2) == ""
    assert "8.0 GiB of memory free, its 4 ranks will hold 14." in memory.too_little(capacity, 4)
    machine(8 * GIB, 1 << 20)
    assert "a device has 1.0 MiB, a rank will hold" in memory.too_little(capacity, 2)
    machine(8 * GIB, 80 * GIB)  # what lies on devices does not count for the host
    assert memory.too_little(capacity, 2) == ""


def test_the_start_says_what_its_config_will_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "hf", seed=0)
    values = {
        "run_dir": tmp_path / "run",
        "student": {"model": tmp_path / "hf", "parallel": {"tp": 2, "dp": 2}},
        "teachers": [{"name": "t", "store": str(tmp_path / "t"), "route": {}}],
        "data": {
            "sources": [{"name": "words", "path": write_prompts(tmp_path / "prompts.jsonl")}],
            "context_length": 64,
            "max_response": 16,
        },
        "rollout": {"prompts_per_iteration": 8},
        "train": {"num_iterations": 1, "micro_batch_size": 4, "optimizer": {"lr": 1e-3}},
    }
    config = ConsolidateConfig.model_validate(values)
    facts = model_facts(load_hf_config(tmp_path / "hf"))
    capacity = memory.config_capacity(config, facts, 1000)
    assert capacity.kept_teachers == 250 and capacity.params < facts.sizes.num_params
    assert memory.config_capacity(config, facts, 1 << 50).kept_teachers == 4 * GIB
    values["student"] = {**values["student"], "megatron": {"use_distributed_optimizer": True}}  # type: ignore[dict-item]
    sharded = memory.config_capacity(ConsolidateConfig.model_validate(values), facts, 1000)
    assert 2 * sharded.optimizer == capacity.optimizer
    said: list[str] = []
    needed = 4 * (capacity.weights + capacity.gradients + capacity.optimizer + capacity.engine)
    free = SimpleNamespace(available=needed)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    monkeypatch.setattr(memory, "_device_bytes", lambda ranks: 0)
    memory.report_memory(config, [SimpleNamespace(pass_bytes=lambda: 1000)], 4, said.append)  # type: ignore[list-item]
    assert said[0] == f"each rank will hold about {capacity}"
    assert said[1].startswith("warning: this machine has")
    free.available -= 4
    mib = f"{capacity.engine / (1 << 20):.2f} MiB"
    with pytest.raises(MtopdError, match=f"embedded holds the whole student on each rank, {mib}, "):
        memory.report_memory(config, [SimpleNamespace(pass_bytes=lambda: 1000)], 4, said.append)  # type: ignore[list-item]


def test_the_start_of_a_specialist_says_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its engine is there for held-out prompts alone; less memory than it takes is a warning."""
    save_model(tmp_path / "hf", seed=0)
    facts, said = model_facts(load_hf_config(tmp_path / "hf")), list[str]()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 20))
    monkeypatch.setattr(memory, "_device_bytes", lambda ranks: 0)
    for source, engine in (({}, 0), ({"eval_path": "e.jsonl"}, 4 * facts.sizes.num_params)):
        values = {
            "run_dir": tmp_path / "run",
            "student": {"model": tmp_path / "hf", "parallel": {"tp": 2}},
            "data": {
                "sources": [{"name": "words", "path": "p.jsonl", **source}],
                "context_length": 64,
                "max_response": 16,
            },
            "train": {
                "num_steps": 1,
                "global_batch_size": 8,
                "micro_batch_size": 4,
                "optimizer": {"lr": 1e-3},
            },
        }
        config = SpecialistConfig.model_validate(values)
        capacity = memory.config_capacity(config, facts, 0)
        assert (capacity.engine, capacity.kept_teachers) == (engine, 0)
        memory.report_memory(config, [], 2, said.append)
        assert said[-2] == f"each rank will hold about {capacity}"
        assert said[-1].startswith("warning: this machine has 0.00 GiB of memory free")
    values["train"] |= {"micro_batch_size": 8}  # type: ignore[operator]
    wider = memory.config_capacity(SpecialistConfig.model_validate(values), facts, 0)
    assert wider.activations == pytest.approx(2 * capacity.activations, rel=1e-6)
