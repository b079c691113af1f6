"""The verbatim ``student.megatron`` table: a field reaches every Megatron dataclass that has it; no
other passes.
"""

from __future__ import annotations

import dataclasses
import fnmatch

import pytest
import torch

from mtopd.megatron.options import (
    FREE_MEGATRON,
    LAYOUT_DEPENDENT,
    config_overrides,
    megatron_dataclasses,
    megatron_refuses,
    sort_fields,
    split_options,
    splits_unevenly,
)
from mtopd.types import MtopdError


def test_a_field_goes_to_every_dataclass_that_has_it() -> None:
    fields = sort_fields(
        {
            "recompute_granularity": "full",
            "overlap_grad_reduce": True,
            "use_distributed_optimizer": True,
        }
    )
    assert fields.transformer == {"recompute_granularity": "full"}
    assert fields.ddp == {"overlap_grad_reduce": True, "use_distributed_optimizer": True}
    assert fields.optimizer == {"use_distributed_optimizer": True}


def test_yaml_strings_become_numbers_and_words_stay() -> None:
    assert sort_fields({"adam_eps": "1e-5"}).optimizer == {"adam_eps": 1e-5}
    assert sort_fields({"bucket_size": 7}).ddp == {"bucket_size": 7}
    assert sort_fields({"sequence_parallel": "False"}).transformer == {"sequence_parallel": False}
    assert sort_fields({"moe_router_dtype": "fp32"}).transformer == {"moe_router_dtype": "fp32"}


def test_yaml_strings_become_members_of_enumerations_and_dtypes() -> None:
    backend = sort_fields({"attention_backend": "flash"}).transformer["attention_backend"]
    assert backend == type(megatron_dataclasses()[0].attention_backend).flash
    assert sort_fields({"exp_avg_dtype": "bfloat16"}).optimizer == {"exp_avg_dtype": torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "value", "needs"),
    [
        ("adam_eps", "small", "needs a number, found 'small'"),
        (
            "attention_backend",
            "flsh",
            "needs one of flash, fused, unfused, local, auto, found 'flsh'",
        ),
        ("sequence_parallel", "on it", "needs true or false, found 'on it'"),
        ("main_grads_dtype", "fp32", "needs a dtype such as float32 or bfloat16, found 'fp32'"),
    ],
)
def test_strings_that_a_field_does_not_know_are_refused(name: str, value: str, needs: str) -> None:
    with pytest.raises(MtopdError, match=rf"student\.megatron\.{name} {needs}"):
        sort_fields({name: value})


def test_what_a_later_start_may_change_are_fields_of_megatron() -> None:
    known = {field.name for kind in megatron_dataclasses() for field in dataclasses.fields(kind)}
    for pattern in FREE_MEGATRON:
        assert fnmatch.filter(known, pattern), pattern
    free = {name for pattern in FREE_MEGATRON for name in fnmatch.filter(known, pattern)}
    assert not [
        name for name in free if name.startswith(("adam", "hidden", "moe_router", "moe_aux", "fp8"))
    ]


def test_what_depends_on_the_layout_is_a_field_that_a_later_start_may_not_change() -> None:
    transformer = megatron_dataclasses()[0]
    assert LAYOUT_DEPENDENT.keys() <= {field.name for field in dataclasses.fields(transformer)}
    for name in LAYOUT_DEPENDENT:
        assert not [pattern for pattern in FREE_MEGATRON if fnmatch.fnmatchcase(name, pattern)]


@pytest.mark.parametrize(
    ("layers", "options"),
    [
        ([4, 4, 2], ["last_pipeline_stage=2"]),
        ([3, 4, 4], ["first_pipeline_stage=3"]),
        ([3, 4, 2], ["first_pipeline_stage=3", "last_pipeline_stage=2"]),
    ],
)
def test_an_uneven_split_takes_as_few_options_as_say_it(
    layers: list[int], options: list[str]
) -> None:
    found = split_options(layers)
    assert found == [f"student.megatron.num_layers_in_{option}" for option in options]
    assert splits_unevenly({found[0].split(".")[2].split("=")[0]: 1})
    assert not splits_unevenly({"sequence_parallel": True})


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("recompute_granularty", "did you mean 'recompute_granularity'"),
        ("tensor_model_parallel_size", r"set student\.parallel\.tp"),
        ("virtual_pipeline_model_parallel_size", r"set student\.parallel\.vpp"),
        ("lr", r"set train\.optimizer\.lr"),
        ("bf16", r"set student\.dtype"),
        ("calculate_per_token_loss", "1/N is in the token weights"),
    ],
)
def test_unknown_fields_and_those_with_a_key_of_their_own_are_refused(name: str, hint: str) -> None:
    with pytest.raises(MtopdError, match=hint):
        sort_fields({name: 1})


def test_the_user_has_the_last_word_over_defaults_of_the_backend() -> None:
    assert config_overrides(torch.device("cpu"))["sequence_parallel"] is False
    assert (
        config_overrides(torch.device("cpu"), {"sequence_parallel": True})["sequence_parallel"]
        is True
    )
    plain, interleaved = (
        config_overrides(torch.device("cpu"), interleaved=i) for i in (False, True)
    )
    assert (plain["batch_p2p_comm"], interleaved["batch_p2p_comm"]) == (True, False)


def test_what_megatron_refuses_is_the_users_error() -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    with (
        pytest.raises(MtopdError, match=r"under student\.megatron: .*sequence"),
        megatron_refuses(),
    ):
        TransformerConfig(
            num_layers=2, hidden_size=8, num_attention_heads=2, sequence_parallel=True
        )
