"""What a start asks of SGLang servers before there are ranks."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from mtopd.config import ConsolidateConfig
from mtopd.pipelines.serving import await_servers, check_engine, write_folder
from mtopd.run_dir import RunDir
from mtopd.types import MtopdError
from tests.pipelines.test_serve import config_of
from tests.rollout.fake_sglang import FakeServer
from tests.small_models import save_model

NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    save_model(tmp_path / "hf", seed=0, layers=1)
    return config_of(tmp_path, tmp_path / "hf", servers=[NOBODY], patience_s=0.1)


def parsed(values: dict[str, Any], **rollout: Any) -> ConsolidateConfig:
    return ConsolidateConfig.model_validate({**values, "rollout": values["rollout"] | rollout})


def test_a_baseline_that_servers_would_compute_otherwise_is_refused(
    values: dict[str, Any], tmp_path: Path
) -> None:
    """Its tensors would fit, and its answers would be wrong: they turn by other angles."""
    save_model(tmp_path / "same", seed=1, layers=1, vocab=300)
    values["evaluation"] = {"baselines": {"same": tmp_path / "same"}}
    check_engine(parsed(values))
    rope = {"rope_type": "default", "rope_theta": 5e5}
    save_model(tmp_path / "other", seed=1, layers=1, rope_parameters=rope)
    values["evaluation"]["baselines"]["other"] = tmp_path / "other"
    with pytest.raises(MtopdError, match=r"baselines\.other: .*compute: .*rope_theta"):
        check_engine(parsed(values))
    values["rollout"] = {"prompts_per_iteration": 8}
    check_engine(parsed(values))  # the embedded engine builds each baseline's own


def test_the_clients_library_is_asked_for(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MtopdError, match=r"needs aiohttp.*pip install 'mtopd\[sglang\]'"):
        check_engine(parsed(values))


def test_the_folder_is_written_and_its_command_said_once(values: dict[str, Any]) -> None:
    run, said = RunDir(Path(values["run_dir"])), list[str]()
    write_folder(parsed(values), run, 200, said.append)
    write_folder(parsed(values), run, 200, said.append)
    assert [path.name for path in run.serving.iterdir()] == ["config.json"]
    (line,) = said
    for part in (
        f"--model-path {run.serving} --load-format dummy",
        "--enable-deterministic-inference",
        "--skip-tokenizer-init",
        "--incremental-streaming-output",
    ):
        assert part in line
    assert "--context-length" not in line
    values["data"]["context_length"] = 128  # as many as the model has positions
    write_folder(parsed(values, seeded=False), run, 199, said.append)
    assert "--context-length 136" in said[1] and "LONGER_CONTEXT_LEN=1 python" in said[1]
    assert "--enable-deterministic-inference" not in said[1]


def test_servers_must_answer_as_their_client_reads(
    tmp_path: Path,
    values: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = RunDir(tmp_path / "run")
    with pytest.raises(MtopdError, match=rf"{NOBODY} does not answer .*take its URL out of"):
        await_servers(parsed(values), run)
    assert f"waiting for SGLang server {NOBODY}" in capsys.readouterr().err
    await_servers(parsed({**values, "rollout": {"prompts_per_iteration": 8}}), run)

    async def ask(server: FakeServer, **data: int) -> None:
        await server.start()
        try:
            asked = {**values, "data": values["data"] | data}
            await asyncio.to_thread(await_servers, parsed(asked, servers=[server.url]), run)
        finally:
            await server.die()

    asyncio.run(ask(FakeServer()))
    with pytest.raises(MtopdError, match=r"its longest input is 2041 tokens; data\.context_length"):
        asyncio.run(ask(FakeServer(), context_length=2042))
