"""What a rank holds: the parts follow from the parameters, and the parameters from the layout."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mtopd.planning import Layout, ModelSizes, fitting_layouts, in_binary_units, rank_capacity
from mtopd.planning.capacity import activation_bytes, padded_vocab_size, stage_params

# SmolLM2-135M
DENSE = ModelSizes(
    num_layers=30,
    num_dense_layers=30,
    hidden_size=576,
    vocab_size=49152,
    has_tied_embeddings=True,
    split_attention_params=2 * 576 * 64 * (9 + 3),
    common_attention_params=0,
    dense_ffn_size=1536,
    num_experts=0,
    expert_ffn_size=0,
    shared_ffn_size=0,
    active_ffn_size=1536,
    attention_size=576,
    key_value_size=192,
    num_attention_heads=9,
)
ONE = Layout()
EXPERTS = replace(
    DENSE, num_dense_layers=2, num_experts=12, expert_ffn_size=96, shared_ffn_size=192
)


def test_a_whole_model_has_the_published_number_of_parameters() -> None:
    assert DENSE.num_params == 134_515_008
    assert stage_params(DENSE, Layout()) == [134_515_008]


@pytest.mark.parametrize("sizes", [DENSE, EXPERTS])
def test_what_is_split_adds_up(sizes: ModelSizes) -> None:
    """Over tp ranks and stages all parameters are there; twice the tied embedding, and as often as
    there are ranks what tp does not split.
    """
    norms = (2 * 30 + 1) * 576
    routers = 576 * sizes.num_experts * (30 - sizes.num_dense_layers)
    for tp in (1, 3):
        for pp in (1, 2, 5, 30):
            stages = stage_params(sizes, Layout(tp=tp, pp=pp, etp=tp))
            again = 49152 * 576 if pp > 1 else 0
            assert len(stages) == pp
            whole = sizes.num_params + (tp - 1) * (norms + routers)
            assert tp * sum(stages) == whole + again + tp * 0
            interleaved = stage_params(sizes, Layout(tp=tp, pp=2, vpp=3, etp=tp))
            assert sum(interleaved) == sum(stage_params(sizes, Layout(tp=tp, pp=2, etp=tp)))
    per_expert = 3 * 576 * 96 * 28
    whole, split = (stage_params(EXPERTS, Layout(ep=ep))[0] for ep in (1, 4))
    assert whole - split == per_expert * (12 - 3)


def test_bytes_follow_from_parameters() -> None:
    fp32 = rank_capacity(DENSE, Layout(dp=4), dtype_bytes=4, micro_batch_tokens=100)
    bf16 = rank_capacity(DENSE, Layout(dp=4), dtype_bytes=2, micro_batch_tokens=100)
    n = fp32.params
    assert (fp32.weights, fp32.gradients, fp32.optimizer) == (4 * n, 4 * n, 8 * n)
    assert (bf16.weights, bf16.gradients, bf16.optimizer) == (2 * n, 4 * n, 12 * n)
    assert bf16.engine == 2 * DENSE.num_params
    shared = rank_capacity(
        DENSE, Layout(dp=4), dtype_bytes=2, micro_batch_tokens=100, distributed_optimizer=True
    )
    assert shared.optimizer == 3 * n
    assert bf16.total == sum(bf16.parts.values()) == bf16.device + bf16.host
    kept = rank_capacity(
        DENSE, Layout(dp=4), dtype_bytes=2, micro_batch_tokens=100, kept_teachers=7
    )
    assert kept.total - bf16.total == 7


def test_activations_grow_with_tokens_and_shrink_with_tp_and_recomputing() -> None:
    def of(layout: Layout = ONE, tokens: int = 1000, recomputes: bool = False) -> int:
        return activation_bytes(DENSE, layout, tokens=tokens, dtype_bytes=2, recomputes=recomputes)

    assert of(tokens=2000) == pytest.approx(2 * of(), rel=1e-6)
    assert of(Layout(tp=3)) < 0.7 * of()
    assert of(recomputes=True) < 0.2 * of()
    # Of pp stages each has 1/pp of the layers, and the first pp micro-batches in flight.
    assert of(Layout(pp=5)) == pytest.approx(of(), rel=1e-6)


def test_the_embedding_is_padded_on_every_rank() -> None:
    assert [padded_vocab_size(100, tp) for tp in (1, 2, 16, 32)] == [128, 128, 128, 256]
    assert padded_vocab_size(49152, 3) == 49152


def test_layouts_that_fit_are_all_that_divide_the_ranks() -> None:
    dense = {
        (layout.tp, layout.pp, layout.dp)
        for layout in fitting_layouts(6, tp_counts=[3, 9], num_layers=30, expert_counts=[])
    }
    assert dense == {(t, p, 6 // t // p) for t in (1, 3) for p in (1, 2, 3, 6) if 6 % (t * p) == 0}
    for layout in fitting_layouts(8, tp_counts=[8], num_layers=4, expert_counts=[12, 96]):
        assert layout.world_size == 8 and 8 // layout.pp % (layout.ep * layout.etp) == 0
        assert 12 % layout.ep == 0 and layout.etp == (layout.tp if layout.ep == 1 else 1)


def test_sizes_are_told_in_one_unit() -> None:
    assert in_binary_units([1 << 20, 3 << 19]) == (["1.0", "1.5"], "MiB")
    assert in_binary_units([1 << 31, 1 << 28]) == (["2.0", "0.25"], "GiB")
    told = str(rank_capacity(DENSE, Layout(), dtype_bytes=4, micro_batch_tokens=100))
    assert told.startswith("7.") and "GiB: weights 0.50, gradients 0.50, optimizer 1.0," in told
