"""The run's prompt table: what is left out of it."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mtopd import prompt_table
from mtopd.config_data import DataConfig, SourceConfig
from mtopd.data import load_source, source_identity
from mtopd.data.sources import PromptRow, PromptSource
from mtopd.prompt_table import Prompts, write_prompt_table
from mtopd.run_dir import RunDir
from mtopd.tokenizer import load_tokenizer
from mtopd.types import MtopdError
from tests.prompt_examples import write_jsonl
from tests.small_models import tokenizer_folder


def data_config(tmp_path: Path, overlong: str, *lengths: int) -> DataConfig:
    rows = [{"prompt": "x" * length, "answer": str(length)} for length in lengths]
    path = write_jsonl(tmp_path / f"{len(lengths)}.jsonl", *rows)
    sources = [{"name": "a", "path": path, "eval_path": path}, {"name": "b", "path": path}]
    values = {"sources": sources, "context_length": 16, "max_response": 8, "overlong": overlong}
    return DataConfig.model_validate(values)


@pytest.mark.parametrize("supervised", [False, True])
def test_overlong_prompts_are_dropped_and_counted_or_all_named(
    tmp_path: Path, tokenizer, supervised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = (3, 12, 4, 30)  # beside its answer the 12 fits, beside 8 tokens of a response not
    kept = [0, 1, 2] if supervised else [0, 2]
    run, said = RunDir(tmp_path), []

    def write(config: DataConfig) -> None:
        write_prompt_table(
            run, config, tokenizer, {"t": {}}, supervised=supervised, progress=said.append
        )

    count = 4 if supervised else 6
    with pytest.raises(
        MtopdError, match=rf"^{count} prompts leave no room .*: a/\d, a.*longest, prompt a"
    ):
        write(data_config(tmp_path, "error", *lengths))
    assert not run.prompts.exists()
    config = data_config(tmp_path, "drop", *lengths)
    write(config)
    assert (
        f"a: {4 - len(kept)} of 4 prompts leave no room for the response and are left out" in said
    )
    assert "a-eval: 2 of 4 prompts leave no room for the response and are left out" in said
    assert any(line.startswith("2 of 2 different held-out prompts are training") for line in said)
    prompts = Prompts.load(run, config)
    assert [p.prompt_id for p in prompts.evaluation[0]] == ["a-eval/0", "a-eval/2"]
    for name, table in zip("ab", prompts.train, strict=True):
        assert [table[i].prompt_id for i in range(len(table))] == [f"{name}/{i}" for i in kept]
        for i in range(len(table)) if supervised else ():
            answer = tokenizer.decode(table.example(i).response_ids)
            assert answer == f"{lengths[kept[i]]}<eos>"
    files = list[str]()
    map_file = pa.memory_map
    with monkeypatch.context() as patched:
        patched.setattr(pa, "memory_map", lambda path: (files.append(path), map_file(path))[1])
        for name in ("open", "read_bytes", "read_text"):
            patched.setattr(Path, name, lambda path, *_: files.append(str(path)))
        Prompts.load(run, config)
    assert files == [str(run.prompts)], "a rank maps one file, and reads no source again"
    run.prompts.unlink()
    with pytest.raises(MtopdError, match="all 2 prompts of a leave no room"):
        write(data_config(tmp_path, "drop", 20, 30))
    assert json.loads(config.model_dump_json())["overlong"] == "drop"


def test_a_source_with_fewer_prompts_than_an_iteration_takes_is_named(
    tmp_path: Path, tokenizer
) -> None:
    """a and b have 4 prompts, of which the 30 is dropped."""
    for per_iteration, repeats in ((3, False), (4, True)):
        run, said = RunDir(tmp_path / str(per_iteration)), list[str]()
        run.path.mkdir()
        write_prompt_table(
            run,
            data_config(tmp_path, "drop", 3, 5, 4, 30),
            tokenizer,
            {"t": {}},
            supervised=False,
            progress=said.append,
            per_iteration=per_iteration,
        )
        found = [line for line in said if "each comes 1.33 times on average" in line]
        assert len(found) == (2 if repeats else 0)
        assert all("takes 4 prompts of it" in line and "it has 3" in line for line in found)


def test_a_teacher_that_no_prompt_goes_to_is_refused(tmp_path: Path, tokenizer) -> None:
    """An accent in two characters looks like one in one, and the empty route takes all."""
    path = write_jsonl(tmp_path / "p.jsonl", {"prompt": "x", "domain": "cafe\u0301"})
    values = {"sources": [{"name": "a", "path": path}], "context_length": 16, "max_response": 8}
    config = DataConfig.model_validate(values)

    def write(*keys: dict[str, str]) -> None:
        routes = {f"t{index}": route for index, route in enumerate(keys)}
        write_prompt_table(
            RunDir(tmp_path), config, tokenizer, routes, supervised=False, progress=lambda _: None
        )

    said = r"^no training prompt goes to teacher 't1': its route is .*'caf\\xe9'.*'cafe\\u0301'"
    with pytest.raises(MtopdError, match=said):
        write({}, {"domain": "caf\u00e9"})
    assert not RunDir(tmp_path).prompts.exists()
    write({}, {"domain": "cafe\u0301"})  # a net may catch nothing


class _Rows(Sequence[PromptRow]):
    """Rows that are made when asked for: what stays in memory is the table writer's."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        text = f"{index:06d} " * 30
        return PromptRow(({"role": "user", "content": text},), None, {"domain": str(index)}, {})


