"""Prices by hand, and proposed splits against every split that Megatron's options can express."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtopd.planning import Architecture, expressible_splits, price_stages, propose_split

ARCHITECTURE = Architecture(
    num_layers=8,
    hidden_size=512,
    ffn_size=1536,
    attention_size=512,
    key_value_size=256,
    vocab_size=32000,
)


def test_stages_are_priced_by_hand() -> None:
    layer = 2 * 512 * (2 * 512 + 2 * 256 + 3 * 1536)
    assert ARCHITECTURE.layer_flops == layer and ARCHITECTURE.head_flops == 2 * 512 * 32000
    head = 0.5 * (3 * 2 * 512 * 32000 + 2 * 1024 * 32000)
    split = price_stages(ARCHITECTURE, [4, 4], teacher_hidden_size=1024, loss_share=0.5)
    assert split.imbalance == pytest.approx((12 * layer + head) / ((24 * layer + head) / 2))
    assert ARCHITECTURE.sample_cost(10) == pytest.approx(8 * (10 * layer + 100 * 2 * 512))


@pytest.mark.parametrize(
    ("num_layers", "pp_size", "vpp_size", "even", "layers", "best"),
    [
        (8, 2, 1, 1.352, (6, 2), 1.028),
        # (1, 3, 3, 1) and (5, 1, 1, 1) have as expensive a last stage.
        (8, 4, 1, 2.055, (3, 2, 2, 1), 1.731),
        (16, 4, 1, 1.640, (5, 5, 5, 1), 1.050),
        (16, 4, 2, 1.640, (6, 4, 4, 2), 1.247),
        (28, 7, 1, 1.805, (2, 5, 5, 5, 5, 5, 1), 1.156),
    ],
)
def test_a_heavy_last_stage_gets_fewer_layers(
    num_layers: int, pp_size: int, vpp_size: int, even: float, layers: tuple[int, ...], best: float
) -> None:
    student = replace(ARCHITECTURE, num_layers=num_layers)
    found, better = propose_split(
        student, pp_size, vpp_size=vpp_size, teacher_hidden_size=1024, loss_share=0.5
    )
    assert found.imbalance == pytest.approx(even, abs=1e-3) and len(set(found.layers)) == 1
    assert better is not None and better.layers == layers
    assert better.imbalance == pytest.approx(best, abs=1e-3)


def test_no_split_is_proposed_where_none_is_needed_or_better() -> None:
    small = replace(ARCHITECTURE, vocab_size=100)
    even, better = propose_split(small, 2, teacher_hidden_size=512, loss_share=0.5)
    assert even.imbalance <= 1.1 and better is None
    assert propose_split(ARCHITECTURE, 1, teacher_hidden_size=512, loss_share=1.0)[1] is None
    even, better = propose_split(ARCHITECTURE, 8, teacher_hidden_size=512, loss_share=1.0)
    assert even.imbalance > 3 and better is None, "a layer on each stage already"


@given(st.integers(1, 6), st.integers(2, 5), st.integers(1, 3), st.integers(0, 100_000))
@settings(max_examples=60, deadline=None)
def test_no_split_that_megatron_can_be_told_is_better(
    each: int, pp_size: int, vpp_size: int, vocab_size: int
) -> None:
    num_layers = each * pp_size * vpp_size
    splits = []
    # Megatron's two options and its rule.
    for first, last in product([None, *range(1, num_layers)], repeat=2):
        left = num_layers - (first or 0) - (last or 0)
        stages = pp_size - (first is not None) - (last is not None)
        if left >= stages and (left % stages == 0 if stages else left == 0):
            layers = [left // stages] * stages if stages else []
            layers = [*([first] if first else []), *layers, *([last] if last else [])]
            if all(count % vpp_size == 0 for count in layers):
                splits.append(tuple(layers))
    assert set(expressible_splits(num_layers, pp_size, vpp_size)) == set(splits)

    student = replace(ARCHITECTURE, num_layers=num_layers, vocab_size=vocab_size)
    costs = {"teacher_hidden_size": 1024, "loss_share": 0.5}
    even, better = propose_split(student, pp_size, vpp_size=vpp_size, **costs)
    best = better or even
    assert sum(best.layers) == num_layers and len(best.layers) == pp_size and min(best.layers) >= 1
    if even.imbalance > 1.1:
        assert best.imbalance == min(
            price_stages(student, layers, **costs).imbalance for layers in splits
        )


def test_the_start_proposes_an_uneven_split_where_it_helps(tmp_path: Path) -> None:
    from mtopd.config import ConsolidateConfig
    from mtopd.config_file import validate
    from mtopd.pipelines.prepare import report_stage_imbalance
    from tests.small_models import save_model

    save_model(tmp_path, seed=0, layers=8, vocab=2000)
    values = {
        "run_dir": str(tmp_path / "run"),
        "student": {"model": str(tmp_path), "parallel": {"pp": 2}},
        "teachers": [{"name": "t", "store": "t", "route": {}}],
        "data": {"sources": [{"name": "s", "path": "p"}], "context_length": 64, "max_response": 32},
        "rollout": {"prompts_per_iteration": 8},
        "train": {"num_iterations": 1, "micro_batch_size": 1, "optimizer": {"lr": 1e-3}},
    }

    def said(**student: dict) -> list[str]:
        lines: list[str] = []
        config = validate(
            {**values, "student": {**values["student"], **student}}, ConsolidateConfig, "test"
        )
        report_stage_imbalance(config, 64, lines.append)
        return lines

    first = "student.megatron.num_layers_in_first_pipeline_stage"
    last = "student.megatron.num_layers_in_last_pipeline_stage"
    assert said() == [
        f"the last pipeline stage costs 1.22x the mean; {last}=3 would make that 1.03x"
    ]
    (line,) = said(parallel={"pp": 2, "vpp": 2})
    assert (
        f"1.22x the mean; {last}=2 would make that 1.16x; no split is more even, a smaller" in line
    )
    assert line.endswith("student.parallel.pp or vpp is")
    (line,) = said(parallel={"pp": 4})
    assert (
        f"1.67x the mean; {first}=3 {last}=1 would make that 1.29x; no split is more even" in line
    )
    (line,) = said(parallel={"pp": 8})
    assert "2.57x the mean; no split is more even, a smaller student.parallel.pp is" in line
    assert said(megatron={"num_layers_in_last_pipeline_stage": 5}) == [], "the user has chosen"
    assert said(parallel={"pp": 1}) == []
