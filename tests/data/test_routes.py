"""Routes of teachers."""

from __future__ import annotations

import pytest

from mtopd.data import (
    route,
)
from mtopd.types import MtopdError


def test_route_takes_the_most_specific_match() -> None:
    routes = {
        "rest": {},
        "math": {"domain": "math"},
        "hard": {"domain": "math", "effort": "high"},
        "german": {"effort": "high", "lang": "de"},
    }
    assert route({"domain": "code"}, routes) == 0
    assert route({"domain": "math", "effort": "low"}, routes) == 1
    assert route({"domain": "math", "effort": "high"}, routes) == 2
    assert route({"domain": "code", "effort": "high", "lang": "de"}, routes) == 3


def test_routing_errors_show_fields_and_routes() -> None:
    routes = {"math": {"domain": "math"}, "hard": {"effort": "high"}}
    with pytest.raises(
        MtopdError, match=r"no teacher's route .*'code'.* math: .*'math'.*; hard: .*'high'"
    ):
        route({"domain": "code"}, routes)
    with pytest.raises(
        MtopdError, match=r"teachers math, hard match .*'effort': 'high'.*more specific"
    ):
        route({"domain": "math", "effort": "high"}, routes)
