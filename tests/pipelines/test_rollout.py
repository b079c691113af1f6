"""What an iteration asks, before anybody answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from mtopd.pipelines.rollout import plan_requests
from mtopd.types import Prompt


class Table(list[Prompt]):
    """Counts how often a prompt is read."""

    num_read = 0

    def __getitem__(self, row: Any) -> Any:
        self.num_read += 1
        return super().__getitem__(row)


def test_every_sample_has_its_request_and_a_prompt_is_read_once() -> None:
    tables = [Table(Prompt(f"{s}/{i}", {}, (i,), s) for i in range(5)) for s in "ab"]
    config = SimpleNamespace(
        rollout=SimpleNamespace(prompts_per_iteration=12, samples_per_prompt=4), seed=3
    )
    session: Any = SimpleNamespace(config=config, prompts=SimpleNamespace(train=tables))
    planned = plan_requests(session, SimpleNamespace(number=0))  # type: ignore[arg-type]
    assert [request.sample_id for _, request in planned] == list(range(2 * 6 * 4))
    assert all(p.prompt_id == r.prompt_id and p.prompt_ids is r.prompt_ids for p, r in planned)
    named = {(request.prompt_id, request.sample) for _, request in planned}
    assert len(named) == len(planned), "6 of 5 prompts: the one that comes twice has other draws"
    assert [table.num_read for table in tables] == [5, 5]
