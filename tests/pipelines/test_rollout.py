"""What an iteration asks, before anybody answers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mtopd.pipelines.requests import plan_requests
from mtopd.pipelines.rollout_files import former_logs
from mtopd.rollout import token_log
from mtopd.rollout.engine import Request
from mtopd.rollout.token_log import TokenLog, log_path, logs_before
from mtopd.types import Prompt
from tests.support.gloo_ranks import on_ranks


class Table(list[Prompt]):
    """Counts how often a prompt is read."""

    num_read = 0

    def __getitem__(self, row: Any) -> Any:
        self.num_read += 1
        return super().__getitem__(row)


def test_every_sample_has_its_request_and_a_prompt_is_read_once() -> None:
    tables = [Table(Prompt(f"{s}/{i}", {}, (i,), s) for i in range(5)) for s in "ab"]
    config = SimpleNamespace(
        rollout=SimpleNamespace(
            prompts_per_iteration=12, samples_per_prompt=4, samples_per_iteration=48, carry_over=0
        ),
        seed=3,
    )
    session: Any = SimpleNamespace(config=config, prompts=SimpleNamespace(train=tables))
    iteration: Any = SimpleNamespace(number=5, is_last=False)
    planned = plan_requests(session, iteration)
    assert [request.sample_id for _, request in planned.values()] == list(range(2 * 6 * 4))
    assert {request.iteration for _, request in planned.values()} == {5}
    pairs = [*planned.values()]
    assert all(p.prompt_id == r.prompt_id and p.prompt_ids is r.prompt_ids for p, r in pairs)
    named = {(request.prompt_id, request.sample) for _, request in pairs}
    assert len(named) == len(planned), "6 of 5 prompts: the one that comes twice has other draws"
    assert [table.num_read for table in tables] == [5, 5]


def test_ranks_look_through_former_logs_by_shares_and_know_what_all_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five ranks of the killed start, a sample each; sample 3 is in a sealed shard."""
    for rank in range(5):
        path = log_path(tmp_path / "logs", 1, rank)
        log = TokenLog("killed", path, run="r", engine="none", versions={0: "r/1/0"})
        log.begin([Request(rank, "p", (1,))])
        log.append(rank, [7] * (rank + 1), [-1.0] * (rank + 1), version=0)
        log.close()
    read: list[str] = []
    plain = token_log.read_log
    monkeypatch.setattr(token_log, "read_log", lambda p: read.append(p.name) or plain(p))

    def body(ranks: Any) -> tuple[list[str], list[str], dict[int, int]]:
        here = SimpleNamespace(**vars(ranks), device=torch.device("cpu"))
        run = SimpleNamespace(id="r", generation=2)
        session: Any = SimpleNamespace(ranks=here, run=run)
        iteration: Any = SimpleNamespace(token_logs=tmp_path / "logs", number=0)
        former = former_logs(session, iteration, {0, 1, 2, 4, 5})
        shared = read[:]
        former.read([ranks.rank, 3, 4])
        lengths = {i: response.length for i, response in former.responses.items()}
        return shared, read[len(shared) :], lengths

    names = [path.name for path in logs_before(tmp_path / "logs", 2)]
    assert on_ranks(tmp_path, body) == [
        (names[0::3], [names[0], names[4]], {0: 1, 4: 5}),
        (names[1::3], [names[1], names[4]], {1: 2, 4: 5}),
        (names[2::3], [names[2], names[4]], {2: 3, 4: 5}),
    ]
