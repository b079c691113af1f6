"""The verbatim ``student.megatron`` table: a field reaches every Megatron dataclass that has it; no
other passes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch

from mtopd.config import StudentConfig
from mtopd.hf_checkpoint import load_hf_config
from mtopd.megatron import options, without_te
from mtopd.megatron.options import (
    FREE_MEGATRON,
    LAYOUT_DEPENDENT,
    NEEDS_TRANSFORMER_ENGINE,
    NUMERIC,
    OF_THE_MODEL,
    UNSUPPORTED,
    check_model_fields,
    config_overrides,
    matches,
    megatron_dataclasses,
    megatron_refuses,
    sort_fields,
    split_options,
    splits_unevenly,
)
from mtopd.pipelines.student import build_bridge
from mtopd.types import MtopdError
from tests.small_models import MODEL_TYPES, save_model


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


def test_yaml_strings_become_members_of_enumerations_and_dtypes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(without_te, "have_transformer_engine", lambda: True)
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
        pytest.raises(MtopdError, match=r"under student\.megatron \(a, b\): .*sequence"),
        megatron_refuses({"b": 1, "a": 2}),
    ):
        TransformerConfig(
            num_layers=2, hidden_size=8, num_attention_heads=2, sequence_parallel=True
        )


def test_faults_of_ours_are_not_blamed_on_the_user() -> None:
    """Without options of the user's nothing of them can be refused; nor where our own code fails."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    sizes = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2}
    with pytest.raises(ValueError, match="sequence") as error, megatron_refuses({}):
        TransformerConfig(**sizes, sequence_parallel=True)
    assert not isinstance(error.value, MtopdError)
    with pytest.raises(KeyError), megatron_refuses({"a": 1}):
        convert_bridge_fault()
    with pytest.raises(MtopdError, match=r"^says itself"), megatron_refuses({"a": 1}):
        raise MtopdError("says itself")


def convert_bridge_fault() -> None:
    from mtopd.dtypes import torch_dtype

    torch_dtype("no dtype")


def test_every_option_of_megatron_belongs_to_one_kind() -> None:
    """A field that nobody looked at could train another model, or do nothing."""
    names = {field.name for kind in megatron_dataclasses() for field in dataclasses.fields(kind)}
    unsupported = [pattern for patterns in UNSUPPORTED.values() for pattern in patterns]
    kinds = {
        "set elsewhere": list(options._SET_ELSEWHERE),
        "of the model": list(OF_THE_MODEL),
        "unsupported": unsupported,
        "free": list(FREE_MEGATRON),
        "numeric": list(NUMERIC),
    }
    wrong = {
        name: found
        for name in names
        if len(found := [kind for kind, patterns in kinds.items() if matches(name, patterns)]) != 1
    }
    assert wrong == {}
    unknown = [
        pattern
        for kind in ("of the model", "unsupported", "numeric")
        for pattern in kinds[kind]
        if not any(matches(name, [pattern]) for name in names)
    ]
    assert unknown == []
    for pattern in NEEDS_TRANSFORMER_ENGINE:
        named = [name for name in names if matches(name, [pattern])]
        assert named and all(matches(name, (*FREE_MEGATRON, *NUMERIC)) for name in named)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("moe_enable_routing_replay", True, "record no routes"),
        ("moe_router_force_load_balancing", True, "routes as the model does"),
        ("fp8", "e4m3", "8 or 4 bits"),
        ("fp4", "e2m1", "8 or 4 bits"),
        ("fp8_param_gather", True, "8 or 4 bits"),
        ("tp_comm_overlap", True, "user buffers"),
        ("mtp_num_layers", 1, "student.mtp"),
        ("init_method_std", 0.1, "all weights come from student.model"),
        ("cross_entropy_loss_fusion", True, "without Megatron's output layer"),
        ("optimizer", "sgd", "state of AdamW"),
        ("optimizer_cpu_offload", True, "offload_student"),
        ("nccl_ub", True, "keep addresses"),
        ("loss_scale", 128.0, "float16"),
        ("num_distributed_optimizer_instances", 2, "process groups are not made"),
        ("moe_grouped_gemm", True, "needs Transformer Engine, which is not installed"),
    ],
)
def test_what_a_run_does_not_do_is_refused_with_the_reason(
    name: str, value: object, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(without_te, "have_transformer_engine", lambda: False)
    with pytest.raises(MtopdError, match=rf"^student\.megatron\.{name}={value!r} .*{reason}"):
        sort_fields({name: value})


def test_what_asks_for_nothing_passes() -> None:
    for kind in megatron_dataclasses():
        for field in dataclasses.fields(kind):
            if field.name in options._SET_ELSEWHERE or field.default is dataclasses.MISSING:
                continue
            sort_fields({field.name: field.default})  # no error


# What Megatron's config of a student has beside what its config.json decides: defaults of a run.
CHOICES = {
    "moe_aux_loss_coeff",
    "moe_expert_capacity_factor",
    "moe_grouped_gemm",
    "moe_router_bias_update_rate",
    "moe_router_load_balancing_type",
    "moe_shared_expert_overlap",
    "moe_token_dispatcher_type",
    "moe_router_dtype",
    "mtp_num_layers",
    "mtp_loss_scaling_factor",
    "attention_backend",
    "attention_dropout",
    "hidden_dropout",
    "sequence_parallel",
    "persist_layer_norm",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "apply_rope_fusion",
    "masked_softmax_fusion",
    "overlap_p2p_comm",
    "batch_p2p_comm",
    "disable_bf16_reduced_precision_matmul",
    "use_cpu_initialization",
    "variable_seq_lengths",
}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_the_checkpoint_decides_passes_only_as_it_is(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every field that mbridge, or our table of the family, sets for a student of the family."""
    save_model(tmp_path, seed=0, model_type=model_type, layers=2)
    given: dict[str, object] = {}
    kind = megatron_dataclasses()[0]
    student = StudentConfig(model=tmp_path)
    hf_config, device = load_hf_config(tmp_path), torch.device("cpu")
    for config_class in (kind, kind.__mro__[1]):
        monkeypatch.setattr(config_class, "__init__", noting_of(config_class, given))
    config = build_bridge(
        student, hf_config, sort_fields({}), device, layout=student.parallel
    ).transformer_config
    monkeypatch.undo()
    decided = {n for n in given if n not in options._SET_ELSEWHERE and n not in CHOICES}
    decided &= {n for n in given if n not in config_overrides(device)}
    assert {"num_layers", "layernorm_epsilon", "kv_channels", "activation_func"} <= decided
    # nor what nobody sets, and which would change the model all the same
    decided |= {"rotary_interleaved", "layernorm_zero_centered_gamma", "moe_apply_probs_on_input"}
    for name in sorted(decided):
        truth = getattr(config, name)
        truth = getattr(truth, "__name__", truth)
        fields = sort_fields({name: truth})
        assert name not in fields.transformer, name  # compared, and not passed on
        check_model_fields(fields, config, tmp_path)
        for other in (7 if truth != 7 else 8, not truth, "gelu"):
            with contextlib.suppress(MtopdError):
                fields = sort_fields({name: other})
            if fields.of_the_model.get(name) == truth:
                continue
            with pytest.raises(MtopdError, match=f"{name}=.*{tmp_path} decides it"):
                check_model_fields(fields, config, tmp_path)


def noting_of(kind: type, given: dict[str, object]) -> Any:
    original = kind.__init__  # type: ignore[misc]

    def noting(self: object, *positional: object, **fields: object) -> None:
        given.update(fields)
        original(self, *positional, **fields)

    return noting