def test_the_table_is_written_without_holding_its_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of memory a prompt, by the growth from 400 to 4,000 prompts of 211 tokens."""
    tokenizer = load_tokenizer(tokenizer_folder(tmp_path / "t"))
    values = {
        "sources": [{"name": "a", "path": "a.jsonl"}],
        "context_length": 256,
        "max_response": 8,
    }
    config = DataConfig.model_validate(values)
    monkeypatch.setattr(prompt_table, "_ROWS_AT_ONCE", 50, raising=False)

    def peak(count: int) -> int:
        source = PromptSource("a", "a", _Rows(count))
        monkeypatch.setattr(prompt_table, "load_source", lambda *_: (source, None))
        run = RunDir(tmp_path / str(count))
        run.path.mkdir()
        tracemalloc.start()
        write_prompt_table(
            run, config, tokenizer, {"t": {}}, supervised=False, progress=lambda _: None
        )
        _, highest = tracemalloc.get_traced_memory()
        arrow = pa.default_memory_pool().max_memory()
        tracemalloc.stop()
        return highest + arrow

    few = peak(400)
    a_prompt = (peak(4000) - few) / 3600
    assert a_prompt < 100, f"{a_prompt:.0f} bytes a prompt"
    before = pa.total_allocated_bytes()
    table = Prompts.load(RunDir(tmp_path / "4000"), config).train[0]  # would count as the writer's
    assert len(table) == 4000
    assert pa.total_allocated_bytes() - before < 4000 * 40, "a prompt's tokens are 844 bytes"
    assert tokenizer.decode(table[3999].prompt_ids).startswith("003999")


def test_what_is_no_file_is_refused_before_it_is_read_to_its_end(tmp_path: Path) -> None:
    """A pipe would wait, and a device has no end."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in (Path("/dev/zero"), tmp_path / "pipe.jsonl"):
        with pytest.raises(MtopdError, match=f"{path} does not exist or is no file"):
            source_identity(SourceConfig(name="a", path=path))
    with pytest.raises(MtopdError, match="is a folder; give one file of it"):
        source_identity(SourceConfig(name="a", path=tmp_path))


def test_an_empty_domain_of_a_source_stands(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", {"prompt": "x"})
    train, _ = load_source(SourceConfig(name="a", path=path, fields={"domain": ""}))
    assert train.rows[0].route == {"domain": ""}
